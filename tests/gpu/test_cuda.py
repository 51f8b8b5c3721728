"""On a GPU: the same scores as on the CPU, bound or not, from many threads, and from a bundle that is served."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from noria.gpu import GpuOptions, find_gpu
from noria.runtime import nodes_by_provider, open_session, provider_of, run, run_bound, score
from registry.bundle import write
from serving.hardware import gpu_options
from serving.model import WARM, load

WIDTH = 64


@pytest.fixture(scope="module")
def network():
    """Numbers in, two layers, two outputs: all of it can run on a GPU."""
    generator = np.random.default_rng(0)
    weights = [generator.normal(0, WIDTH**-0.5, shape).astype(np.float32) for shape in ((WIDTH, WIDTH), (WIDTH, 2))]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "w1"], ["y"]),
        helper.make_node("Exp", ["y"], ["e"]),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])
        for name, width in (("x", WIDTH), ("y", 2), ("e", 2))
    ]
    constants = [numpy_helper.from_array(value, f"w{index}") for index, value in enumerate(weights)]
    graph = helper.make_graph(nodes, "network", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def rows(count, seed=0):
    return {"x": np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)}


def test_the_driver_tells_what_gpu_it_is(gpu):
    found = find_gpu()
    assert found.name and found.driver and found.memory > 2**30 and found.cuda >= 12_000
    assert float(found.capability) >= 5


def test_scores_on_the_gpu_equal_those_on_the_cpu(gpu, trips_schema, trips, trips_graph):
    tensors = trips_schema.tensors(trips)
    on_gpu, on_cpu = open_session(trips_graph, "cuda"), open_session(trips_graph, "cpu")
    assert on_gpu.get_providers()[0] == "CUDAExecutionProvider"
    np.testing.assert_allclose(score(on_gpu, tensors), score(on_cpu, tensors), rtol=1e-4, atol=1e-5)


def test_auto_takes_what_there_is(trips_graph):
    found = open_session(trips_graph, "auto").get_providers()
    assert found[-1] == "CPUExecutionProvider"
    assert ("CUDAExecutionProvider" in found) <= ("CUDAExecutionProvider" in ort.get_available_providers())


@pytest.mark.parametrize("count", [1, 7, 1024])
def test_bound_runs_on_the_gpu_equal_plain_ones_and_the_cpu(gpu, network, count):
    on_gpu, on_cpu = open_session(network, "cuda"), open_session(network, "cpu")
    assert provider_of(on_gpu) == "cuda" and nodes_by_provider(on_gpu)["cuda"] >= 3
    assert {info.name for info in on_gpu.get_input_memory_infos()} == {"Cuda"}
    expected = on_cpu.run(["e", "y"], rows(count))
    for found in (run(on_gpu, ["e", "y"], rows(count)), run_bound(on_gpu, ["e", "y"], rows(count))):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)  # TF32 would be off by ten times that


def test_bound_runs_of_many_threads_do_not_mix(gpu, network):
    on_gpu, on_cpu = open_session(network, "cuda"), open_session(network, "cpu")

    def one(seed):
        given = rows(1 + seed % 9, seed)
        return np.allclose(run(on_gpu, ["y"], given)[0], on_cpu.run(["y"], given)[0], rtol=1e-4, atol=1e-5)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(one, range(200)))


def test_a_limit_on_memory_is_kept(gpu, network):
    session = open_session(network, "cuda", gpu=GpuOptions(memory_mb=64))
    assert session.get_provider_options()["CUDAExecutionProvider"]["gpu_mem_limit"] == str(64 * 2**20)
    assert run(session, ["y"], rows(1024))[0].shape == (1024, 2)


def test_a_bundle_proves_itself_on_the_gpu(gpu, make_contents, tmp_path):
    write(tmp_path / "bundle", make_contents())
    loaded = load("trips", 1, tmp_path / "bundle", "cuda")
    assert loaded.session.get_providers()[0] == "CUDAExecutionProvider"
    assert loaded.sizes == WARM


def test_tensorrt_builds_an_engine_once_and_scores_the_same(tensorrt, network, tmp_path, monkeypatch):
    monkeypatch.setenv("NORIA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.onnx"
    path.write_bytes(network)
    options = gpu_options(path, "tensorrt", WARM)
    session = open_session(path, "tensorrt", gpu=options)
    assert provider_of(session) == "tensorrt"
    expected = open_session(network, "cpu").run(["y"], rows(1024))[0]
    np.testing.assert_allclose(run(session, ["y"], rows(1024))[0], expected, rtol=1e-3, atol=1e-4)
    (engine,) = (tmp_path / "cache" / "engines").rglob("*.engine")
    written = engine.stat().st_mtime_ns
    again = open_session(path, "tensorrt", gpu=options)
    np.testing.assert_allclose(run(again, ["y"], rows(1))[0], expected[:1], rtol=1e-3, atol=1e-4)
    assert engine.stat().st_mtime_ns == written
