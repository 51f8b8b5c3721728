"""On a GPU: the same scores as on the CPU, and a configured GPU that is missing is an error."""

import os

import numpy as np
import onnxruntime as ort
import pytest

from noria.errors import SettingsError
from noria.runtime import available_providers, open_session, score


@pytest.fixture
def gpu():
    """A usable GPU; without one the test skips, or fails where REQUIRE_GPU=1."""
    try:
        return available_providers("cuda")
    except SettingsError as error:
        if os.environ.get("REQUIRE_GPU") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))


def test_scores_on_the_gpu_equal_those_on_the_cpu(gpu, trips_schema, trips, trips_graph):
    tensors = trips_schema.tensors(trips)
    on_gpu, on_cpu = open_session(trips_graph, "cuda"), open_session(trips_graph, "cpu")
    assert on_gpu.get_providers()[0] == "CUDAExecutionProvider"
    np.testing.assert_allclose(score(on_gpu, tensors), score(on_cpu, tensors), rtol=1e-4, atol=1e-5)


def test_auto_takes_what_there_is(trips_graph):
    found = open_session(trips_graph, "auto").get_providers()
    assert found[-1] == "CPUExecutionProvider"
    assert ("CUDAExecutionProvider" in found) <= ("CUDAExecutionProvider" in ort.get_available_providers())
