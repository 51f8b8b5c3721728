"""A bundle is whole, unchanged and safe to run, or it does not open."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import orjson
import pyarrow as pa
import pytest
from onnx import TensorProto, helper

from noria.decision import Bands
from noria.errors import BundleError
from noria.runtime import open_session, score
from registry.bundle import Bundle, write
from registry.graph import check_graph
from registry.manifest import ADDED_BY_MLFLOW, MANIFEST, seal
from registry.proof import UNKNOWN, Proof


@pytest.fixture
def folder(tmp_path: Path, make_contents) -> Path:
    write(tmp_path / "bundle", make_contents())
    return tmp_path / "bundle"


def test_opens_as_it_was_written(folder: Path, make_contents) -> None:
    contents, bundle = make_contents(), Bundle.open(folder)
    for part in ("facts", "schema", "bands", "proof", "dataset", "evaluations", "thresholds", "parity"):
        assert getattr(bundle, part) == getattr(contents, part), part
    assert bundle.reference().equals(contents.reference.select(bundle.reference().column_names))
    assert bundle.environment["packages"]["onnx"] == onnx.__version__
    assert len(bundle.environment["lock"]) == 64


def test_a_metric_without_a_value_is_left_out(tmp_path: Path, make_contents) -> None:
    contents = make_contents()
    found = contents.evaluations["candidate"]
    odd = type(found)(found.rows, {**found.metrics, "auc": float("nan")}, {"a": {"error": float("nan"), "rows": 1.0}})
    write(tmp_path, make_contents(evaluations={"candidate": odd}))
    read = Bundle.open(tmp_path).evaluations["candidate"]
    assert "auc" not in read.metrics
    assert read.slices == {"a": {"rows": 1.0}}


@pytest.mark.parametrize("name", ["model.onnx", "noria/schema.json", "noria/reference.parquet"])
def test_refuses_a_changed_file(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(bytes(data))
    with pytest.raises(BundleError, match=f"{name} was changed"):
        Bundle.open(folder)


def test_refuses_a_missing_and_an_extra_file(folder: Path) -> None:
    (folder / "noria/parity.json").rename(folder / "noria/other.json")
    with pytest.raises(BundleError, match=r"missing files: noria/parity\.json"):
        Bundle.open(folder)
    (folder / "noria/other.json").rename(folder / "noria/parity.json")
    (folder / "payload.pkl").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"extra files: payload\.pkl"):
        Bundle.open(folder)


def test_refuses_a_link(folder: Path, tmp_path: Path) -> None:
    (folder / "model.onnx").rename(tmp_path / "elsewhere.onnx")
    (folder / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(BundleError, match="is a link"):
        Bundle.open(folder)


def test_allows_the_file_that_mlflow_adds(folder: Path) -> None:
    (folder / next(iter(ADDED_BY_MLFLOW))).write_text("model_name: trips")
    Bundle.open(folder)


def test_refuses_a_folder_without_a_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    with pytest.raises(BundleError, match="not written to the end"):
        Bundle.open(folder)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"format": "x", "files": {}}', b'{"format": 1, "files": 3}'])
def test_refuses_a_manifest_that_is_none(folder: Path, text: bytes) -> None:
    (folder / MANIFEST).write_bytes(text)
    with pytest.raises(BundleError, match="not readable as a manifest"):
        Bundle.open(folder)


def test_refuses_a_newer_format(folder: Path) -> None:
    data = orjson.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_bytes(orjson.dumps({**data, "format": 99}))
    with pytest.raises(BundleError, match="update noria"):
        Bundle.open(folder)


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"columns": []}', b'{"columns": [{"name": 1}]}'])
def test_a_part_that_does_not_parse_is_a_sentence(folder: Path, text: bytes) -> None:
    (folder / "noria/schema.json").write_bytes(text)
    seal(folder)
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(folder)


def test_refuses_weights_in_another_file(folder: Path, tmp_path: Path, trips_graph: bytes, trips_schema) -> None:
    model = onnx.ModelProto.FromString(trips_graph)
    secret = tmp_path / "secret"
    secret.write_bytes(np.float32(1).tobytes())
    tensor = model.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    seal(folder)
    with pytest.raises(BundleError, match="lies in another file"):
        Bundle.open(folder)


def test_refuses_external_weights_inside_a_nested_graph(trips_graph: bytes, trips_schema) -> None:
    model = onnx.ModelProto.FromString(trips_graph)
    tensor = helper.make_tensor("deep", TensorProto.FLOAT, [], [1.0])
    tensor.data_location = TensorProto.EXTERNAL
    branch = helper.make_graph([], "branch", [], [], [tensor])
    model.graph.node.append(helper.make_node("If", ["absent"], ["unused"], then_branch=branch, else_branch=branch))
    with pytest.raises(BundleError, match="'deep'"):
        check_graph(model.SerializeToString(), trips_schema)


def test_refuses_a_custom_operator(folder: Path, trips_graph: bytes) -> None:
    model = onnx.ModelProto.FromString(trips_graph)
    model.graph.node.append(helper.make_node("Gelu", ["miles"], ["unused"], domain="com.microsoft"))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    seal(folder)
    with pytest.raises(BundleError, match=r"custom operator 'com\.microsoft\.Gelu'"):
        Bundle.open(folder)


def test_refuses_a_graph_that_does_not_fit_the_schema(trips_graph: bytes, trips_schema) -> None:
    for change, sentence in (
        (lambda graph: setattr(graph.input[0], "name", "length"), "'length', which is no column"),
        (
            lambda graph: setattr(graph.input[1].type.tensor_type, "elem_type", TensorProto.FLOAT),
            "'zone'.*another type",
        ),
        (lambda graph: setattr(graph.output[0], "name", "value"), "no output 'score'"),
    ):
        model = onnx.ModelProto.FromString(trips_graph)
        change(model.graph)
        with pytest.raises(BundleError, match=sentence):
            check_graph(model.SerializeToString(), trips_schema)
    with pytest.raises(BundleError, match="not an ONNX model"):
        check_graph(b"not a model", trips_schema)


def test_nothing_is_written_for_an_unsound_model(tmp_path: Path, make_contents) -> None:
    with pytest.raises(BundleError):
        write(tmp_path / "bundle", make_contents(model=b"not a model"))
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(BundleError, match="lacks split"):
        write(tmp_path / "bundle", make_contents(reference=make_contents().reference.drop_columns("split")))
    assert not (tmp_path / "bundle" / MANIFEST).exists()


def test_the_reference_is_thinned_evenly(tmp_path: Path, make_contents, monkeypatch) -> None:
    monkeypatch.setattr("registry.bundle.REFERENCE_ROWS", 100)
    write(tmp_path, make_contents(bands=Bands()))
    rows = Bundle.open(tmp_path).reference()
    everything = make_contents().reference
    assert len(rows) == 100
    assert rows.column("pickup")[0] == everything.column("pickup")[0]
    assert rows.column("pickup")[-1] == everything.column("pickup")[-1]


def test_proof_holds_missing_and_unknown_values_and_finds_a_wrong_graph(
    trips_graph: bytes, trips_schema, trips
) -> None:
    proof = Proof.make(trips_graph, trips_schema, trips)
    assert len(proof.records) == 64
    assert any(record["vendor"] == UNKNOWN for record in proof.records)
    for column in ("distance", "zone", "vendor"):
        assert any(record[column] is None for record in proof.records)
    assert Proof(*(tuple(part) for part in orjson.loads(orjson.dumps((proof.records, proof.scores))))) == proof
    proof.check(open_session(trips_graph), trips_schema)
    model = onnx.ModelProto.FromString(trips_graph)
    encoder = next(node for node in model.graph.node if node.op_type == "LabelEncoder")
    next(entry for entry in encoder.attribute if entry.name == "default_float").f = 2.9
    with pytest.raises(BundleError, match="instead of"):
        proof.check(open_session(model.SerializeToString()), trips_schema)


def test_proof_of_few_or_refused_rows(trips_graph: bytes, trips_schema, trips) -> None:
    few = Proof.make(trips_graph, trips_schema, trips.slice(0, 3))
    assert len(few.records) >= 3
    far = trips.set_column(0, "distance", pa.array(np.full(len(trips), 1000.0)))
    proof = Proof.make(trips_graph, trips_schema, far)
    assert proof.records
    assert len(score(open_session(trips_graph), trips_schema.parse(proof.records))) == len(proof.scores)
