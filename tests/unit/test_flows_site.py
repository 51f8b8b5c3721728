"""Where everything of a home is: addresses found, settings passed on, workloads named, the time that it is."""

import os
from datetime import UTC, datetime

import pytest
from ferry import END, WORKLOAD, Ferry

from flows.site import STATE, Site, now_of, read_state, write_state
from noria.errors import ServiceError, WorkloadError
from noria.settings import Settings

SERVICES = {name: {"url": f"http://127.0.0.1:{port}"} for name, port in (("mlflow", 1), ("prefect", 2), ("serving", 3))}


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("NORIA_")]:
        monkeypatch.delenv(name)
    return tmp_path


def test_state_is_replaced_whole_and_read_whatever_it_is(home):
    assert read_state(home) == {}
    write_state(home, {"phase": "ready"})
    write_state(home, {"phase": "stopped"})
    assert read_state(home) == {"phase": "stopped"}
    assert [path.name for path in home.iterdir()] == [STATE]
    (home / STATE).write_text('{"pha')
    assert read_state(home) == {}


def test_addresses_of_the_running_stack_are_found(home):
    write_state(home, {"phase": "ready", "services": SERVICES})
    found = Site(Settings(home=home)).found()
    assert found.address("mlflow_uri") == "http://127.0.0.1:1"
    assert found.address("prefect_url") == "http://127.0.0.1:2/api"
    assert found.address("serving_url") == "http://127.0.0.1:3"
    with pytest.raises(ServiceError, match="NORIA_RAY_ADDRESS"):
        found.address("ray_address")


def test_an_address_that_is_set_wins(home):
    write_state(home, {"phase": "ready", "services": SERVICES})
    assert Site(Settings(home=home, mlflow_uri="http://elsewhere")).found().address("mlflow_uri") == "http://elsewhere"


@pytest.mark.parametrize("state", [{}, {"phase": "stopped", "services": SERVICES}])
def test_without_a_stack_the_sentence_says_what_to_do(home, state):
    if state:
        write_state(home, state)
    with pytest.raises(ServiceError, match="noria up"):
        Site(Settings(home=home)).found().address("mlflow_uri")


def test_another_process_sees_the_same_site(home, monkeypatch):
    given = Site(Settings(home=home, workloads="ferry:WORKLOAD", ingest=False))
    passed = given.forwarded()
    assert passed == {"NORIA_HOME": str(home), "NORIA_WORKLOADS": "ferry:WORKLOAD", "NORIA_INGEST": "False"}
    for name, value in passed.items():
        monkeypatch.setenv(name, value)
    assert Settings().model_dump() == given.settings.model_dump()


def test_a_workload_goes_by_name_or_import_string(home):
    site = Site(Settings(home=home, workloads="ferry:WORKLOAD"))
    assert site.path("ferry") == "ferry:WORKLOAD"
    assert site.path("ferry:WORKLOAD") == "ferry:WORKLOAD"
    assert isinstance(site.workload("ferry"), Ferry)
    with pytest.raises(WorkloadError, match="no workload 'bus'; known are ferry"):
        site.path("bus")


def test_one_broken_workload_does_not_hide_the_others(home):
    site = Site(Settings(home=home, workloads="nowhere:WORKLOAD, ferry:WORKLOAD"))
    assert site.path("ferry") == "ferry:WORKLOAD"
    with pytest.raises(WorkloadError, match="nowhere:WORKLOAD, ferry"):
        site.path("bus")


class Live(Ferry):
    until = None


def test_now_is_as_given_else_the_streams_end_else_the_clock():
    assert now_of(WORKLOAD, "2024-03-01") == datetime(2024, 3, 1, tzinfo=UTC)
    assert now_of(WORKLOAD, "2024-03-01T02:00:00+02:00") == datetime(2024, 3, 1, tzinfo=UTC)
    assert now_of(WORKLOAD, END) is END
    assert now_of(WORKLOAD) == now_of(WORKLOAD, "") == END
    before = datetime.now(UTC)
    assert before <= now_of(Live()) <= datetime.now(UTC)
