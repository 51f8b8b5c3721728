"""The page of one Evidently run: the verdict in words, then the numbers, then every column beside the reference.

Evidently's own widgets put categories in no order, show no threshold and hide missing values; these show exactly what
was compared. Imports Evidently: import this module from `monitoring.publish` only.
"""

from __future__ import annotations

from evidently.legacy.model.widget import BaseWidgetInfo
from evidently.legacy.renderers.html_widgets import (
    ColumnDefinition,
    ColumnType,
    CounterData,
    RichTableDataRow,
    RowDetails,
    counter,
    header_text,
    plotly_data,
    rich_table_data,
    table_data,
    text_widget,
)

from monitoring.figures import between, shares, shown
from monitoring.window import Observation
from noria.records import ColumnDrift, Interval, Quality

TITLES = {
    "ok": "As calm as the reference",
    "drift": "Drift: the inputs or predictions have moved",
    "quality": "Quality: the model is worse than it was",
    "schema": "Schema: a person must look at the data",
    "unknown": "Unknown: too little data to judge",
}
GREY, RED, GREEN = "#4d4d4d", "#ed0400", "#2a9d5c"


def page(observation: Observation) -> list[BaseWidgetInfo]:
    """The widgets, from top to bottom."""
    report = observation.report
    drifts = [*([report.prediction] if report.prediction else []), *report.columns]
    widgets = [
        header_text(label=TITLES[report.verdict]),
        counter(counters=_counters(observation, drifts)),
        text_widget(
            title=f"{report.workload} version {report.version}, {between(report.window)} UTC",
            text="\n\n".join(report.reasons),
        ),
    ]
    if report.quality:
        widgets.append(_quality(report.quality, observation.workload.unit))
    if report.violations:
        rows = [[rule, f"{count:,}"] for rule, count in report.violations.items()]
        widgets.append(table_data(title="Rows that break the schema", column_names=["Rule", "Rows"], data=rows))
    if drifts:
        widgets.append(_columns(observation, drifts))
    return widgets


def _counters(observation: Observation, drifts: list[ColumnDrift]) -> list[CounterData]:
    report = observation.report
    shown = [CounterData("rows", f"{report.rows:,}")]
    if report.quality:
        quality = report.quality
        shown.append(CounterData(f"error (reference {quality.reference_error:.3g})", f"{quality.error.value:.3g}"))
    if drifts:
        shown.append(CounterData("columns drifted", f"{sum(one.drifted for one in drifts)} of {len(drifts)}"))
        most = max(drifts, key=lambda one: one.missing)
        shown.append(CounterData(f"most missing ({most.column})", f"{most.missing:.1%}"))
    return shown


def _quality(quality: Quality, unit: str) -> BaseWidgetInfo:
    """Error and bias with their intervals, beside the reference."""

    def line(name: str, found: Interval, reference: float) -> list[str]:
        return [name, f"{found.value:.3g}", f"{found.low:.3g} to {found.high:.3g}", f"{reference:.3g}"]

    rows = [line(f"error ({unit})" if unit else "error", quality.error, quality.reference_error)]
    if quality.relative:
        rows.append(line("sum of errors / sum of truths", quality.relative, quality.reference_relative))
    rows.append(line("mean residual (0 is unbiased)", quality.bias, quality.reference_bias))
    until = f", the newest from {quality.newest:%Y-%m-%d %H:%M}" if quality.newest else ""
    title = f"Quality on {quality.rows:,} answers of this version whose labels have arrived{until}"
    return table_data(title=title, column_names=["", "Window", "95% interval", "Reference"], data=rows)


def _columns(observation: Observation, drifts: list[ColumnDrift]) -> BaseWidgetInfo:
    """Every compared column, those that moved furthest past their threshold first."""
    ordered = sorted(drifts, key=lambda one: -one.distance / one.threshold)
    options = {"xField": "x", "yField": "y"}
    return rich_table_data(
        title="Prediction and columns beside the rows that this version was trained on (open one for its categories)",
        rows_per_page=50,
        columns=[
            ColumnDefinition("Column", "column"),
            ColumnDefinition("Verdict", "verdict"),
            ColumnDefinition("Distance", "distance"),
            ColumnDefinition("Threshold", "threshold"),
            ColumnDefinition("Reference", "reference", ColumnType.HISTOGRAM, options={**options, "color": GREY}),
            ColumnDefinition("Window", "window", ColumnType.HISTOGRAM, options={**options, "color": RED}),
            ColumnDefinition("Missing, reference", "missing_reference"),
            ColumnDefinition("Missing, window", "missing"),
        ],
        data=[_row(observation, one) for one in ordered],
    )


def _row(observation: Observation, one: ColumnDrift) -> RichTableDataRow:
    labels, reference, current = shares(observation, one.column)
    percents = [[round(100 * float(share), 2) for share in part] for part in (reference, current)]
    fields = {
        "column": shown(one.column),
        "verdict": "drifted" if one.drifted else "as usual",
        "distance": f"{one.distance:.3f}",
        "threshold": f"{one.threshold:.3f}",
        "reference": {"x": list(labels), "y": percents[0]},
        "window": {"x": list(labels), "y": percents[1]},
        "missing_reference": f"{one.missing_reference:.1%}",
        "missing": f"{one.missing:.1%}",
    }
    bars = [
        {"type": "bar", "name": name, "x": list(labels), "y": part, "marker": {"color": color}}
        for name, part, color in zip(("reference", "window"), percents, (GREY, RED), strict=True)
    ]
    layout = {
        "barmode": "group",
        "xaxis": {"type": "category"},
        "yaxis": {"title": {"text": "% of rows"}},
        "legend": {"orientation": "h", "y": 1.12},
        "margin": {"t": 30},
    }
    graph = plotly_data(title="", data=bars, layout=layout)
    return RichTableDataRow(fields, RowDetails().with_part("Categories", graph))
