"""Runs the long proofs, prints what was counted, and fails when a target is missed.

    python -m benchmarks.soak                                       100 swaps, 50 kills durable, 50 kills fast
    python -m benchmarks.soak --swaps 3 --kills 2 --counts-only     the short form, for a busy machine

The long form takes about half an hour. Not here: what a swap or a kill proves.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from benchmarks.serving.report import Section, machine, show, write
from benchmarks.soak.kills import kills
from benchmarks.soak.swaps import swaps


def main() -> int:
    """0 when everything that has a target reached it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--swaps", type=int, default=100, help="0: none")
    parser.add_argument("--kills", type=int, default=50, help="in each mode; 0: none")
    parser.add_argument("--rate", type=float, default=300, help="requests a second")
    parser.add_argument("--counts-only", action="store_true", help="show time and memory, but judge counts alone")
    parser.add_argument("--out", type=Path, help="folder for the Markdown and the JSON; default: write none")
    given, console = parser.parse_args(), Console(width=160)
    facts, sections = machine(), []
    for section in _sections(given):
        sections.append(section)
        show(section, console)
        if given.out:
            write(sections, facts, ["python", "-m", "benchmarks.soak", *sys.argv[1:]], given.out, "soak")
    judged = [figure for section in sections for figure in section.figures if not (given.counts_only and figure.timed)]
    short = [figure for figure in judged if figure.verdict in ("short", "not measured")]
    return 1 if short else 0


def _sections(given: argparse.Namespace) -> Iterator[Section]:
    with tempfile.TemporaryDirectory(prefix="noria-soak-") as name:
        folder = Path(name)
        if given.swaps:
            yield swaps(folder / "swaps", given.swaps, given.rate)
        if given.kills:
            yield kills(folder / "durable", given.kills, given.rate, "durable")
            yield kills(folder / "fast", given.kills, given.rate, "fast")


if __name__ == "__main__":
    sys.exit(main())
