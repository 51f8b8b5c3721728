"""`noria demo`: live through the taxi stream week by week on a virtual clock, through the real parts.

Nothing here decides or predicts: trips go to the HTTP endpoint, truths come back as feedback, the `watch` flow judges,
its event makes Prefect run `retrain`, the server follows the alias. The one extra is the first champion's bundle kept
aside, to know what a model that is never retrained would have said.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console

from flows.live import LiveView
from flows.memory import PeakMemory
from flows.site import Site, read_state
from flows.stack import down, up
from flows.story import summarise, write_story
from noria.errors import NoriaError
from noria.records import Window, moment
from noria.settings import Settings
from noria.workload import Workload, load

STREAM = "workloads.taxi:WORKLOAD"
FIRST = Window(moment("2018-01-01"), moment("2018-07-01"))
"""What the first model learns from."""
WEEK = timedelta(weeks=1)
TRICKLE = 0.1
"""Seconds between requests while a retrain goes on."""
MARKER = "made-by-noria-demo"


class Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's wall time to a stage."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun


def run_demo(site: Site, console: Console, *, start: str, end: str, label_delay: int, report: Path, keep: bool) -> None:
    """The main job; see the module. Raises NoriaError when a part does not do its work."""
    weeks = weeks_between(start, end)
    site = fresh_home(site)
    watch = Stopwatch()
    console.print(
        f"[bold]noria demo[/]: taxi trips, {len(weeks)} weeks from {start} to {end}; "
        f"everything under {site.settings.root}"
    )
    begun = time.perf_counter()
    try:
        with console.status("starting the stack and fetching the data") as status, watch.stage("start"):
            workload, site = _start(site, lambda sentence: status.update(sentence))
        memory = PeakMemory([os.getpid(), int(read_state(site.settings.root)["pid"])])
        memory.start()
        # Prefect reads its address from the environment when it is imported, so this comes after the stack is up.
        from flows.turn import Turn  # noqa: PLC0415

        turn = Turn(site, workload, STREAM, watch, label_delay=label_delay)
        with LiveView(console, f"{workload.name}: error per week", len(weeks), workload.unit) as view:
            turn.first_model(FIRST, view)
            for week in weeks:
                turn.week(week, view)
            turn.finish(view)
        watch.seconds["total"] = time.perf_counter() - begun
        story = {**turn.story(), "seconds": watch.seconds, "peak_memory_bytes": memory.stop()}
        page = write_story(story, report)
        tell(console, story, page)
    finally:
        if not keep:
            with console.status("stopping the stack"):
                down(site)
    if keep:
        console.print(
            f"the stack stays up; stop it with [bold]NORIA_HOME={site.settings.root} noria down[/]", highlight=False
        )


def weeks_between(start: str, end: str) -> list[Window]:
    """Whole weeks, Monday to Sunday, from the one that holds `start` to the one that holds `end`."""
    try:
        first, last = moment(start), moment(end)
    except ValueError:
        raise NoriaError(f"--from and --to take dates such as 2019-12-02, not '{start}' and '{end}'.") from None
    first -= timedelta(days=first.weekday())
    if not FIRST.end <= first <= last:
        raise NoriaError(f"--from must lie after {FIRST.end:%Y-%m-%d} and before --to; got {start} and {end}.")
    return [Window(first + WEEK * index, first + WEEK * (index + 1)) for index in range((last - first).days // 7 + 1)]


def fresh_home(site: Site) -> Site:
    """A home of the demo's own below the site's; an earlier demo's is replaced, nothing else is ever deleted."""
    home = site.settings.root / "demo"
    if home.exists():
        if not (home / MARKER).exists():
            raise NoriaError(f"{home} exists and was not made by `noria demo`; move it away or set NORIA_HOME.")
        down(Site(site.settings.model_copy(update={"home": home})))
        shutil.rmtree(home)
    home.mkdir(parents=True)
    (home / MARKER).touch()
    elsewhere = {"mlflow_uri": "", "prefect_url": "", "ray_address": "", "serving_url": ""}
    own = {"home": home, "workloads": STREAM, "ingest": False, **elsewhere}
    return Site(Settings(**{**site.settings.model_dump(), **own}))


def _start(site: Site, say: Callable[[str], None]) -> tuple[Workload, Site]:
    """The stack, the source data and the slow imports, at the same time."""
    failures: list[NoriaError] = []
    notes = [""]
    workload = load(STREAM)

    def prepare() -> None:
        try:
            workload.prepare(notes.append)
            lake = site.lake(workload)
            lake.append("records", workload.records(FIRST), batch=("ingest", int(FIRST.end.timestamp())))
        except NoriaError as error:
            failures.append(error)

    fetching = threading.Thread(target=prepare, name="prepare")
    fetching.start()
    try:
        site = up(site, tell=lambda ready: say(f"{_missing(ready)}; {notes[-1]}".strip("; ")))
    finally:
        fetching.join()
    if failures:
        raise failures[0]
    site.enter()
    return workload, site


def _missing(ready: dict[str, bool]) -> str:
    return "starting " + (", ".join(name for name, done in ready.items() if not done) or "the stack")


def tell(console: Console, story: dict[str, Any], page: Path) -> None:
    """The end of the story in the terminal."""
    facts, requests = summarise(story), story["requests"]

    def say(line: str) -> None:
        console.print(line, highlight=False)

    console.print()
    if facts["after"]:
        ratio = facts["loop_after"] / facts["frozen_after"]
        say(
            f"since {facts['after']}: error [bold]{facts['loop_after']:.2f}[/] {story['unit']} with noria, "
            f"{facts['frozen_after']:.2f} without: [bold]{ratio:.2f} times[/]"
        )
    for retrain in story["retrains"]:
        say(f"  {retrain['requested'][:10]} {retrain['verdict']:>8}: {retrain['reason']}")
    style = "green" if not requests["failed"] else "bold red"
    say(
        f"requests: {requests['sent']:,} sent, [{style}]{requests['failed']} failed[/]; "
        f"{story['predictions_logged']:,} predictions logged, {story['labels_joined']:,} labels joined"
    )
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in story["seconds"].items())
    say(f"seconds: {stages}; peak memory {story['peak_memory_bytes'] / 2**30:.1f} GiB")
    say(f"the story: [bold]{page}[/]")
    for name, url in story["addresses"].items():
        say(f"  {name:>10}  {url}")
