"""Write a watch to the Evidently workspace behind the dashboards: a project per workload, a run per window.

Not here: judging (the report comes in judged) and serving the pages (`evidently ui` reads the workspace). The project
and its panels are made once; what a person then changes in the Evidently UI stays.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from evidently.sdk.models import DashboardModel, DashboardPanelPlot, DashboardTabModel, PanelMetric, ProjectModel
from evidently.sdk.panels import bar_plot_panel, counter_panel, line_plot_panel
from evidently.ui.storage.local.base import LocalState

from monitoring.figures import run
from monitoring.page import page
from monitoring.project import project_of
from monitoring.window import Observation
from noria.workload import Workload


def publish(observation: Observation, workspace: Path) -> str:
    """Write one run; returns the path of its page below the Evidently UI's address.

    Safe beside other writers, in this process and others. Publishing a version's window again replaces its run.
    """
    project = ensure_project(observation.workload, workspace)
    snapshot = run(observation).to_snapshot_model().copy(update={"widgets": page(observation)})
    number = uuid.uuid5(project, f"{observation.report.version} {observation.report.window}")
    with _aside(workspace) as folder:
        LocalState(str(folder)).write_snapshot(project, number, snapshot)
        written = Path(str(project)) / "snapshots" / f"{number}.json"
        (folder / written).replace(workspace / written)
    return f"projects/{project}/reports/{number}"


def ensure_project(workload: Workload, workspace: Path) -> uuid.UUID:
    """The workload's project, made with its dashboard when it is not there; returns its id."""
    project = project_of(workload.name)
    target = workspace / str(project)
    if target.exists():
        return project
    workspace.mkdir(parents=True, exist_ok=True)
    with _aside(workspace) as folder:
        state = LocalState(str(folder))
        state.write_project(ProjectModel(id=project, name=workload.name, description=_description(workload)))
        state.write_dashboard(project, dashboard(workload))
        (folder / str(project) / "snapshots").mkdir()
        try:
            (folder / str(project)).rename(target)
        except OSError:
            # Another writer was faster; a folder that is not empty cannot be replaced.
            if not target.exists():
                raise
    return project


@contextmanager
def _aside(workspace: Path) -> Iterator[Path]:
    """A folder beside the workspace, to write in what is then renamed into it.

    Beside, not inside: the UI's watcher stops for good when it reads a project half-written, and does not notice files
    that are renamed within what it watches.
    """
    beside = workspace.parent / f".{workspace.name}.writing"
    beside.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=beside) as folder:
        yield Path(folder)


def _description(workload: Workload) -> str:
    unit = f" Scores are {workload.unit}." if workload.unit else ""
    return f"How the champion of '{workload.name}' fares, window by window.{unit} {workload.notes}".strip()


def dashboard(workload: Workload) -> DashboardModel:
    """The panels of a workload's project."""
    unit = f" ({workload.unit})" if workload.unit else ""
    panels = [
        _counter("Error, newest labels", "error", f"mean row error{unit}, newest window with labels"),
        _counter("Rows, newest window", "rows", "predictions logged"),
        _line(f"Error{unit}", "by labels that have arrived; reference: the test part of the version's own training",
              ("error", "error"), ("reference", "reference error"), size="full"),
        _line("Drifted columns", "share of the compared columns beyond their calibrated threshold",
              ("share drifted", "drifted share")),
        _line("Prediction drift", "Jensen-Shannon distance of the predictions to the reference",
              ("distance", "prediction distance"), ("threshold", "prediction threshold")),
        _drift_by_column(),
        _missing_by_column(),
        _bars("Rows", "predictions logged in the window, and answers judged by labels",
              ("predictions", "rows"), ("judged", "labelled rows")),
        _line("Bias", "mean residual; 0 is unbiased, above 0 the truth lies above the prediction",
              ("bias", "bias"), ("reference", "reference bias")),
        _bars("Model version", "the version that was serving at the window's end", ("version", "version"), size="full"),
    ]  # fmt: skip
    return DashboardModel(tabs=[DashboardTabModel(title="Watch", panels=[one.id for one in panels])], panels=panels)


def _figure(legend: str, name: str) -> PanelMetric:
    return PanelMetric(legend=legend, metric="Figure", metric_labels={"name": name})


def _counter(title: str, name: str, description: str) -> DashboardPanelPlot:
    return counter_panel(title, [_figure(description, name)], size="half")


def _line(title: str, description: str, *series: tuple[str, str], size: str = "half") -> DashboardPanelPlot:
    return line_plot_panel(title, [_figure(*one) for one in series], description=description, size=size)


def _bars(title: str, description: str, *series: tuple[str, str], size: str = "half") -> DashboardPanelPlot:
    return bar_plot_panel(title, [_figure(*one) for one in series], description=description, size=size)


def _drift_by_column() -> DashboardPanelPlot:
    columns = PanelMetric(legend="{{column}}", metric="CalibratedDrift", metric_labels={})
    description = "distance / calibrated threshold; above the limit, 1, is drift"
    return line_plot_panel("Drift by column", [columns, _figure("limit", "limit")], description=description)


def _missing_by_column() -> DashboardPanelPlot:
    metric = PanelMetric(legend="{{column}}", metric="Figure", metric_labels={"name": "missing"})
    return line_plot_panel("Missing values by column", [metric], description="share of rows without a value")
