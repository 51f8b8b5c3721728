"""What a run found: tables with a target beside each figure, on the terminal, as JSON and as Markdown."""

from __future__ import annotations

import math
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import orjson
from rich.console import Console
from rich.table import Table

PACKAGES = ("onnxruntime-gpu", "onnxruntime", "uvicorn", "uvloop", "httptools", "orjson", "numpy")


@dataclass(frozen=True)
class Figure:
    """One claim: a value and what it must reach."""

    what: str
    value: float
    unit: str
    target: float | None = None
    """None: a figure without a target."""
    at_most: bool = False
    """The target is a ceiling, not a floor."""
    note: str = ""
    timed: bool = False
    """Time or memory, which others on the machine can spoil; not a count."""

    @property
    def verdict(self) -> str:
        """PASS, short, `not measured`, or nothing where there is no target."""
        if math.isnan(self.value):
            return "not measured"
        if self.target is None:
            return ""
        return "PASS" if (self.value <= self.target if self.at_most else self.value >= self.target) else "short"

    @property
    def wanted(self) -> str:
        """The target in words."""
        return "" if self.target is None else f"{'at most' if self.at_most else 'at least'} {self.target:g}"


@dataclass
class Section:
    """One case."""

    name: str
    about: str
    columns: Sequence[str] = ()
    rows: list[list[str]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    """Who was not measured, and why."""


def cells(figure: Figure) -> list[str]:
    """A figure as a row."""
    value = (
        "-" if math.isnan(figure.value) else f"{figure.value:,.3g}" if figure.value < 100 else f"{figure.value:,.0f}"
    )
    return [figure.what, f"{value} {figure.unit}".strip(), figure.wanted, figure.verdict, figure.note]


CLAIM = ("figure", "found", "target", "verdict", "note")


def show(section: Section, console: Console) -> None:
    """On the terminal."""
    console.print(f"\n[bold]{section.name}[/]  {section.about}", highlight=False)
    for columns, rows in ((section.columns, section.rows), (CLAIM, [cells(figure) for figure in section.figures])):
        if rows:
            table = Table(box=None, header_style="dim", padding=(0, 2))
            for column in columns:
                table.add_column(column)
            for row in rows:
                style = {"PASS": "green", "short": "red"}.get(row[3], "") if columns is CLAIM else ""
                table.add_row(*row, style=style)
            console.print(table)
    for name, reason in section.absent.items():
        console.print(f"[yellow]{name} was not measured:[/] {reason}", highlight=False)


def machine() -> dict[str, str]:
    """What it was measured on."""
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    found = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "revision": asked.stdout.strip(),
        "load before the run": ", ".join(f"{value:.1f}" for value in os.getloadavg()),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:  # what importlib.metadata raises for a package that is not there
            continue
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def markdown(sections: Sequence[Section], facts: dict[str, str], command: Sequence[str], title: str) -> str:
    """The file for `benchmarks/results/`."""
    lines = [f"# {title}, {facts['date'][:10]}", "", f"    {shlex.join(command)}", ""]
    lines += [f"{name}: {value}  " for name, value in facts.items()]
    for section in sections:
        lines += ["", f"## {section.name}", "", section.about]
        for columns, rows in ((section.columns, section.rows), (CLAIM, [cells(each) for each in section.figures])):
            if rows:
                lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
                lines += [f"| {' | '.join(row)} |" for row in rows]
        lines += ["", *(f"Not measured: **{name}**: {reason}" for name, reason in section.absent.items())]
    return "\n".join(lines).rstrip() + "\n"


def write(
    sections: Sequence[Section],
    facts: dict[str, str],
    command: Sequence[str],
    folder: Path,
    name: str = "serving-peers",
) -> Path:
    """Both files; returns the Markdown's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{facts['date'][:10]}-{name}.md"
    path.write_text(markdown(sections, facts, command, name))
    content = {
        "facts": facts,
        "command": list(command),
        "sections": [
            {**asdict(section), "figures": [{**asdict(each), "verdict": each.verdict} for each in section.figures]}
            for section in sections
        ],
    }
    path.with_suffix(".json").write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))  # NaN becomes null
    return path
