"""int8: the decision is pure and tested as such; quantization itself runs for real on a small trained network."""

from dataclasses import replace

import numpy as np
import onnx
import pytest

from noria.options import TrainingOptions
from noria.runtime import open_session, score
from registry.bundle import write
from registry.graph import check_graph
from registry.proof import Proof
from serving.model import load
from training import loop, preprocess, quantize
from training.boundary import strewn
from training.data import prepare
from training.export import export
from training.quantize import Evidence, choose, decide, figures

OPTIONS = TrainingOptions(quantize="auto")
GOOD = Evidence(3, {1: 1.2, 1024: 1.6}, 3.0, 3.01, 0.05, 0.0, True)
ANYTHING = {"quantize_gain": -0.99, "quantize_loss": 10.0}
"""Options under which whatever is measured is good enough."""


def test_faster_and_as_good_is_taken_and_says_by_how_much():
    choice = decide(GOOD, OPTIONS)
    assert choice.taken
    text = " ".join(choice.reasons)
    assert "At 1 row int8 runs at 1.20 times" in text and "At 1,024 rows int8 runs at 1.60 times" in text
    assert "from 3 to 3.01 (+0.33%)" in text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"speedups": {1: 0.98, 1024: 1.6}}, "At 1 row int8 runs at 0.98 times the float speed; 1.05 times"),
        ({"speedups": {1: 1.2, 1024: 1.04}}, "At 1,024 rows int8 runs at 1.04 times"),
        ({"int8_error": 3.02}, r"\(\+0.67%\); at most \+0.50%"),
        ({"int8_error": float("nan")}, "at most"),
        ({"batch_difference": 1.5}, "disturb each other"),
        ({"batch_difference": float("nan")}, "disturb each other"),
        ({"finite": False}, "not a number"),
        ({"products": 0}, "no matrix product"),
        ({"error": 0.0}, r"\+100.00%"),
    ],
)
def test_each_thing_alone_refuses_it(change, reason):
    choice = decide(replace(GOOD, **change), OPTIONS)
    assert not choice.taken
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(" ".join(choice.reasons))


def test_a_better_int8_graph_is_no_loss_and_the_limits_are_the_options():
    assert decide(replace(GOOD, int8_error=2.9), OPTIONS).taken
    assert decide(replace(GOOD, int8_error=3.02), replace(OPTIONS, quantize_loss=0.01)).taken
    assert not decide(GOOD, replace(OPTIONS, quantize_gain=0.3)).taken


@pytest.fixture(scope="module")
def exported(parcels, sent_parcels):
    """A network of the tiny workload, trained for two epochs, as a graph; with its data."""
    prepared = prepare(sent_parcels(), parcels)
    made = preprocess.fit(parcels.schema, prepared.split.train, parcels.training)
    parts = {
        name: loop.Part(made.run(parcels.schema.tensors(rows)), rows.column("hours").to_numpy())
        for name, rows in prepared.split
    }
    options = replace(parcels.training, epochs=2)
    job = loop.Job(made.inputs, parcels.network, options, parcels.loss, "exp", 1.5, 0.6)
    weights, _ = loop.train(job, parts)
    return prepared, export(replace(job, weights=weights).build(), made)


class Wish:
    """The workload with other options."""

    def __init__(self, workload, **options):
        self._workload, self.training = workload, replace(workload.training, quantize="auto", **options)

    def __getattr__(self, name):
        return getattr(self._workload, name)


def test_the_int8_graph_is_smaller_standard_and_near_the_float_one(exported, parcels):
    prepared, model = exported
    raw = parcels.schema.tensors(prepared.split.train)
    made, products = quantize.quantize(model, strewn(parcels.schema, raw, 2000))
    check_graph(made, parcels.schema)
    operators = {node.op_type for node in onnx.ModelProto.FromString(made).graph.node}
    assert products == 2 and {"QuantizeLinear", "DequantizeLinear"} <= operators
    assert "DynamicQuantizeLinear" not in operators
    assert not onnx.ModelProto.FromString(made).metadata_props
    test = parcels.schema.tensors(prepared.split.test)
    exact, rounded = score(open_session(model), test), score(open_session(made), test)
    assert 0 < np.abs(rounded / exact - 1).max() < 0.2
    assert np.abs(rounded / exact - 1).mean() < 0.03


def test_rows_of_a_batch_do_not_disturb_each_other_in_it(exported, parcels):
    """What rules dynamic quantization out: there a row's score depends on the largest value of its batch."""
    prepared, model = exported
    made, _ = quantize.quantize(model, parcels.schema.tensors(prepared.split.train))
    raw = parcels.schema.tensors(prepared.split.test)
    session = open_session(made)
    alone = score(session, raw, batch=1)
    wild = {name: values.copy() for name, values in raw.items()}
    wild["weight"][1:] = 1e6
    among = score(session, wild)
    assert np.isclose(alone[0], among[0], rtol=1e-6)
    assert not np.allclose(alone, among)


def test_it_ships_where_the_measured_evidence_is_good_enough_and_its_bundle_is_served(
    exported, parcels, make_contents, tmp_path
):
    prepared, model = exported
    wish = Wish(parcels, **ANYTHING)
    shipped, report = choose(wish, prepared, model)
    assert report["taken"] and shipped != model and len(shipped) == report["model_bytes"]
    assert set(report["speedups"]) == {"1", "1024"} and all(value > 0 for value in report["speedups"].values())
    assert set(figures(report)) == {"int8/speedup_1", "int8/speedup_1024", "int8/error", "int8/float_error"}
    proof = Proof.make(shipped, parcels.schema, prepared.split.test)
    reference = prepared.split.test
    for name, values in (("score", [1.0] * len(reference)), ("split", ["test"] * len(reference))):
        reference = reference.append_column(name, [values])
    contents = make_contents()
    facts = replace(contents.facts, name="parcels", log_target=True)
    changed = {"model": shipped, "facts": facts, "schema": parcels.schema, "proof": proof, "reference": reference}
    write(tmp_path / "bundle", replace(contents, **changed, parity={"int8": report}))
    loaded = load("parcels", 1, tmp_path / "bundle", "cpu")
    assert loaded.most_rows == 1024 and loaded.bundle.parity["int8"]["taken"]


def test_the_float_graph_ships_where_int8_is_slower_and_worse_than_asked_for(exported, parcels):
    """That each of the two alone is enough is tested above, on `decide`; this measures once."""
    prepared, model = exported
    shipped, report = choose(Wish(parcels, quantize_gain=1e3, quantize_loss=-1.0), prepared, model)
    assert shipped == model and not report["taken"]
    slower, worse = report["reasons"][0], report["reasons"][-1]
    assert "times the float speed" in slower and "allowed" in worse
