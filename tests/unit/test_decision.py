"""Scores to actions."""

import numpy as np
import pytest

from noria.decision import Band, Bands
from noria.errors import WorkloadError

MAIL = Bands((Band("spam", 0.9), Band("review", 0.5)), otherwise="inbox")


def test_limits_belong_to_the_lower_band():
    scores = np.array([0.0, 0.5, 0.5001, 0.9, 0.9001, 1.0])
    assert MAIL.actions(scores) == ["inbox", "inbox", "review", "review", "spam", "spam"]


def test_nan_is_in_no_band():
    assert MAIL.actions(np.array([np.nan])) == ["inbox"]


def test_without_bands_there_is_no_action():
    assert Bands().actions(np.array([0.1, 0.9])) == [None, None]


def test_no_scores_no_actions():
    assert MAIL.actions(np.array([])) == []


@pytest.mark.parametrize("limits", [(0.5, 0.9), (0.5, 0.5)])
def test_unordered_bands_are_refused(limits):
    with pytest.raises(WorkloadError, match="ordered"):
        Bands(tuple(Band(f"b{limit}", limit) for limit in limits), otherwise="rest")


def test_bands_need_an_otherwise():
    with pytest.raises(WorkloadError, match="otherwise"):
        Bands((Band("spam", 0.9),))


@pytest.mark.parametrize("bands", [MAIL, Bands()])
def test_json_reads_back_equal(bands):
    assert Bands.from_json(bands.to_json()) == bands
