"""The story of a run: one JSON, and the HTML page and picture made from it and from nothing else."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure

Story = dict[str, Any]
FROZEN, LOOP, ALARM, PROMOTED, REFUSED = "#9a6a3a", "#0b6e99", "#c0392b", "#2e8b57", "#777777"


def write_story(story: Story, folder: Path) -> Path:
    """Write `report.json`, `report.png` and `report.html` (last) into the folder; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = draw(story)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=130)
    _write(folder / "report.json", json.dumps(story, indent=2).encode())
    _write(folder / "report.png", buffer.getvalue())
    _write(folder / "report.html", render(story, buffer.getvalue()).encode())
    return folder / "report.html"


def _write(path: Path, content: bytes) -> None:
    aside = path.with_suffix(path.suffix + ".part")
    aside.write_bytes(content)
    aside.replace(path)


def render(story: Story, picture: bytes) -> str:
    """The page, complete in one file: it opens from a mail or a share without anything beside it."""
    templates = Environment(loader=PackageLoader("flows", "pages"), autoescape=select_autoescape(), trim_blocks=True)
    return templates.get_template("story.html").render(
        story=story, summary=summarise(story), picture=base64.b64encode(picture).decode()
    )


def summarise(story: Story) -> dict[str, Any]:
    """The figures that the headline states, computed from the weeks."""
    after = _first_serving(story)
    changed = [week for week in story["weeks"] if after and week["week_end"] >= after]
    promoted = [retrain for retrain in story["retrains"] if retrain["verdict"] == "promoted"]
    alarms = [week for week in story["weeks"] if week["decision"] == "retrain"]
    return {
        "promoted": len(promoted),
        "attempts": len(story["retrains"]),
        "first_alarm": alarms[0]["week_end"] if alarms else None,
        "frozen": mean_error(story["weeks"], "frozen_error"),
        "loop": mean_error(story["weeks"], "loop_error"),
        "frozen_after": mean_error(changed, "frozen_error"),
        "loop_after": mean_error(changed, "loop_error"),
        "after": after,
    }


def mean_error(weeks: list[dict[str, Any]], which: str) -> float | None:
    """Mean error over weeks, weighted by rows; None without rows."""
    rows = sum(week["rows"] for week in weeks)
    return sum(week[which] * week["rows"] for week in weeks if week["rows"]) / rows if rows else None


def _first_serving(story: Story) -> str | None:
    """Day of the first answer by a retrained model; None while there was none."""
    served = [retrain["serving_from"] for retrain in story["retrains"] if retrain["serving_from"]]
    return min(served)[:10] if served else None


def draw(story: Story) -> Figure:
    """Error a week of the loop against the model that was never retrained, with alarms and promotions marked."""
    weeks = [week for week in story["weeks"] if week["rows"]]
    when = _days(week["week_end"] for week in weeks)
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(when, [week["frozen_error"] for week in weeks], color=FROZEN, lw=2, marker="o", ms=3)
    axes.plot(when, [week["loop_error"] for week in weeks], color=LOOP, lw=2, marker="o", ms=3)
    for name, colour, label in (("frozen_error", FROZEN, "never retrained"), ("loop_error", LOOP, "noria")):
        if weeks:
            axes.annotate(label, (when[-1], weeks[-1][name]), xytext=(8, 0), textcoords="offset points",
                          color=colour, va="center", fontweight="bold")  # fmt: skip
    _mark(axes, story)
    unit = f" ({story['unit']})" if story.get("unit") else ""
    axes.set_ylabel(f"mean error{unit}")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.08)
    locator = AutoDateLocator(maxticks=9)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    axes.set_title(f"{story['workload']}: error per week, with and without the loop", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    if story["retrains"]:
        # Above the axes: inside them no corner is free of lines on every stream.
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2, frameon=False, ncols=3)
    return figure


def _days(dates: Iterable[str]) -> list[float]:
    """ISO dates as matplotlib counts them: days since 1970."""
    return [float(date2num(datetime.fromisoformat(day))) for day in dates]  # type: ignore[no-untyped-call]


def _mark(axes: Axes, story: Story) -> None:
    styles = {
        "promoted": (PROMOTED, "^", "retrained and promoted"),
        "refused": (REFUSED, "x", "retrained, refused by the gate"),
        "failed": (ALARM, "X", "retrain failed"),
    }
    top = max((week["frozen_error"] for week in story["weeks"] if week["rows"]), default=1.0) * 1.08
    for verdict, (colour, marker, label) in styles.items():
        moments = _days(one["requested"][:10] for one in story["retrains"] if one["verdict"] == verdict)
        if moments:
            axes.scatter(moments, [top] * len(moments), color=colour, marker=marker, s=60, label=label, zorder=3)
            axes.vlines(moments, 0, top, color=colour, lw=0.8, alpha=0.35)
