"""Settings come from the environment, and say so when they are wrong."""

from pathlib import Path

import pytest

from noria.errors import SettingsError
from noria.settings import load_settings
from noria.variables import child_environment, export


def test_everything_lies_below_one_home(monkeypatch, tmp_path):
    monkeypatch.setenv("NORIA_HOME", str(tmp_path))
    settings = load_settings()
    for folder in (settings.lake, settings.evidently, settings.bundles, settings.serving):
        assert folder.is_relative_to(tmp_path)


def test_a_relative_home_becomes_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NORIA_HOME", raising=False)
    assert load_settings().root == tmp_path / ".noria"


def test_the_cache_is_not_in_the_home(monkeypatch):
    monkeypatch.setenv("NORIA_CACHE", "~/somewhere")
    assert load_settings().downloads == Path.home() / "somewhere"


@pytest.mark.parametrize(("name", "value"), [("NORIA_POLL_SECONDS", "9"), ("NORIA_PROVIDERS", "tpu")])
def test_a_wrong_value_names_its_variable(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name):
        load_settings()


def test_imports_are_split():
    assert load_settings(workloads="a:A, b:B,").imports == ("a:A", "b:B")


def test_a_child_gets_this_environment_and_more(monkeypatch):
    monkeypatch.setenv("NORIA_TEST_ONLY", "before")
    assert child_environment(NORIA_OTHER="x")["NORIA_TEST_ONLY"] == "before"
    export(NORIA_TEST_ONLY="after")
    assert child_environment()["NORIA_TEST_ONLY"] == "after"


def test_settings_pass_through_what_looks_into_them():
    """Prefect looks into the parameters of a task with `dict`, which asks whatever has an attribute `keys` for them."""
    assert dict(load_settings())["ack"] == "fast"
