"""The home page's line about a challenger: what a person reads in each state."""

from __future__ import annotations

import re

import pytest
from jinja2 import Environment, PackageLoader

from flows.home import _shadow
from flows.shadow import standing
from flows.site import Site
from noria.settings import Settings
from serving import shadow_state
from serving.shadow_state import Status

SINCE = "2020-03-15T08:30:00.000+00:00"
SHADOWING = Status(
    2, 0.25, "shadowing", f"shadowing since {SINCE}, share 0.25", since=SINCE, rows=12_345, agreement=0.975,
    difference=0.123456, errors=7, error="It has no finite score for some rows.", dropped=1_000, restarts=2,
)  # fmt: skip


def line(site, status):
    workload = {"name": "trips", "champion": 1, "pages": {}, "runs": {"deployments": [], "last": [], "next": []}}
    page = Environment(loader=PackageLoader("flows", "pages"), autoescape=True, trim_blocks=True).get_template(
        "home.html"
    )
    shown = page.render(workloads=[{**workload, "shadow": status and _shadow(site, status, "trips")}], services=[])
    found = re.search(r'<p class="soft shadow">(.*?)</p>', shown, re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", "", found[1]).split()) if found else ""


@pytest.fixture
def site(tmp_path):
    return Site(Settings(home=tmp_path, mlflow_uri="http://127.0.0.1:5000"))


def test_what_a_person_reads(site):
    assert line(site, SHADOWING) == (
        "Challenger: version 2 shadows 25% of the traffic since 2020-03-15 08:30: 12,345 rows, "
        "the same action in 97.5%, scores 0.123 apart on average; "
        "7 rows it could not answer (last: It has no finite score for some rows.), "
        "1,000 dropped · its process ended 2 × by itself · noria shadow trips"
    )
    assert "failed: It is broken." in line(site, Status(3, 0.0, "failed", "failed: It is broken."))
    assert "is loading as a shadow" in line(site, Status(3, 1.0, "loading", "loading as a shadow"))
    assert line(site, None) == ""


def test_how_it_stands_is_read_where_the_server_runs(site):
    assert standing(site) == {}
    shadow_state.write(site.settings.serving / "shadow" / "status.json", {"trips": SHADOWING})
    assert standing(site) == {"trips": SHADOWING}
