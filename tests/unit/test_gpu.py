"""What is decided about a GPU without one: sentences, options, the engines' folders; and bound runs, on the CPU."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from noria.errors import SettingsError
from noria.gpu import Gpu, GpuOptions, check_driver, cuda_options, engine_cache, find_gpu, tensorrt_options
from noria.providers import require
from noria.runtime import nodes_by_provider, open_session, placed, provider_of, run, run_bound
from noria.settings import load_settings
from serving.hardware import gpu_options, profile
from serving.reload import serve

H200 = Gpu("NVIDIA H200", "9.0", 149_250_000_000, "580.65.06", 13_000)
KEY = {"gpu": H200, "model_sha": "ab" * 32, "tensorrt": "101303", "runtime": "1.31.1"}


def no_gpu():
    try:
        find_gpu()
    except SettingsError:
        return True
    return False


without_gpu = pytest.mark.skipif(not no_gpu(), reason="there is a GPU; tests/gpu uses it")


@pytest.mark.parametrize(
    "change",
    [
        {"gpu": replace(H200, name="NVIDIA H100")},
        {"gpu": replace(H200, capability="10.0")},
        {"gpu": replace(H200, driver="580.65.07")},
        {"model_sha": "ac" * 32},
        {"tensorrt": "101400"},
        {"runtime": "1.32.0"},
    ],
)
def test_an_engine_is_looked_for_only_where_everything_it_depends_on_is_the_same(change):
    assert engine_cache(Path("e"), **KEY) == engine_cache(Path("e"), **KEY)
    assert engine_cache(Path("e"), **{**KEY, **change}) != engine_cache(Path("e"), **KEY)


def test_what_does_not_change_an_engine_does_not_change_its_folder_and_names_stay_inside():
    assert engine_cache(Path("e"), **{**KEY, "gpu": replace(H200, memory=1)}) == engine_cache(Path("e"), **KEY)
    folder = engine_cache(Path("e"), **{**KEY, "gpu": replace(H200, name="../../odd / name")})
    assert folder.parent.parent == Path("e") and folder.parent.name == "odd-name-sm9-0"


def test_cuda_is_told_the_device_the_limit_and_to_keep_its_precision():
    options = cuda_options(GpuOptions(device=1, memory_mb=512))
    assert (options["device_id"], options["gpu_mem_limit"], options["use_tf32"]) == ("1", str(512 * 2**20), "0")
    assert "gpu_mem_limit" not in cuda_options(GpuOptions())


def test_tensorrt_is_told_its_caches_and_its_shapes():
    options = tensorrt_options(
        GpuOptions(profile={"a": ("1", "64", "1024"), "b": ("1x3", "64x3", "1024x3")}), Path("e/g/k")
    )
    assert options["trt_engine_cache_path"] == "e/g/k" and options["trt_timing_cache_path"] == "e/g"
    assert options["trt_profile_min_shapes"] == "a:1,b:1x3"
    assert options["trt_profile_opt_shapes"] == "a:64,b:64x3"
    assert options["trt_profile_max_shapes"] == "a:1024,b:1024x3"
    bare = tensorrt_options(GpuOptions(), None)
    assert not [name for name in bare if "cache" in name or "profile" in name]


def test_a_driver_older_than_the_build_is_refused_with_both_versions():
    check_driver(H200, "13.0")
    check_driver(H200, "12.8")
    with pytest.raises(SettingsError, match=r"580\.65\.06\) supports CUDA 12\.4, .* built for CUDA 13\.0; update"):
        check_driver(replace(H200, cuda=12_040), "13.0")
    with pytest.raises(SettingsError, match="without CUDA; install onnxruntime-gpu"):
        check_driver(H200, "")


def test_a_machine_without_a_driver_says_so():
    with pytest.raises(SettingsError, match="no NVIDIA driver"):
        find_gpu(library="libcuda-that-is-not-there.so.1")


@without_gpu
@pytest.mark.parametrize("wanted", ["cuda", "tensorrt"])
def test_a_gpu_that_is_asked_for_and_missing_is_an_error_at_start(wanted, trips_graph, tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match=f"NORIA_PROVIDERS={wanted} is not possible here: .* Set it to auto or cpu"):
        open_session(trips_graph, wanted)
    monkeypatch.setenv("NORIA_PROVIDERS", wanted)
    with pytest.raises(SettingsError, match=wanted):
        serve(load_settings(home=tmp_path), "127.0.0.1", 0, "")
    assert not list(tmp_path.iterdir())


@without_gpu
def test_auto_and_cpu_go_without(trips_graph):
    assert require("auto") == require("cpu") == ["cpu"]
    assert provider_of(open_session(trips_graph, "auto")) == "cpu"


def test_what_runs_is_counted_by_node(trips_graph):
    session = open_session(trips_graph, "cpu")
    found = nodes_by_provider(session)
    assert set(found) == {"cpu"} and 5 <= found["cpu"] <= 12
    assert placed(session) == f"cpu ({found['cpu']} nodes)"


def two_outputs(text=False):
    """Twice and times ones; with `text` strings go through it, too."""
    number = TensorProto.FLOAT
    nodes = [helper.make_node("Add", ["a", "a"], ["twice"]), helper.make_node("MatMul", ["a", "w"], ["product"])]
    inputs = [helper.make_tensor_value_info("a", number, ["n", 3])]
    outputs = [
        helper.make_tensor_value_info("twice", number, ["n", 3]),
        helper.make_tensor_value_info("product", number, ["n", 2]),
    ]
    if text:
        nodes.append(helper.make_node("Identity", ["s"], ["word"]))
        inputs.append(helper.make_tensor_value_info("s", TensorProto.STRING, ["n"]))
        outputs.append(helper.make_tensor_value_info("word", TensorProto.STRING, ["n"]))
    graph = helper.make_graph(nodes, "two", inputs, outputs, [helper.make_tensor("w", number, [3, 2], np.ones(6))])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("rows", [1, 7, 1024])
def test_bound_runs_give_what_plain_runs_give(rows):
    session = open_session(two_outputs(), "cpu")
    tensors = {"a": np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)}
    plain = session.run(["twice", "product"], tensors)
    for found in (run_bound(session, ["twice", "product"], tensors), run(session, ["twice", "product"], tensors)):
        for one, other in zip(found, plain, strict=True):
            np.testing.assert_array_equal(one, other)


def test_strings_are_run_plainly(trips_graph, trips_schema, trips):
    session, tensors = open_session(trips_graph, "cpu"), trips_schema.tensors(trips.slice(0, 9))
    np.testing.assert_array_equal(run(session, ["score"], tensors)[0], session.run(["score"], tensors)[0])
    with pytest.raises(RuntimeError, match="non-string"):
        run_bound(session, ["score"], tensors)


def test_bound_outputs_come_in_the_order_asked_for_and_need_not_be_all():
    session = open_session(two_outputs(), "cpu")
    a = np.arange(6, dtype=np.float32).reshape(3, 2).T  # not contiguous, as a slice of a request may be
    product, twice = run_bound(session, ["product", "twice"], {"a": a})
    np.testing.assert_array_equal(product, a @ np.ones((3, 2), np.float32))
    np.testing.assert_array_equal(twice, a * 2)
    assert len(run_bound(session, ["product"], {"a": a})) == 1


def test_bound_runs_of_many_threads_do_not_mix():
    session = open_session(two_outputs(), "cpu")

    def one(number):
        a = np.full((1 + number % 5, 3), number, np.float32)
        twice, product = run_bound(session, ["twice", "product"], {"a": a})
        return len(twice) == len(a) and bool((twice == 2 * number).all() and (product == 3 * number).all())

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(one, range(400)))


def test_the_profile_names_every_tensor_of_numbers_by_its_rows(tmp_path):
    found = profile(two_outputs(text=True), (1, 8, 1024))
    assert found["a"] == ("1x3", "8x3", "1024x3")
    assert "s" not in found and "w" not in found
    path = tmp_path / "model.onnx"
    path.write_bytes(two_outputs(text=True))
    assert gpu_options(path, "tensorrt", (1, 8, 1024)).profile == found
    assert gpu_options(path, "cuda", (1, 8, 1024)).profile == {}


def test_the_settings_choose_the_gpu(monkeypatch, tmp_path):
    for name, value in (("GPU_DEVICE", "2"), ("GPU_MEMORY_MB", "256"), ("CACHE", str(tmp_path))):
        monkeypatch.setenv(f"NORIA_{name}", value)
    path = tmp_path / "model.onnx"
    path.write_bytes(two_outputs())
    assert gpu_options(path, "cuda", (1,)) == GpuOptions(2, 256, tmp_path / "engines", {})
