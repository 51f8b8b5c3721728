"""The last stage of `noria check`: real tiny fits, of sound workloads and of networks broken in one way each."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from flows.new import write_workload
from noria.check import check
from noria.records import moment
from noria.settings import load_settings
from noria.workload import load
from training.model import TabularNet
from training.trial import trial
from workloads.spam import MAILS
from workloads.taxi import TRIPS

NOW = moment("2026-03-02")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The workload that `noria new` writes, as a class to subclass."""
    folder = tmp_path_factory.mktemp("new")
    write_workload("fresh_sales", folder)
    sys.path.insert(0, str(folder))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield type(load("fresh_sales:WORKLOAD"))
    torch.set_num_threads(threads)
    sys.path.remove(str(folder))
    sys.modules.pop("fresh_sales", None)


def test_the_starting_point_trains(sound):
    assert check("fresh_sales:WORKLOAD", trial, now=NOW) == []


@pytest.mark.parametrize(("name", "file"), [("taxi", TRIPS), ("spam", MAILS)])
def test_the_shipped_workloads_train(name, file):
    path = load_settings().downloads / file
    if not path.is_file():
        pytest.skip(f"{path} is not there; `noria check workloads.{name}:WORKLOAD` downloads it")
    assert check(f"workloads.{name}:WORKLOAD", trial, now=NOW) == []


class Unseeded(TabularNet):
    """Draws from a source that no seed reaches."""

    def __init__(self, inputs, options):
        super().__init__(inputs, options)
        for parameter in self.parameters():
            parameter.data += torch.from_numpy(np.random.default_rng().normal(0, 0.01, parameter.shape)).float()


class Unexportable(TabularNet):
    """Decides in Python on values that are only known when it runs."""

    def forward(self, *tensors):
        result = super().forward(*tensors)
        return result if result.sum().item() > 0 else result * 2


class Mixing(TabularNet):
    """A statistic over the batch, in use as well as in training."""

    def forward(self, *tensors):
        result = super().forward(*tensors)
        return result - 0.5 * result.mean()


class Exploding(TabularNet):
    """Not finite where the amount is missing."""

    def __init__(self, inputs, options):
        super().__init__(inputs, options)
        self.at = [entry.kind for entry in inputs].index("number")

    def forward(self, *tensors):
        return super().forward(*tensors) + 0.0 * torch.log(1.0 - tensors[self.at][:, 2]) / (
            1.0 - tensors[self.at][:, 2]
        )


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        ("Unseeded", "Two trainings with one seed differ"),
        ("Unexportable", "cannot be exported"),
        ("Mixing", "A batch of 1 gives another score"),
        ("Exploding", "not finite"),
        ("NoSuchThing", "has no 'NoSuchThing'"),
    ],
)
def test_the_trained_model_is_checked(network, sentence, sound, monkeypatch):
    monkeypatch.setitem(sys.modules, "broken_networks", sys.modules[__name__])
    options = replace(sound.training, mask=0.0)
    changes = {"__qualname__": "Changed", "network": f"broken_networks:{network}", "training": options}
    changed = type("Changed", (sound,), {"__module__": __name__, **changes})
    monkeypatch.setattr(sys.modules[__name__], "Changed", changed, raising=False)
    findings = "\n".join(map(str, check(changed(), trial, now=NOW)))
    assert sentence in findings, findings
