"""Swaps under load: a new version's folder appears in the repository again and again; every request is counted.

Each version has weights of its own, so an answer that names a version and carries another one's scores is found. Not
here: the load (`benchmarks.soak.traffic`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import orjson

from benchmarks.serving import bodies, models, subject
from benchmarks.serving.bodies import Answered
from benchmarks.serving.processes import Served, free_port
from benchmarks.serving.report import Figure, Section
from benchmarks.soak.traffic import Kept, Traffic

NAME = "small"
WARM = 10.0
"""Seconds of load before and after: until every process of the server has done what it does again and again."""
CALM = 1.0
"""Seconds of load before each swap, and after it until the old process has surely ended."""
LIMIT = 60.0
MEGABYTE = 2**20


@dataclass
class Windows:
    """When there was a swap, and when there was none."""

    calm: list[tuple[float, float]] = field(default_factory=list)
    swapping: list[tuple[float, float]] = field(default_factory=list)


def swaps(folder: Path, count: int, rate: float) -> Section:
    """Serve version 1, then deploy `count` more, one after the other."""
    aside, scores = _prepare(folder, 1)
    rows, expected, home = models.rows_of(NAME, 1), {1: scores}, folder / "repository" / NAME
    home.mkdir(parents=True)
    aside.rename(home / "1")
    with subject.plain(folder / "repository", folder / "home", free_port(), core=None) as served:
        body, windows, taken = bodies.V2.write(rows), Windows(), []
        with Traffic(served.port, subject.infer_path(NAME), body.content, rate=rate) as traffic:
            time.sleep(WARM)
            before = _resident(served)
            for version in range(2, count + 2):
                aside, expected[version] = _prepare(folder, version)
                windows.calm.append(_wait(CALM))
                began = time.monotonic()
                aside.rename(home / str(version))
                taken.append(_until(traffic, version) - began)
                windows.swapping.append((began, _wait(CALM)[1]))
            time.sleep(WARM)
            after = _resident(served)
    section = Section("swaps", f"{count} swaps at {rate:g} requests/s over {traffic.clients} connections")
    section.figures = [
        *_answers(traffic, expected), *_latencies(traffic.answers, windows),
        Figure("slowest swap, folder to first answer", max(taken), "s"),
        Figure("resident memory after by before", after / before, "x", 1.05, at_most=True, timed=True,
               note=f"{before / MEGABYTE:.0f} MB before, {after / MEGABYTE:.0f} MB after"),
    ]  # fmt: skip
    return section


def _prepare(folder: Path, version: int) -> tuple[Path, np.ndarray]:
    """Write a version aside, before anything is measured; returns where, and its scores of the row that is asked."""
    aside = folder / f"aside-{version}"
    aside.mkdir(parents=True)
    (aside / "model.onnx").write_bytes(models.perceptron(models.SIZES[NAME], seed=version))
    return aside, models.expected(aside / "model.onnx", models.rows_of(NAME, 1))


def _wait(seconds: float) -> tuple[float, float]:
    began = time.monotonic()
    time.sleep(seconds)
    return began, time.monotonic()


def _until(traffic: Traffic, version: int) -> float:
    """When the first answer of a version came. Raises TimeoutError."""
    deadline, looked = time.monotonic() + LIMIT, len(traffic.answers)
    while time.monotonic() < deadline:
        found = len(traffic.answers)
        for kept in traffic.answers[looked:found]:
            if version_of(kept.content) == version:
                return kept.at
        looked = found
        time.sleep(0.02)
    raise TimeoutError(f"Version {version} did not answer within {LIMIT:g} s of its folder's appearance.")


def version_of(content: bytes) -> int | None:
    """The version that an answer names; None when it names none."""
    try:
        return int(orjson.loads(content)["model_version"])
    except (ValueError, KeyError, TypeError):
        return None


def _resident(served: Served) -> int:
    return sum(served.memory())


def _answers(traffic: Traffic, expected: dict[int, np.ndarray]) -> list[Figure]:
    wrong = [complaint for kept in traffic.answers if (complaint := judge(kept, expected))]
    failed = len(traffic.failures) + len(wrong)
    note = "; ".join([what for _, what in traffic.failures[:2]] + wrong[:2])
    return [
        Figure("requests", len(traffic.answers) + len(traffic.failures), ""),
        Figure("failed, refused or wrong", failed, "", 0, at_most=True, note=note),
    ]


def judge(kept: Kept, expected: dict[int, np.ndarray]) -> str:
    """What is wrong with an answer; empty when it is the scores of the version that it names."""
    version = version_of(kept.content)
    if kept.status == 200 and version not in expected:
        return f"it names version {version}"
    return bodies.wrong(bodies.V2, Answered(kept.status, {}, kept.content), expected.get(version or 0, np.zeros(0)))


def _latencies(answers: Sequence[Kept], windows: Windows) -> list[Figure]:
    calm, swapping = p99_within(answers, windows.calm), p99_within(answers, windows.swapping)
    note = f"{calm:.2f} ms before, {swapping:.2f} ms during"
    return [Figure("p99 during swaps by before", swapping / calm, "x", 2.0, at_most=True, note=note, timed=True)]


def p99_within(answers: Sequence[Kept], windows: Sequence[tuple[float, float]]) -> float:
    """Milliseconds, over the answers to requests that were under way in any of the windows; NaN without one."""
    found = [
        kept.seconds
        for kept in answers
        if any(kept.at >= first and kept.at - kept.seconds <= last for first, last in windows)
    ]
    return float(np.percentile(np.array(found) * 1000, 99)) if found else float("nan")
