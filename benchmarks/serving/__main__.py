"""Runs cases and writes what they found.

    python -m benchmarks.serving                       every case, every peer; leave the machine alone
    python -m benchmarks.serving small --peers mosec   one case
    python -m benchmarks.serving --quick               one short round of everything, to see that it runs
    python -m benchmarks.serving --install             only make the peers' environments (3.5 GB)

Not here: what a case measures (`throughput`, `wide`, `overload`, `lifetime`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.serving import lifetime, models, overload, throughput, wide
from benchmarks.serving.contest import Bench
from benchmarks.serving.environments import CACHE, PINS, Unavailable, environment
from benchmarks.serving.peers import PEERS
from benchmarks.serving.report import Section, machine, show, write

CASES = {
    "small": throughput.small,
    "batching": throughput.batching,
    "encodings": throughput.encodings,
    "compute": throughput.compute,
    "rows": wide.rows,
    "predict": wide.predict,
    "overload": overload.overload,
    "flood": overload.flood,
    "start": lifetime.start,
    "memory": lifetime.memory,
    "flat": lifetime.flat,
}

WIDTH = 180
"""Columns of a table that goes to a file."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS), help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--server-core", type=int, default=0, help="-1: pin nothing")
    parser.add_argument("--load-core", type=int, default=1, help="-1: pin nothing")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the peers' environments are")
    parser.add_argument("--out", type=Path, help="folder for the Markdown and the JSON; default: write none")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--install", action="store_true")
    given = parser.parse_args()
    if unknown := set(given.cases) - set(CASES):
        parser.error(f"there is no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    return given


def install(cache: Path, console: Console) -> None:
    """Make every environment; say which cannot be made."""
    for name in PINS:
        try:
            console.print(f"{name}: {environment(name, cache)}", highlight=False)
        except Unavailable as reason:
            console.print(f"[yellow]{name}:[/] {reason}", highlight=False)


def main() -> None:
    """Run what was asked for; a case that cannot run says so, and the others go on."""
    given, console = arguments(), Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    if given.install:
        install(given.cache, console)
        return
    facts, sections = machine(), []
    with tempfile.TemporaryDirectory(prefix="noria-bench-") as folder, console.status("starting") as status:
        models.repository(Path(folder) / "repository")
        bench = Bench(
            Path(folder), 1 if given.quick else given.rounds, 1 if given.quick else given.seconds, tuple(given.peers),
            server_core=None if given.server_core < 0 else given.server_core,
            load_core=None if given.load_core < 0 else given.load_core,
            cache=given.cache, quick=given.quick,
        )  # fmt: skip
        for name in given.cases or CASES:
            bench = Bench(**{**vars(bench), "say": lambda text, name=name: status.update(f"{name}: {text}")})
            try:
                section = CASES[name](bench)
            except Unavailable as reason:
                section = Section(name, "could not run", absent={"noria": str(reason)})
            sections.append(section)
            show(section, console)
            if given.out:  # after each case: an interrupted run keeps what it has
                path = write(sections, facts, ["python", "-m", "benchmarks.serving", *sys.argv[1:]], given.out)
    if given.out:
        console.print(f"written: {path} and its .json", highlight=False)


if __name__ == "__main__":
    main()
