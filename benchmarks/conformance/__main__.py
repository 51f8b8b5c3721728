"""Ask a server of the Open Inference Protocol v2 every question of the suite, and print what it did.

    python -m benchmarks.conformance --write-repository models       the models that the server must hold
    python -m benchmarks.conformance http://127.0.0.1:8000 --grpc 127.0.0.1:8001

The exit code is 1 when a case fails. What the specification leaves open is shown and fails nothing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.conformance import about, requests, values
from benchmarks.conformance.suite import Outcome, run
from benchmarks.conformance.wire import Server


def main() -> int:
    """The command; returns the exit code."""
    given = _arguments()
    if given.write_repository:
        # Only here is the onnx package needed.
        names = importlib.import_module("benchmarks.conformance.repository").write(given.write_repository)
        print(f"{len(names)} models are in {given.write_repository}.")
        return 0
    cases = [*about.cases(), *values.cases(), *requests.cases()]
    if given.grpc:
        cases += importlib.import_module("benchmarks.conformance.rpc").cases()
    with Server(given.url, given.grpc) as server:
        outcomes = run(cases, server)
    show(outcomes, given.verbose)
    return int(any(outcome.result == "fail" for outcome in outcomes))


def show(outcomes: list[Outcome], verbose: bool = False) -> None:
    """The pass table, and every case that did not pass."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table("group", "cases", "pass", "fail", "open", title="Open Inference Protocol v2")
    groups = dict.fromkeys(outcome.case.group for outcome in outcomes)
    counts = {group: Counter(one.result for one in outcomes if one.case.group == group) for group in groups}
    for group, count in [*counts.items(), ("all", Counter(one.result for one in outcomes))]:
        table.add_row(group, str(count.total()), *(str(count[result]) for result in ("pass", "fail", "open")))
    console.print(table)
    for outcome in outcomes:
        if verbose or outcome.result != "pass":
            note = escape(f"{outcome.case.group}: {outcome.case.title}. {outcome.note}".strip())
            console.print(f"{outcome.result:5} {note}", highlight=False)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conformance", description=__doc__)
    parser.add_argument("url", nargs="?", help="address of the server, such as http://127.0.0.1:8000")
    parser.add_argument("--grpc", help="HOST:PORT of its gRPC service; without it those cases are left out")
    parser.add_argument("--write-repository", type=Path, metavar="DIR", help="write the models and end")
    parser.add_argument("--verbose", action="store_true", help="show the cases that pass, too")
    given = parser.parse_args()
    if not given.url and not given.write_repository:
        parser.error("name the server's URL, or --write-repository DIR")
    return given


if __name__ == "__main__":
    sys.exit(main())
