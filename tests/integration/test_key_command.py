"""`noria key`: what a person sees, and what is left in the home."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving.access import Keys
from serving.wire import Refusal

NORIA = str(Path(sys.executable).with_name("noria"))


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def noria(home):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NORIA_")}

    def run(*arguments, **more):
        return subprocess.run(
            [NORIA, "key", *arguments],
            env={**clean, "NORIA_HOME": str(home), "COLUMNS": "200", **more},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    return run


def test_a_key_is_made_listed_and_revoked(noria, home):
    assert "no keys" in noria("list").stdout
    made = noria("add", "shop", "--role", "predict", "--role", "feedback", "--rate", "50")
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    assert "Keep it now" in made.stderr
    path = home / "serving" / "keys.json"
    assert Keys.load(path).check(b"Bearer " + key.encode(), "feedback").rate == 50
    shown = noria("list")
    assert "shop" in shown.stdout and "predict, feedback" in shown.stdout and "50/s" in shown.stdout
    assert noria("revoke", "shop").returncode == 0
    with pytest.raises(Refusal, match="not known here"):
        Keys.load(path).check(b"Bearer " + key.encode(), "feedback")
    actions = [json.loads(line) for line in (home / "audit.jsonl").read_text().splitlines()]
    assert [(line["action"], line["name"], line["user"]) for line in actions] == [
        ("key add", "shop", os.getuid()), ("key revoke", "shop", os.getuid()),
    ]  # fmt: skip
    assert not [file for file in home.rglob("*") if file.is_file() and key[6:] in file.read_text()]


def test_another_file_by_the_environment(noria, tmp_path):
    elsewhere = tmp_path / "elsewhere" / "k.json"
    assert noria("add", "shop", "--role", "operate", NORIA_API_KEYS=str(elsewhere)).returncode == 0
    assert [key["roles"] for key in json.loads(elsewhere.read_text())["keys"]] == [["operate"]]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("add", "shop", "--role", "root"), 1, "'root' is no role; roles are predict, feedback, operate."),
        (("add", "a b", "--role", "predict"), 1, "no name for a key"),
        (("revoke", "shop"), 1, "There is no key 'shop'"),
        (("add", "shop"), 2, "--role"),
        ((), 2, "revoke"),
    ],
)
def test_mistakes_get_a_sentence(noria, home, arguments, code, sentence):
    said = noria(*arguments)
    assert said.returncode == code
    told = said.stdout + said.stderr
    assert sentence in told
    assert "Traceback" not in told
    assert not (home / "serving" / "keys.json").exists()
