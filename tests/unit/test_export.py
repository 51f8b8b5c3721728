"""The exported graph is the trained network, on every edge; a wrong one is refused."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pyarrow as pa
import pytest
import torch
from onnx import numpy_helper

from noria.errors import ParityError
from noria.runtime import open_session, score
from noria.schema import MISSING_INTEGER, Tensors
from noria.workload import Workload
from registry.graph import check_graph
from training import parity, preprocess
from training.boundary import boundary, strewn
from training.export import export
from training.loop import Job
from training.model import Scored
from training.preprocess import Preprocessing


@pytest.fixture(scope="module")
def made(parcels: Workload, sent_parcels: Callable[..., pa.Table]) -> tuple[Scored, Preprocessing, bytes]:
    """An untrained network: parity does not depend on what it learnt."""
    torch.set_num_threads(1)
    prepared = preprocess.fit(parcels.schema, sent_parcels(), parcels.training)
    job = Job(prepared.inputs, parcels.network, replace(parcels.training, seed=3), parcels.loss, "exp", 1.5, 0.6)
    scored = job.build()
    return scored, prepared, export(scored, prepared)


@pytest.fixture(scope="module")
def sample(parcels: Workload, sent_parcels: Callable[..., pa.Table]) -> Tensors:
    return parcels.schema.tensors(sent_parcels(300, seed=5))


def test_the_graph_takes_raw_columns_and_is_fit_for_a_bundle(made: tuple, parcels: Workload) -> None:
    model = onnx.ModelProto.FromString(made[2])
    assert {entry.name for entry in model.graph.input} == set(parcels.schema.names)
    assert [entry.name for entry in model.graph.output] == ["score"]
    assert sorted(entry.domain for entry in model.opset_import) == ["", "ai.onnx.ml"]
    assert {entry.type.tensor_type.shape.dim[0].dim_param for entry in model.graph.input} == {"rows"}
    check_graph(made[2], parcels.schema)


def test_parity_over_ten_thousand_rows_and_four_batch_sizes(made: tuple, parcels: Workload, sample: Tensors) -> None:
    scored, prepared, model = made
    report = parity.check(model, scored, prepared, parcels.schema, sample)
    assert report["rows"] >= 10_000
    assert report["batches"] == [1, 2, 17, 1024]
    assert report["boundary_rows"] > 1000
    assert report["largest_difference"] < report["tolerance"] == 1e-4
    assert "generated edges" in parity.summary(report)


def test_a_graph_with_one_wrong_weight_is_refused(made: tuple, parcels: Workload, sample: Tensors) -> None:
    scored, prepared, model = made
    wrong = onnx.ModelProto.FromString(model)
    for tensor in wrong.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32 and value.size > 1:
            tensor.CopyFrom(numpy_helper.from_array(value + np.float32(1e-2), tensor.name))
            break
    with pytest.raises(ParityError, match=r"instead of .* [1-9]\d* of \d+ rows are off by more than 0\.0001"):
        parity.check(wrong.SerializeToString(), scored, prepared, parcels.schema, sample)


def test_time_through_float32_is_caught_by_the_edges(made: tuple, parcels: Workload, sample: Tensors) -> None:
    """The export that was once wrong in one row of 1,900: epoch seconds divided as float32."""
    scored, prepared, model = made
    wrong = onnx.ModelProto.FromString(model)
    week = next(node for node in wrong.graph.node if node.op_type == "Mod" and "sent" in node.input)
    before = [
        onnx.helper.make_node("Cast", ["sent"], ["lossy_float"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Cast", ["lossy_float"], ["lossy"], to=onnx.TensorProto.INT64),
    ]
    week.input[list(week.input).index("sent")] = "lossy"
    for node in reversed(before):
        wrong.graph.node.insert(0, node)
    with pytest.raises(ParityError, match="sent"):
        parity.check(wrong.SerializeToString(), scored, prepared, parcels.schema, sample)


def test_wrong_preprocessing_is_caught_by_the_independent_evaluator(
    made: tuple, parcels: Workload, sample: Tensors
) -> None:
    """A runtime that computes something else than the standard says: here, clocks an hour off."""

    class Off(Preprocessing):
        def run(self, raw: Tensors) -> Tensors:
            return {name: value + (name == "sent.hour") for name, value in super().run(raw).items()}

    with pytest.raises(ParityError, match=r"'sent\.hour' differs"):
        parity.check_preprocessing(Off(made[1].model, made[1].inputs), boundary(parcels.schema, sample))


def test_the_boundary_set_holds_what_it_must(parcels: Workload, sample: Tensors) -> None:
    rows = boundary(parcels.schema, sample)
    sent = rows["sent"]
    assert ((sent % 86_400 == 0).sum() > 50) and ((sent % 86_400 == 86_399).sum() > 50)
    assert {0, -1, 2**31, MISSING_INTEGER} <= set(sent.tolist())
    assert np.isnan(rows["weight"]).sum() == 2  # one of its own, one in the row where everything is missing
    assert {0.0, -0.001} <= {round(float(value), 4) for value in rows["weight"] if abs(value) < 1e6}
    assert (rows["depot"] < 0).any()
    assert "" in rows["remark"] and any(not text.isascii() for text in rows["remark"])
    everything = {name: values[-1] for name, values in rows.items()}
    assert everything["remark"] == everything["service"] == "" and everything["depot"] == MISSING_INTEGER


def test_strewn_rows_use_the_whole_sample_and_hold_missing_values(parcels: Workload, sample: Tensors) -> None:
    rows = strewn(parcels.schema, sample, 1000)
    assert len(rows["sent"]) == 1000
    assert 0.01 < np.mean(rows["service"] == "") < 0.12
    assert len(set(rows["sent"][:300].tolist()) & set(sample["sent"].tolist())) > 270


def test_every_row_scores_the_same_alone_and_in_a_batch(made: tuple, parcels: Workload, sample: Tensors) -> None:
    session = open_session(made[2])
    together = score(session, sample)
    alone = score(session, sample, batch=1)
    assert np.allclose(together, alone, rtol=1e-6)
    assert together.dtype == np.float32
    assert together.shape == (300,)
