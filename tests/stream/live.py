"""Lives through the ferry's stream on a running stack, week by week as `noria demo` does, and prints the story as JSON.

A process of its own: Prefect reads its address when it is imported. Needs NORIA_HOME and Prefect's variables
(`Site.enter`) in its environment, and this folder on PYTHONPATH.
"""

import json
import sys

from ferry import FIRST, SHIFT, WEEK
from rich.console import Console

import flows.turn
from flows.demo import Stopwatch
from flows.live import LiveView
from flows.site import Site
from flows.turn import Turn
from noria.records import Window

PATH = "ferry:WORKLOAD"
WEEKS = [Window(SHIFT + WEEK * number, SHIFT + WEEK * (number + 1)) for number in range(-2, 3)]
"""Two calm weeks, the week of the shift, and two after it."""


def main() -> None:
    # A busy machine is no failure here.
    flows.turn.PATIENCE = 900.0
    site = Site.here()
    workload = site.workload("ferry")
    records = workload.records(FIRST)
    site.lake(workload).append("records", records, batch=("ingest", int(FIRST.end.timestamp())))
    watch = Stopwatch()
    turn = Turn(site, workload, PATH, watch, label_delay=0)
    with LiveView(Console(stderr=True), "ferry", len(WEEKS), workload.unit) as view:
        turn.first_model(FIRST, view)
        for week in WEEKS:
            turn.week(week, view)
        turn.finish(view)
    answers = [
        {"ids": answered.ids, "versions": answered.versions, "scores": answered.scores}
        for answered in turn.answered.values()
    ]
    json.dump({**turn.story(), "seconds": watch.seconds, "answers": answers}, sys.stdout)
    turn.traffic.close()


if __name__ == "__main__":
    main()
