"""The `noria` command. Each command imports what it needs, so that `noria --help` answers at once.

Exit codes: 0 done; 1 failed, with a sentence on stderr; 2 wrong usage; 3 `status`: the stack is not ready;
4 `watch`: the policy asks for a retrain or a person; 5 `check`: findings; 6 `shadow`: nothing to compare yet;
7 `shadow`: the challenger is surely worse.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flows.cluster import cluster
from flows.keys import key
from flows.site import Site, now_of, read_state
from noria.errors import NoriaError

out, err = Console(), Console(stderr=True)
GROUPS = ("Everything at once", "The stack", "Models", "Your own workload")
Name = Annotated[
    str, typer.Argument(metavar="WORKLOAD", help="A workload's name (taxi, spam) or import string (module:NAME).")
]
Now = Annotated[
    str | None,
    typer.Option("--now", help="Act as if it were this ISO time; default: the clock, or a recorded stream's end."),
]


class Group(typer.core.TyperGroup):
    """Prints noria's own errors as sentences; anything else is a defect and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except NoriaError as error:
            err.print(f"[bold red]noria:[/] {error}", highlight=False)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Group, no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="Keeps models fresh by themselves: train, register, serve, watch, retrain; one loop.",
)  # fmt: skip


@app.command(rich_help_panel=GROUPS[0])
def demo(
    start: Annotated[str, typer.Option("--from", help="First day of the stream.")] = "2019-12-02",
    end: Annotated[str, typer.Option("--to", help="Last day of the stream.")] = "2020-06-28",
    full: Annotated[bool, typer.Option("--full", help="2018-07 to 2020-12 instead; about four times as long.")] = False,
    label_delay: Annotated[int, typer.Option(min=0, max=8, help="Weeks until the true durations arrive.")] = 1,
    report: Annotated[Path, typer.Option(help="Where report.html, report.png and report.json go.")] = Path("story"),
    keep: Annotated[bool, typer.Option("--keep", help="Leave the stack up at the end, to look around.")] = False,
) -> None:
    """Live through New York's taxi trips week by week, with the real parts, and tell the story."""
    from flows.demo import run_demo

    if full:
        start, end = "2018-07-02", "2020-12-27"
    run_demo(Site.here(), out, start=start, end=end, label_delay=label_delay, report=report, keep=keep)


@app.command(rich_help_panel=GROUPS[1])
def up() -> None:
    """Start the stack (or find the one that runs): Prefect, MLflow, Evidently, Ray, the server, the home page."""
    from flows.stack import up as start

    with out.status("starting") as status:

        def tell(ready: dict[str, bool]) -> None:
            waiting = [name for name, done in ready.items() if not done]
            status.update(
                f"{sum(ready.values())} of {len(ready)} ready; waiting for {', '.join(waiting)}"
                if ready
                else "starting"
            )

        start(Site.here(), tell=tell)
    _show_stack(Site.here())


@app.command(rich_help_panel=GROUPS[1])
def down() -> None:
    """Stop the stack; nothing that it stored is lost."""
    from flows.stack import down as stop

    with out.status("stopping"):
        stopped = stop(Site.here())
    out.print("stopped" if stopped else "nothing was running")


@app.command(rich_help_panel=GROUPS[1])
def status(as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """Show what runs where; exit code 3 while something is not ready."""
    site = Site.here()
    state = read_state(site.settings.root)
    running = bool(state.get("services")) and state.get("phase") != "stopped" and _alive(state)
    if as_json:
        sys.stdout.write(json.dumps(state if running else {"phase": "stopped", "services": {}}, indent=2) + "\n")
    elif running:
        _show_stack(site)
    else:
        out.print(f"no stack runs in {site.settings.root}; start one with [bold]noria up[/]")
    if not running or state["phase"] != "ready":
        raise typer.Exit(3)


@app.command(rich_help_panel=GROUPS[1])
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8080,
    workers: Annotated[int | None, typer.Option(min=1, max=256, help="Worker processes.")] = None,
    repository: Annotated[
        Path | None, typer.Option(help="Folder of plain models, NAME/VERSION/model.onnx; MLflow is not needed then.")
    ] = None,
    grpc_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port for gRPC; without it, none.")] = None,
    is_open: Annotated[bool, typer.Option("--open", help="Let other machines in without a key.")] = False,
) -> None:
    """Answer requests with whatever the alias `champion` names, and follow it. `noria up` does this too."""
    from serving.reload import serve as run

    given = {"workers": workers, "repository": str(repository.absolute()) if repository else None}
    site = Site.here(**{name: value for name, value in given.items() if value is not None})
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    mlflow_url = site.settings.mlflow_uri if site.settings.repository else site.address("mlflow_uri")
    run(site.settings, host=host, port=port, mlflow_url=mlflow_url, grpc_port=grpc_port, is_open=is_open)


app.command(rich_help_panel=GROUPS[1])(cluster)
app.add_typer(key, name="key", rich_help_panel=GROUPS[1])


@app.command(rich_help_panel=GROUPS[2])
def train(workload: Name, now: Now = None) -> None:
    """Train a candidate, register it, and promote it if the gate lets it pass."""
    outcome = _run("retrain", workload, now=now, reason="manual")
    out.print(f"version {outcome['version']}: [bold]{outcome['verdict']}[/]")
    _tell(outcome["reasons"])


