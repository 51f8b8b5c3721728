"""What people must find in each UI after the loop has turned once: the three who work there daily, and a newcomer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest
from ferry import WORKLOAD
from playwright.sync_api import Page, expect

from flows.site import read_state
from flows.story import write_story
from monitoring.project import project_of
from registry.store import Store

PANELS = ["Error (minutes)", "Drifted columns", "Prediction drift", "Drift by column", "Missing values by column",
          "Rows", "Bias", "Model version"]  # fmt: skip
LINES = "svg .MuiLineElement-root, svg .MuiBarElement-root, svg .MuiLineChart-line"

pytestmark = [pytest.mark.usefixtures("finished_loop"), pytest.mark.timeout(900)]
expect.set_options(timeout=60_000)


@pytest.fixture(scope="session")
def addresses(site) -> dict[str, str]:
    return {name: entry["url"] for name, entry in read_state(site.settings.root)["services"].items()}


@pytest.fixture(scope="session")
def store(site) -> Store:
    return Store(site.address("mlflow_uri"))


def texts(page: Page, *wanted: str) -> None:
    """The page shows each of these somewhere."""
    for text in wanted:
        expect(page.get_by_text(text).first).to_be_visible()


def resolves(address: str) -> bool:
    """Whether a browser that asks for the address gets a page."""
    return httpx.get(address, headers={"Accept": "text/html"}, timeout=30).is_success


def follow(page: Page, link: str) -> Page:
    page.get_by_role("link", name=link, exact=True).first.click()
    return page


# The home page


def test_home(visitor, addresses, store):
    page = visitor.open(addresses["home"])
    champion = store.version("ferry", "champion")
    texts(page, "ferry", f"version {champion.number}", "What the last watch said", "Last runs", "Next runs")
    for name in ("Prefect", "MLflow", "Evidently", "Server"):
        expect(page.locator(".ui", has_text=name)).to_contain_text("ready")
    names = page.locator("td a").all_inner_texts()
    assert any(re.fullmatch(r"ferry 2024-\d\d-\d\d quality", name) for name in names), names
    visitor.keep(page, whole=True)


@pytest.mark.parametrize(
    ("link", "found"),
    [
        ("versions and aliases", "Registered Models"),
        ("training runs", "initial"),
        ("dashboard", "Drift by column"),
        ("try it", "POST /predict/ferry"),
        ("watch", "Triggers"),
        ("retrain", "retrain ferry when asked"),
    ],
)
def test_home_links_land_where_a_person_wants_to_be(visitor, addresses, link, found):
    page = follow(visitor.open(addresses["home"]), link)
    texts(page, found)
    if page.url.startswith(addresses["mlflow"]):
        expect(page.get_by_text("Prompts")).to_have_count(0)


def test_every_link_of_the_home_page_resolves(visitor, addresses):
    page = visitor.open(addresses["home"])
    links = {link.get_attribute("href") for link in page.locator("a").all()}
    assert len(links) > 10
    for link in links:
        assert resolves(link), link


# Prefect: when things run, and why


def test_prefect_deployments(visitor, addresses, prefect):
    page = visitor.open(f"{addresses['prefect']}/deployments")
    for flow in ("retrain", "watch", "batch"):
        expect(page.get_by_role("link", name=flow, exact=True).first).to_be_visible()
    number = next(one["id"] for one in prefect("deployments") if one["entrypoint"].endswith(".retrain"))
    page = visitor.open(f"{addresses['prefect']}/deployments/deployment/{number}?tab=Description")
    texts(page, "Train a candidate on the newest data", "retrain ferry when asked")
    form = visitor.open(f"{addresses['prefect']}/deployments/deployment/{number}/run")
    texts(form, "import string, as module:NAME", "ISO time; None for the clock", "the same in sentences, for people")


def test_prefect_says_what_a_watch_saw(visitor, addresses, prefect):
    done = {"state": {"type": {"any_": ["COMPLETED"]}}, "tags": {"all_": ["noria", "ferry"]}}
    wanted = {"flows": {"name": {"any_": ["watch"]}}, "flow_runs": done, "sort": "START_TIME_DESC"}
    run = prefect("flow_runs", wanted)[0]
    assert re.fullmatch(r"ferry 2024-\d\d-\d\d( \d\d:\d\d)?", run["name"])
    page = visitor.open(f"{addresses['prefect']}/runs/flow-run/{run['id']}")
    texts(page, run["name"], "ferry: ")
    made = {"artifacts": {"flow_run_id": {"any_": [run["id"]]}, "type": {"any_": ["markdown"]}}}
    [artifact] = prefect("artifacts", made)
    page = visitor.open(f"{addresses['prefect']}/artifacts/artifact/{artifact['id']}")
    expect(page.get_by_role("heading", name="ferry:")).to_be_visible()
    expect(page.locator("table").last).to_contain_text("pier")
    expect(page.locator("table").last).to_contain_text("prediction")
    for name in ("the report with every column", "the dashboard over time"):
        assert resolves(page.get_by_role("link", name=name).get_attribute("href"))


def test_prefect_says_what_triggered_a_retrain(visitor, addresses, prefect):
    [automation] = prefect("automations")
    page = visitor.open(f"{addresses['prefect']}/automations/automation/{automation['id']}")
    texts(page, "retrain ferry when asked", "A watch found a reason to retrain", "Run deployment")
    expect(page.get_by_role("link", name="ferry")).to_be_visible()
    visitor.keep(page)
    runs = prefect("flow_runs", {"flows": {"name": {"any_": ["retrain"]}}, "sort": "START_TIME_DESC"})
    run = next(run for run in runs if run["created_by"] and run["created_by"]["type"] == "AUTOMATION")
    page = visitor.open(f"{addresses['prefect']}/runs/flow-run/{run['id']}")
    texts(page, run["name"])
    # The list of log lines draws what is in view only; what came of the run stands at its end.
    page.get_by_role("tabpanel", name="Logs").hover()
    page.mouse.wheel(0, 10_000)
    texts(page, "version")
    page.get_by_role("tab", name="Details").or_(page.get_by_text("Details", exact=True)).first.click()
    texts(page, "Created By")


# MLflow: which model is which


def test_mlflow_model(visitor, addresses, store, finished_loop):
    page = visitor.open(f"{addresses['mlflow']}/#/models/ferry?workflowType=machine_learning")
    texts(page, "Predicts minutes from 3 raw columns", "Invented crossings.", "Where it goes", "late above 40")
    versions = store.versions("ferry")
    assert len(versions) >= 2
    for version in versions:
        expect(page.get_by_role("link", name=f"Version {version.number}", exact=True)).to_be_visible()
    visitor.keep(page, "top")
    for alias in ("champion", "previous"):
        expect(page.get_by_text(re.compile(rf"^@?\s*{alias}$")).first).to_be_visible()
    page.get_by_text(re.compile(r"^@?\s*previous$")).first.scroll_into_view_if_needed()
    visitor.keep(page)


def test_mlflow_version(visitor, addresses, store, finished_loop):
    number = next(one["version"] for one in finished_loop["retrains"] if one["verdict"] == "promoted")
    page = visitor.open(f"{addresses['mlflow']}/#/models/ferry/versions/{number}?workflowType=machine_learning")
    texts(page, "mean absolute error on its test rows", "boosted trees", "Trained on", "sum of errors / sum of truths")
    texts(page, "noria.verdict", "noria.watch", "noria.promoted_at")
    visitor.keep(page, whole=True)
    follow(page, store.client.get_run(store.get("ferry", number).run_id).info.run_name)
    texts(page, "noria.because", "warm_start", "duplicates_removed")


def test_mlflow_run_pictures(visitor, addresses, store):
    champion, experiment = store.version("ferry", "champion"), store.experiment("ferry")
    run = f"{addresses['mlflow']}/#/experiments/{experiment}/runs/{champion.run_id}"
    page = visitor.open(f"{run}/model-metrics?workflowType=machine_learning")
    page.get_by_placeholder("Search metric charts").fill("_loss")
    texts(page, "train_loss", "validation_loss")
    expect(page.locator(".js-plotly-plot .scatterlayer path.js-line").first).to_be_visible()
    page = visitor.open(f"{run}/artifacts/curves.png?workflowType=machine_learning")
    page.wait_for_function("[...document.images].some(image => image.naturalWidth > 400)")


# Evidently: what has moved


def test_evidently_dashboard(visitor, addresses):
    page = visitor.open(addresses["evidently"])
    texts(page, "How the champion of 'ferry' fares, window by window")
    page = visitor.open(f"{addresses['evidently']}/projects/{project_of('ferry')}")
    for panel in PANELS:
        expect(page.get_by_text(panel, exact=True).first).to_be_visible()
    expect(page.locator(LINES).first).to_be_visible()
    visitor.keep(page, whole=True)
    charts = page.locator("svg", has_text="Timestamps").all()
    drawn = [chart.locator("path, .MuiBarElement-root").count() for chart in charts]
    assert len(drawn) == len(PANELS) and all(drawn), f"empty panels: {drawn}"
    series = page.get_by_text(re.compile("^(pier|cars|limit|prediction)$")).all_inner_texts()
    assert {"pier", "cars", "limit", "prediction"} <= set(series)


def test_evidently_report(visitor, addresses):
    project = project_of("ferry")
    reports = httpx.get(f"{addresses['evidently']}/api/projects/{project}/reports", timeout=30).json()
    worst = next(report for report in reports if report["metadata"]["verdict"] == "quality")
    page = visitor.open(f"{addresses['evidently']}/projects/{project}/reports/{worst['id']}")
    texts(page, "Quality: the model is worse than it was", "95% interval", "sum of errors / sum of truths")
    row = page.locator("tr", has_text="pier").first
    row.get_by_role("button").first.click()
    bars = page.locator(".js-plotly-plot .bars path")
    expect(bars.first).to_be_visible()
    expect(page.locator(".js-plotly-plot").last).to_contain_text("south")
    visitor.keep(page, whole=True)


# The server


def test_server_answers_the_form(visitor, addresses, store):
    page = visitor.open(f"{addresses['serving']}/docs")
    texts(page, "Predicts minutes.", "0 to 100", f"version {store.version('ferry', 'champion').number}")
    form = page.locator("details[data-path='/predict/ferry'] textarea")
    # Later than anything that other tests look at.
    form.fill(re.sub(r"2024-\d\d", "2024-06", form.input_value()))
    page.get_by_role("button", name="Send").first.click()
    expect(page.locator(".note").first).to_contain_text("200")
    answer = json.loads(page.locator(".answer").first.inner_text())
    [prediction] = answer["predictions"]
    assert prediction["prediction"] > 0 and prediction["action"] in ("late", "on time")
    feedback = page.locator("details[data-path='/feedback/ferry']")
    feedback.locator("summary").click()
    # The example of a feedback is about the prediction just made.
    assert json.loads(feedback.locator("textarea").input_value())["labels"][0]["id"] == prediction["id"]
    feedback.get_by_role("button", name="Send").click()
    expect(feedback.locator(".note")).to_contain_text("200")
    page.evaluate("scrollTo(0, 0)")
    visitor.keep(page, whole=True)


def test_server_start_page(visitor, addresses):
    page = visitor.open(addresses["serving"])
    follow(page, "ferry")
    texts(page, "POST /predict/ferry")


# The story of a run


def test_story(visitor, finished_loop, tmp_path: Path):
    told = {"peak_memory_bytes": 2**30, **finished_loop}
    told["seconds"] = {**told["seconds"], "total": sum(told["seconds"].values())}
    page = visitor.open(write_story(told, tmp_path).as_uri())
    texts(page, f"{WORKLOAD.name}: the wheel turned", "Week by week", "The first alarm came in the week ending")
    assert page.locator("img").evaluate("image => image.complete && image.naturalWidth > 1000")
    expect(page.locator("h2", has_text="Week by week").locator("+ table tr")).to_have_count(len(told["weeks"]) + 1)
    for link in page.locator("a").all():
        assert resolves(link.get_attribute("href")), link.get_attribute("href")
    visitor.keep(page, whole=True)


def test_nothing_needs_another_host(blocked):
    """Every page above was seen with all other hosts out of reach, and none of them asked for one."""
    assert blocked == []
