"""What `noria demo` shows in the terminal while it runs: one table that fills week by week, and what goes on now."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

STYLES = {
    "ok": "green", "hold": "green", "promoted": "bold green", "unknown": "dim", "refused": "yellow", "drift": "yellow",
    "quality": "bold red", "schema": "bold red", "retrain": "bold red", "failed": "bold red", "ask": "bold red",
}  # fmt: skip


class LiveView:
    """A live table on a terminal; on anything else each finished week is one printed line."""

    def __init__(self, console: Console, title: str, weeks: int, unit: str) -> None:
        self.console, self.title, self.unit = console, title, unit
        self.rows: list[dict[str, Any]] = []
        self.now = Text("starting")
        self.progress = Progress(
            TextColumn("weeks"), BarColumn(bar_width=40), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )
        self.task = self.progress.add_task("weeks", total=weeks)
        self.live = Live(self, console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> LiveView:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def say(self, sentence: str, *, long: bool = False) -> None:
        """What goes on now; where there is no terminal to redraw, only what takes `long` is worth a line."""
        if long and not self.console.is_terminal:
            self.console.print(f"… {sentence}", highlight=False)
        self.now = Text(sentence)

    def week(self, row: dict[str, Any]) -> None:
        """A finished week: the story's entry."""
        self.rows.append(row)
        self.progress.advance(self.task)
        if not self.console.is_terminal:
            self.console.print(
                f"{row['week_end']}  rows {row['rows']:>5}  "
                f"frozen {row['frozen_error']:.2f}  loop {row['loop_error']:.2f}  "
                f"{row['verdict']:>8}  {row['decision']:>8}  v{row['version']}", highlight=False,
            )  # fmt: skip

    def note(self, sentence: str, style: str = "") -> None:
        """Something that stays readable: an alarm, a promotion."""
        self.console.print(Text(sentence, style=style or "bold"))

    def __rich__(self) -> RenderableType:
        table = Table(
            title=self.title, title_justify="left", expand=False, header_style="dim", box=None, padding=(0, 2)
        )
        for name in ("week ending", "rows", f"never retrained ({self.unit})", f"noria ({self.unit})"):
            table.add_column(name, justify="left" if name == "week ending" else "right")
        for name in ("watch", "decision", "version"):
            table.add_column(name)
        room = max(5, self.console.height - 8)
        for row in self.rows[-room:]:
            table.add_row(
                row["week_end"], f"{row['rows']:,}", f"{row['frozen_error']:.2f}", f"{row['loop_error']:.2f}",
                *(Text(row[name], STYLES.get(row[name], "")) for name in ("verdict", "decision")),
                f"v{row['version']}",
            )  # fmt: skip
        return Group(table, self.progress, Text.assemble(("now: ", "dim"), self.now))
