"""What an ONNX file must be before anything runs it: inside itself, standard operators, not too large."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from noria.errors import BundleError
from registry import graph
from registry.graph import check_file, check_graph

FLOAT = TensorProto.FLOAT


def model(*nodes, weights=(), sparse=(), functions=(), opsets=()):
    made = helper.make_graph(
        list(nodes) or [helper.make_node("Identity", ["x"], ["y"])],
        "small",
        [helper.make_tensor_value_info("x", FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", FLOAT, ["n"])],
        list(weights),
        sparse_initializer=list(sparse),
    )
    versions = [helper.make_opsetid("", 20), *opsets]
    return helper.make_model(made, opset_imports=versions, functions=list(functions), ir_version=10)


def outside(name="w"):
    """A tensor that says that its values lie in another file."""
    tensor = helper.make_tensor(name, FLOAT, [1], [1.0])
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    return tensor


def inside(name="w", kind=FLOAT):
    return helper.make_tensor(name, kind, [1], [1])


def branch(**more):
    return helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "branch", [], [], **more)


def choose(then):
    return helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=branch())


def function(*nodes, domain="mine", defaults=()):
    made = helper.make_function(domain, "F", ["x"], ["y"], list(nodes), [helper.make_opsetid("", 20)])
    made.attribute_proto.extend(defaults)
    return made


def sparse(values, indices):
    return helper.make_sparse_tensor(values, indices, [4])


ATTRIBUTES = {
    "tensor": lambda: model(helper.make_node("Constant", [], ["y"], value=outside())),
    "list of tensors": lambda: model(helper.make_node("Custom", [], ["y"], values=[outside()])),
    "sparse attribute": lambda: model(
        helper.make_node("Constant", [], ["y"], sparse_value=sparse(outside(), inside("i", TensorProto.INT64)))
    ),
}
OUTSIDE = {
    "weight": lambda: model(weights=[outside()]),
    "sparse weight": lambda: model(sparse=[sparse(outside(), inside("i", TensorProto.INT64))]),
    "its indices": lambda: model(sparse=[sparse(inside(), outside("i"))]),
    "nested weight": lambda: model(choose(branch(initializer=[outside()]))),
    "nested sparse weight": lambda: model(
        choose(branch(sparse_initializer=[sparse(outside(), inside("i", TensorProto.INT64))]))
    ),
    "twice nested": lambda: model(choose(helper.make_graph([choose(branch(initializer=[outside()]))], "b", [], []))),
    "in a function": lambda: model(functions=[function(helper.make_node("Constant", [], ["y"], value=outside()))]),
    "default of a function's attribute": lambda: model(
        functions=[function(defaults=[helper.make_attribute("a", outside())])]
    ),
    "only a location": lambda: model(weights=[_only_location()]),
    **ATTRIBUTES,
}


def _only_location():
    tensor = inside()
    tensor.external_data.add(key="location", value="../secret")
    return tensor


@pytest.mark.parametrize("place", OUTSIDE)
def test_values_in_another_file_are_refused_wherever_they_are_named(tmp_path, place):
    (tmp_path / "model.onnx").write_bytes(OUTSIDE[place]().SerializeToString())
    with pytest.raises(BundleError, match="lies in another file"):
        check_file(tmp_path / "model.onnx")


def test_a_sound_file_passes(tmp_path):
    whole = model(choose(branch(initializer=[inside()])), weights=[inside("v")], functions=[function()])
    (tmp_path / "model.onnx").write_bytes(whole.SerializeToString())
    check_file(tmp_path / "model.onnx")


def test_a_file_that_is_too_large_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.truncate(graph.MOST_BYTES + 1)  # a hole: it takes no room
    monkeypatch.setattr(type(path), "read_bytes", None)
    with pytest.raises(BundleError, match="larger than 2047 MB"):
        check_file(path)


def test_bytes_that_are_too_many_are_refused_unparsed(trips_schema, monkeypatch):
    monkeypatch.setattr(graph, "MOST_BYTES", 100)
    with pytest.raises(BundleError, match="larger than"):
        check_graph(b"x" * 101, trips_schema)


def chain(count):
    return [helper.make_node("Identity", [f"x{number}"], [f"x{number + 1}"]) for number in range(count)]


@pytest.mark.parametrize("place", ["graph", "function", "branch"])
def test_nodes_are_counted_everywhere(tmp_path, monkeypatch, place):
    monkeypatch.setattr(graph, "MOST_NODES", 10)

    def made(count):
        if place == "graph":
            return model(*chain(count))
        if place == "function":
            return model(*chain(5), functions=[function(*chain(count - 5))])
        inner = helper.make_graph(chain(count - 2), "b", [], [])
        return model(choose(inner))  # the If, and the other branch's one node

    path = tmp_path / "model.onnx"
    path.write_bytes(made(10).SerializeToString())
    check_file(path)
    path.write_bytes(made(11).SerializeToString())
    with pytest.raises(BundleError, match="more than 10 nodes"):
        check_file(path)


def test_functions_of_the_file_itself_are_no_custom_operators(tmp_path):
    path, node = tmp_path / "model.onnx", helper.make_node("F", ["x"], ["y"], domain="mine")
    path.write_bytes(model(node, functions=[function()], opsets=[helper.make_opsetid("mine", 1)]).SerializeToString())
    check_file(path)
    path.write_bytes(model(node, opsets=[helper.make_opsetid("mine", 1)]).SerializeToString())
    with pytest.raises(BundleError, match=r"custom operator 'mine\.F'"):
        check_file(path)
    hidden = helper.make_node("G", ["x"], ["y"], domain="com.microsoft")
    for inner in (model(functions=[function(hidden)]), model(choose(helper.make_graph([hidden], "b", [], [])))):
        path.write_bytes(inner.SerializeToString())
        with pytest.raises(BundleError, match=r"custom operator 'com\.microsoft\.G'"):
            check_file(path)


@pytest.mark.parametrize("content", [b"not a model", b"\x00", b"\xff" * 100])
def test_what_is_no_model_is_said(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(BundleError, match="not an ONNX model"):
        check_file(tmp_path / "model.onnx")


def test_nesting_without_end_is_a_sentence(tmp_path):
    inner = onnx.GraphProto()
    for _ in range(500):
        outer = onnx.GraphProto()
        outer.node.append(helper.make_node("If", ["c"], ["y"]))
        outer.node[0].attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g.CopyFrom(inner)
        inner = outer
    whole = onnx.ModelProto(ir_version=10)
    whole.graph.CopyFrom(inner)
    (tmp_path / "model.onnx").write_bytes(whole.SerializeToString())
    with pytest.raises(BundleError):
        check_file(tmp_path / "model.onnx")
