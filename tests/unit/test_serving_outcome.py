"""A request's share of a run is what it would have got alone, as JSON and as bytes."""

from __future__ import annotations

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from serving.datatypes import NUMPY, to_bytes
from serving.outcome import Outcome, Scored
from serving.results import form, shape

ROWS = 5


@pytest.mark.parametrize("datatype", list(NUMPY))
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_share_is_what_the_request_would_have_got_alone(identity_model, datatype, data):
    inner = data.draw(st.sampled_from([(), (1,), (3,), (2, 2), (0,), (2, 0)]), "shape of a row")
    if datatype == "BYTES":
        values = [f'{number}],["\\ {number}' for number in range(ROWS * int(np.prod(inner)))]
        array = np.array(values, np.object_).reshape((ROWS, *inner))
    else:
        array = data.draw(arrays.arrays(NUMPY[datatype], (ROWS, *inner)), "values")
    first, second = sorted(data.draw(st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)), "cuts"))
    ids = [f"{row:032x}" for row in range(ROWS)]
    model = identity_model(datatype)
    run = Outcome(model, {"y": array}, ids, [], shared=True)
    for start, end in ((0, first), (first, second), (second, ROWS)):
        share, alone = Scored(run, start, end), Outcome(model, {"y": array[start:end]}, ids[start:end], []).whole()
        flat = array[start:end].ravel()
        plain = flat.tolist() if datatype == "BYTES" else flat
        assert share.text("y", datatype) == orjson.dumps(plain, option=orjson.OPT_SERIALIZE_NUMPY)
        assert share.raw("y", datatype) == to_bytes(datatype, flat)
        assert shape(share, "y") == (end - start, *inner)
        assert share.text("prediction_id", "BYTES") == orjson.dumps(ids[start:end])
        for wanted in (None, {"y": True}, {"prediction_id": False, "y": True}):
            assert form(share, wanted, has_id=False) == form(alone, wanted, has_id=False)
