"""A headless Chromium that reaches nothing but loopback, and keeps a picture of every page that a test opened."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, Response, Route, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
PATIENCE = 60_000
"""Milliseconds for a page to show what it must; the machine may be busy."""
ARTIFACTS = Path(__file__).parents[2] / "test-artifacts" / "browser"
HARMLESS = re.compile(r"/mlflow/users/current|/ico/undefined\.svg|/favicon\.ico")
"""Missing without harm: MLflow asks who is logged in, Prefect draws an icon for runs without infrastructure."""


@pytest.fixture(scope="session", autouse=True)
def fresh_pictures() -> None:
    """Pictures are of this session only."""
    shutil.rmtree(ARTIFACTS, ignore_errors=True)


def find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any stack is started for the test."""
    if find_chromium() is None:
        sentence = f"There is no Chromium on the PATH (looked for {', '.join(NAMES)})."
        if os.environ.get("REQUIRE_BROWSER") == "1":
            pytest.fail(sentence, pytrace=False)
        pytest.skip(sentence)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Ends with the module: its driver keeps an event loop running in this thread, where no other may run then."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def blocked() -> Iterator[list[str]]:
    """Addresses off this machine that pages asked for; written down at the end."""
    asked: list[str] = []
    yield asked
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    (ARTIFACTS / "blocked.json").write_text(json.dumps(sorted(set(asked)), indent=2))


class Visitor:
    """One person's browser: opens pages, notes what went wrong on them, takes pictures."""

    def __init__(self, context: BrowserContext, name: str, blocked: list[str]) -> None:
        self.context, self.name, self.blocked = context, name, blocked
        self.faults: list[str] = []
        context.set_default_timeout(PATIENCE)
        context.route("**/*", self._guard)
        context.on("page", lambda page: page.on("pageerror", lambda error: self.faults.append(f"{page.url}: {error}")))
        context.on("response", self._note)

    def open(self, address: str) -> Page:
        page = self.context.new_page()
        page.goto(address)
        return page

    def keep(self, page: Page, name: str = "", *, whole: bool = False) -> Path:
        """A picture of the page as it is now, among the test artifacts."""
        path = ARTIFACTS / f"{self.name}{'-' if name else ''}{name}.png"
        page.screenshot(path=path, full_page=whole)
        return path

    def _guard(self, route: Route, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.hostname not in ("127.0.0.1", "localhost"):
            self.blocked.append(request.url)
            route.abort()
        else:
            route.continue_()

    def _note(self, response: Response) -> None:
        if response.status >= 400 and not HARMLESS.search(response.url):
            self.faults.append(f"{response.status} {response.url}")


@pytest.fixture
def visitor(chromium: Browser, blocked: list[str], request: pytest.FixtureRequest) -> Iterator[Visitor]:
    """A fresh browser profile for each test, as a newcomer has; a fault on a page that it opened fails the test."""
    context = chromium.new_context(viewport={"width": 1400, "height": 1000})
    name = re.sub(r"\W+", "-", request.node.name.removeprefix("test_")).strip("-")
    person = Visitor(context, name, blocked)
    yield person
    for number, page in enumerate(context.pages[:-1]):
        person.keep(page, str(number))
    # A test that kept a picture of its last page did so at a better moment.
    if context.pages and not (ARTIFACTS / f"{name}.png").exists():
        person.keep(context.pages[-1])
    context.close()
    assert not person.faults


@pytest.fixture(scope="session")
def prefect(site) -> Callable[[str, dict], list[dict]]:
    """Ask Prefect's API, to know what its pages must show."""

    def ask(what: str, wanted: dict | None = None) -> list[dict]:
        found = httpx.post(f"{site.settings.prefect_url}/{what}/filter", json=wanted or {}, timeout=30)
        return found.raise_for_status().json()

    return ask
