"""The shadow: one process that scores copies of answered requests with the challengers. Nobody waits for it.

    python -m serving.shadow --folder .noria/serving

Started by `serving.shadowing`, below every other process of the machine: it yields the processor to all of them, has
its own limit of memory, and is the first to be killed when memory runs out. Raw inputs come from segments of the
prediction log; its answers go back as segments of their own, for the table `shadow` of the lake, and to nobody else.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import orjson
import pyarrow as pa

from noria.errors import BundleError
from serving import shadow_state
from serving.drain import Ready
from serving.entries import FLAGS
from serving.families import SHORT_SECONDS, spread
from serving.feed import Feed
from serving.model import Model, load
from serving.segment import read
from serving.shadow_scores import Answers, chosen, score
from serving.shadow_state import Ask, Reached

IDLE_SECONDS, LONGER_SECONDS = 0.1, 5.0
MOST_MEMORY = 4 * 2**30
"""Bytes of its own that the process may hold, all challengers together."""
GRACE_SECONDS = 3
MOST_WRITERS = 256
"""Writers whose last segment is remembered; only those of the last few can come again."""

logger = logging.getLogger(__name__)


@dataclass
class Challenger:
    """A loaded challenger and what it was asked to do."""

    ask: Ask
    model: Model


class Shadow:
    """Follows what is asked, and scores what waits."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ready = folder / "shadow", folder / "log" / "ready"
        self.feed = Feed(self.folder)
        self.stopping = threading.Event()
        self._loaded: dict[str, Challenger] = {}
        self._reached: dict[str, Reached] = {}
        self._begun = False

    def step(self) -> bool:
        """Follow the asks, then score one waiting segment of each workload; returns whether there was one."""
        self.beat()
        if not self._begun:
            self._begin()
        self._follow(shadow_state.read(self.folder / "asked.json", Ask))
        worked = False
        for workload, challenger in self._loaded.items():
            path = None if self.stopping.is_set() else self.feed.take(workload)
            if path is not None:
                worked = True
                self._shadow(workload, challenger, path)
        return worked

    def beat(self) -> None:
        """Tell the parent that this process gets on."""
        (self.folder / "alive").touch()

    def _begin(self) -> None:
        """Go on from where the process before this one came to. In a step, for what fails is tried again there."""
        self._reached = shadow_state.read(self.folder / "state.json", Reached)
        shutil.rmtree(self.folder / "writing", ignore_errors=True)
        (self.folder / "writing").mkdir()
        self._begun = True

    def _follow(self, asks: dict[str, Ask]) -> None:
        for workload in set(self._loaded) - set(asks):
            del self._loaded[workload]
        for workload, ask in asks.items():
            loaded = self._loaded.get(workload)
            if loaded is not None and loaded.ask.asked == ask.asked:
                loaded.ask = ask  # its share may have changed
                continue
            reached = self._reached.get(workload)
            if reached is None or reached.asked != ask.asked or reached.status != "failed":
                self._load(workload, ask)

    def _load(self, workload: str, ask: Ask) -> None:
        self._loaded.pop(workload, None)
        before = self._reached.get(workload)
        if before is None or before.asked != ask.asked:
            before = Reached(ask.version, ask.asked, "loading")
        self._keep(workload, replace(before, status="loading"))
        try:
            model = load(workload, ask.version, Path(ask.folder), "cpu")
        except (BundleError, MemoryError) as error:
            reason = str(error) or "It needs more memory than a shadow may have."
            self._keep(workload, replace(before, status="failed", reason=reason, since=shadow_state.now()))
            return
        self._loaded[workload] = Challenger(ask, model)
        self._keep(workload, replace(before, status="shadowing", since=before.since or shadow_state.now()))

    def _shadow(self, workload: str, challenger: Challenger, path: Path) -> None:
        """Score a segment, hand the answers over, and be done with it. Killed in between, the next process repeats it,
        and the lake knows the repetition by its name, as the counts do; so, too, where the drain was killed and offers
        it once more."""
        segment, before = Ready.parse(path), self._reached[workload]
        if segment.number <= before.last.get(segment.source, -1):
            path.unlink(missing_ok=True)
            return
        answers = self._score(challenger, path)
        if answers is None:
            return  # told to end: the segment stays taken
        self._hand_over(challenger, segment, answers)
        self._keep(
            workload,
            replace(
                before,
                rows=before.rows + len(answers),
                agreed=before.agreed + answers.agreed,
                difference=before.difference + answers.difference,
                errors=before.errors + answers.errors,
                error=answers.error or before.error,
                runs=_counted(before.runs, answers.seconds),
                last=_newest(before.last, segment),
            ),
        )
        path.unlink(missing_ok=True)

    def _score(self, challenger: Challenger, path: Path) -> Answers | None:
        answers = Answers()
        try:
            tables, _ = read(path.read_bytes())
        except FileNotFoundError:
            return answers  # no longer wanted, at this moment
        except (ValueError, KeyError, TypeError, OverflowError, pa.ArrowException):
            return answers  # the drain keeps a damaged segment, and says so
        if "predictions" not in tables or "score" not in tables["predictions"].column_names:
            return answers  # rows of a plain model have no score
        rows = chosen(tables["predictions"], challenger.ask.share, challenger.model.version)
        for _ in score(challenger.model, rows, answers):
            self.beat()
            if self.stopping.is_set():
                return None
        return answers

    def _hand_over(self, challenger: Challenger, segment: Ready, answers: Answers) -> None:
        if not len(answers):
            return
        version = challenger.model.version
        source = f"shadow-{version}-{segment.source}"
        aside = self.folder / "writing" / f"{segment.workload}.{source}.{segment.number:09d}.{len(answers)}"
        aside.write_bytes(orjson.dumps(answers.line(version), option=FLAGS))
        aside.rename(self.ready / aside.name)

    def _keep(self, workload: str, reached: Reached) -> None:
        self._reached[workload] = reached
        shadow_state.write(self.folder / "state.json", self._reached)


