"""Addresses of the pages that people want, in the UIs of one site.

MLflow opens on its pages for language models unless the address asks for model training; so every address of it does.
"""

from __future__ import annotations

from flows.site import Site, read_state
from monitoring.project import project_of
from registry.store import Store

TRAINING = "?workflowType=machine_learning"


def models(site: Site) -> str:
    """MLflow's list of registered models."""
    return f"{site.settings.mlflow_uri}/#/models{TRAINING}"


def model(site: Site, workload: str, version: int | None = None) -> str:
    """A model in MLflow with its versions and aliases, or one version of it."""
    page = f"{workload}/versions/{version}" if version else workload
    return f"{site.settings.mlflow_uri}/#/models/{page}{TRAINING}"


def training_runs(site: Site, store: Store, workload: str) -> str:
    """A workload's training runs in MLflow; empty when it has none yet."""
    experiment = store.experiment(workload)
    return f"{site.settings.mlflow_uri}/#/experiments/{experiment}/runs{TRAINING}" if experiment else ""


def evidently(site: Site, page: str) -> str:
    """A page below the address of this stack's Evidently; empty where another machine serves it."""
    service = read_state(site.settings.root).get("services", {}).get("evidently")
    return f"{service['url']}/{page}" if service else ""


def dashboard(site: Site, workload: str) -> str:
    """A workload's dashboard in Evidently."""
    return evidently(site, f"projects/{project_of(workload)}")


def deployments(site: Site) -> str:
    """Every deployment in Prefect."""
    return f"{prefect(site)}/deployments"


def deployment(site: Site, number: object) -> str:
    """One deployment in Prefect: its runs, schedules and parameters."""
    return f"{prefect(site)}/deployments/deployment/{number}"


def flow_run(site: Site, number: object) -> str:
    """One run in Prefect: its log, tasks and artifacts."""
    return f"{prefect(site)}/runs/flow-run/{number}"


def prefect(site: Site) -> str:
    """Prefect's UI, which lies beside its API."""
    return site.settings.prefect_url.removesuffix("/api")
