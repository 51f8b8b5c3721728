"""A watch's evidence and decision as Markdown, for the Prefect UI; decides and computes nothing."""

from __future__ import annotations

from collections.abc import Mapping

from monitoring.figures import between, shown
from noria.records import ColumnDrift, Decision, DriftReport, Interval, Quality


def markdown(report: DriftReport, decision: Decision, *, unit: str, links: Mapping[str, str]) -> str:
    """The decision with its reasons, where to read on, quality, and every compared column (furthest first)."""
    lines = [
        f"# {report.workload}: {report.verdict} → {decision.action}",
        f"Version {report.version} made {report.rows:,} predictions, {between(report.window)} UTC.",
        "",
        *(f"- {reason}" for reason in decision.reasons),
        "",
        "See " + ", ".join(f"[{text}]({address})" for text, address in links.items() if address) + ".",
    ]
    if report.quality:
        lines += ["", *_quality(report.quality, unit)]
    if drifts := [*report.columns, *([report.prediction] if report.prediction else [])]:
        lines += ["", *_columns(drifts)]
    return "\n".join(lines)


def _quality(quality: Quality, unit: str) -> list[str]:
    def line(name: str, found: Interval, reference: float) -> str:
        return f"| {name} | {found.value:.3g} | {found.low:.3g} to {found.high:.3g} | {reference:.3g} |"

    lines = [
        f"## Quality on {quality.rows:,} answers whose labels have arrived",
        "",
        "| | now | 95% interval | reference |",
        "|---|--:|--:|--:|",
        line(f"error ({unit})" if unit else "error", quality.error, quality.reference_error),
    ]
    if quality.relative:
        lines.append(line("sum of errors / sum of truths", quality.relative, quality.reference_relative))
    return [*lines, line("mean residual (0 is unbiased)", quality.bias, quality.reference_bias)]


def _columns(drifts: list[ColumnDrift]) -> list[str]:
    return [
        "## Columns beside the rows that the version was trained on",
        "",
        "Distance is Jensen-Shannon's; thresholds are calibrated on how much the reference's own periods differ.",
        "",
        "| column | distance | threshold | drifted | missing | missing in reference |",
        "|---|--:|--:|---|--:|--:|",
        *(
            f"| {shown(one.column)} | {one.distance:.3f} | {one.threshold:.3f} | {'**yes**' if one.drifted else 'no'} "
            f"| {one.missing:.1%} | {one.missing_reference:.1%} |"
            for one in sorted(drifts, key=lambda one: -one.distance / one.threshold)
        ),
    ]