def _counted(runs: Sequence[float], seconds: Sequence[float]) -> list[float]:
    held = list(runs) or [0.0] * (len(SHORT_SECONDS) + 2)
    if seconds:
        spread(held, SHORT_SECONDS, seconds)
    return held


def _newest(last: Mapping[str, int], segment: Ready) -> dict[str, int]:
    others = [(source, number) for source, number in last.items() if source != segment.source]
    return dict([*others[1 - MOST_WRITERS :], (segment.source, segment.number)])


def yield_to_all() -> None:
    """Put this process below every other one; what the system refuses is left as it is."""
    os.nice(19)
    files = {"/proc/self/oom_score_adj": "1000"}
    if os.getsid(0) == os.getpid():
        # Where sessions are scheduled as groups, niceness counts within a session only: lower that, too, if it is ours.
        files["/proc/self/autogroup"] = "19"
    for path, value in files.items():
        with suppress(OSError):
            Path(path).write_text(value)
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))


def _end_with_parent(shadow: Shadow) -> None:
    """Standard input ends when the parent does, however it ended."""
    while os.read(0, 1024):
        pass
    shadow.stopping.set()
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def main() -> None:
    """The process's entry point."""
    parser = argparse.ArgumentParser(description="Scores copies of requests with the challengers; see `noria serve`.")
    parser.add_argument("--folder", type=Path, required=True, help="the server's state")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    yield_to_all()
    with (given.folder / "shadow" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the process of a parent that was killed may not have ended yet
        _run(Shadow(given.folder))


def _run(shadow: Shadow) -> None:
    signal.signal(signal.SIGTERM, lambda *_: shadow.stopping.set())
    signal.signal(signal.SIGINT, lambda *_: None)
    threading.Thread(target=_end_with_parent, args=(shadow,), daemon=True).start()
    while not shadow.stopping.is_set():
        try:
            worked = shadow.step()
        except OSError:  # no space is left, for example: what was taken is taken again
            logger.exception("A step of the shadow failed; it is tried again.")
            worked = False
            shadow.stopping.wait(LONGER_SECONDS)
        if not worked:
            shadow.stopping.wait(IDLE_SECONDS)


if __name__ == "__main__":
    main()