@app.command(rich_help_panel=GROUPS[2])
def watch(workload: Name, now: Now = None) -> None:
    """Judge the champion on the newest window; exit code 4 when a retrain or a person is called for."""
    outcome = _run("watch", workload, now=now)
    out.print(f"{outcome['verdict']} → [bold]{outcome['decision']}[/]")
    _tell(outcome["reasons"])
    if outcome["decision"] in ("retrain", "ask"):
        raise typer.Exit(4)


@app.command(rich_help_panel=GROUPS[2])
def batch(
    workload: Name,
    source: Annotated[Path, typer.Argument(help="A Parquet file with the raw columns.")],
    now: Now = None,
) -> None:
    """Score a Parquet file with the champion; results beside it, predictions logged like online ones."""
    outcome = _run("batch", workload, source=str(source.absolute()), now=now)
    out.print(f"scored {outcome['rows']:,} rows with version {outcome['version']}: {outcome['output']}")


@app.command(rich_help_panel=GROUPS[2])
def promote(
    workload: Name, version: Annotated[int, typer.Argument(help="The version's number in MLflow.", min=1)]
) -> None:
    """Make a version the champion; the server follows within seconds. The same as moving the alias in MLflow."""
    from datetime import UTC, datetime

    from registry.promote import promote as move
    from registry.store import Store

    site = Site.here()
    store = Store(site.address("mlflow_uri"))
    move(store, store.get(site.workload(workload).name, version), reason="manual", now=datetime.now(UTC))
    out.print(f"version {version} is the champion")


@app.command(rich_help_panel=GROUPS[2])
def rollback(workload: Name) -> None:
    """Make the previous champion the champion again."""
    from datetime import UTC, datetime

    from registry.promote import rollback as back
    from registry.store import Store

    site = Site.here()
    version = back(Store(site.address("mlflow_uri")), site.workload(workload).name, now=datetime.now(UTC))
    out.print(f"version {version.number} is the champion again")


@app.command(rich_help_panel=GROUPS[2])
def shadow(
    workload: Name,
    window: Annotated[str, typer.Option(help="How far back, by the requests' event time: 36h, 7d, 2w.")] = "7d",
    now: Now = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Compare the challenger with the champion on the same requests; exit code 6: nothing to compare, 7: worse."""
    from flows.shadow import compared, table, window_of

    site = Site.here()
    chosen = site.workload(workload)
    found = compared(site, chosen, window_of(window, now_of(chosen, now)))
    if as_json:
        sys.stdout.write(json.dumps(found.to_json(), indent=2) + "\n")
    else:
        if found.rows:
            out.print(table(found, chosen.unit if chosen.loss == "absolute_error" else ""), highlight=False)
        out.print(found.conclusion, highlight=False, soft_wrap=True)
    if found.verdict in ("nothing", "worse"):
        raise typer.Exit(6 if found.verdict == "nothing" else 7)


@app.command(rich_help_panel=GROUPS[3])
def new(name: Annotated[str, typer.Argument(help="Lower-case letters, digits and _.")]) -> None:
    """Write a commented workload to start from."""
    from flows.new import write_workload

    path = write_workload(name, Path.cwd())
    out.print(f"wrote {path.name}; next: [bold]noria check {path.stem}:WORKLOAD[/]")


@app.command(rich_help_panel=GROUPS[3])
def check(workload: Name) -> None:
    """Say in sentences what is wrong with a workload, before anything runs; exit code 5 if anything is."""
    from datetime import UTC, datetime

    from noria.check import check as run
    from training.trial import trial

    with out.status("checking") as status:
        findings = run(Site.here().path(workload), trial, now=datetime.now(UTC), progress=status.update)
    for finding in findings:
        out.print(f"[bold red]✗[/] {finding}", highlight=False)
    if findings:
        raise typer.Exit(5)
    out.print("[green]✓[/] nothing to object to")


def _run(flow: str, workload: str, **parameters: Any) -> dict[str, Any]:
    """Run a flow's deployment on the stack, saying what it says; returns what the flow returned."""
    site = Site.here()
    now_of(site.workload(workload), parameters.get("now"))  # a wrong time is said before anything runs
    site.address("prefect_url")
    site.enter()
    from flows.requests import run_and_follow

    given = {name: value for name, value in parameters.items() if value is not None}
    with out.status(f"{flow} {workload}") as status:

        def say(sentence: str) -> None:
            status.update(sentence.splitlines()[0][:100] if sentence else "")

        return run_and_follow(f"{flow}/{site.workload(workload).name}", given, say)


def _tell(reasons: list[str]) -> None:
    for sentence in reasons:
        out.print(f"  {sentence}", highlight=False)


def _alive(state: dict[str, Any]) -> bool:
    from psutil import pid_exists

    return bool(pid_exists(int(state.get("pid", 0))))


def _show_stack(site: Site) -> None:
    state = read_state(site.settings.root)
    table = Table(box=None, header_style="dim", padding=(0, 2))
    for column in ("service", "address", "state", "restarts"):
        table.add_column(column)
    for name, entry in state["services"].items():
        ready = "[green]ready[/]" if entry["ready"] else "[yellow]starting[/]"
        table.add_row(name, entry["url"], ready, str(entry["restarts"] or ""))
    out.print(table)
    for event in state["events"][-3:]:
        out.print(f"[dim]{event}[/]", highlight=False)
    if "home" in state["services"]:
        out.print(f"everything is linked from [bold]{state['services']['home']['url']}[/]", highlight=False)


if __name__ == "__main__":
    app()
