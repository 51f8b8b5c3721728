"""Who gets in: the keys file, roles, routes, and the guard that asks all of them. Deny by default."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noria.errors import SettingsError
from noria.settings import load_settings
from serving import access, keys
from serving.access import Keys, check_exposure, role_of
from serving.guard import Guard, Protection, protection
from serving.hosts import origin_of
from serving.wire import Refusal

NOW = "2026-01-01T00:00:00+00:00"
ROUTES = {
    ("GET", "/v2/health/live"): None,
    ("HEAD", "/v2/health/live"): None,
    ("GET", "/v2/health/ready"): None,
    ("POST", "/v2/health/ready"): "operate",
    ("GET", "/"): "predict",
    ("GET", "/docs"): "predict",
    ("GET", "/openapi.json"): "predict",
    ("GET", "/status"): "predict",
    ("GET", "/v2"): "predict",
    ("POST", "/predict/taxi"): "predict",
    ("POST", "/feedback/taxi"): "feedback",
    ("GET", "/v2/models/taxi"): "predict",
    ("GET", "/v2/models/taxi/ready"): "predict",
    ("GET", "/v2/models/taxi/stats"): "predict",
    ("POST", "/v2/models/taxi/infer"): "predict",
    ("GET", "/v2/models/taxi/versions/3"): "predict",
    ("GET", "/v2/models/taxi/versions/3/ready"): "predict",
    ("POST", "/v2/models/taxi/versions/3/infer"): "predict",
    ("POST", "/v2/models/taxi/load"): "operate",
    ("POST", "/v2/models/taxi/versions/3/unload"): "operate",
    ("GET", "/metrics"): "operate",
    ("POST", "/v2/repository/index"): "operate",
    ("POST", "/v2/repository/models/taxi/load"): "operate",
    ("POST", "/v2/repository/models/taxi/unload"): "operate",
    ("GET", "/nothing"): "operate",
    ("POST", "/predict/taxi/.."): "operate",
    ("POST", "/predict/../metrics"): "operate",
    ("GET", "//metrics"): "operate",
    ("GET", ""): "operate",
    ("OPTIONS", "*"): "operate",
    ("POST", "/inference.GRPCInferenceService/ServerLive"): None,
    ("POST", "/inference.GRPCInferenceService/ServerReady"): None,
    ("POST", "/inference.GRPCInferenceService/ModelReady"): "predict",
    ("POST", "/inference.GRPCInferenceService/ServerMetadata"): "predict",
    ("POST", "/inference.GRPCInferenceService/ModelMetadata"): "predict",
    ("POST", "/inference.GRPCInferenceService/ModelInfer"): "predict",
    ("POST", "/inference.GRPCInferenceService/RepositoryIndex"): "operate",
    ("POST", "/inference.GRPCInferenceService/RepositoryModelLoad"): "operate",
    ("POST", "/inference.GRPCInferenceService/RepositoryModelUnload"): "operate",
    ("POST", "/inference.GRPCInferenceService/Other"): "operate",
    ("POST", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"): "operate",
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "home" / "serving" / "keys.json"


def bearer(key):
    return b"Bearer " + key.encode()


def refused(status, call, *given, **more):
    with pytest.raises(Refusal) as caught:
        call(*given, **more)
    assert caught.value.status == status, caught.value
    return caught.value


@pytest.fixture
def clock(clock_of):
    return clock_of(access)


@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
def test_every_route_needs_its_role(route):
    assert role_of(*route) == ROUTES[route]


@given(st.text(), st.text())
def test_only_health_is_public(method, path):
    public = {route for route, role in ROUTES.items() if role is None}
    assert role_of(method, path) is not None or (method, path) in public


@given(st.lists(st.sampled_from(["v2", "models", "taxi", "versions", "3", "infer", "load", "metrics", "", ".."])))
def test_what_changes_the_server_is_never_open_to_a_client(parts):
    path = "/" + "/".join(parts)
    if {"load", "metrics"} & {*parts[:1], *parts[3:]} and parts[:2] != ["v2", "models"]:
        assert role_of("POST", path) == "operate"
    if parts[-1:] == ["load"] and len(parts) > 3:
        assert role_of("POST", path) == "operate"


def test_a_key_opens_what_its_roles_say(path):
    key = keys.add(path, "shop", ["predict", "feedback"], NOW, rate=5)
    found = Keys.load(path)
    for role in ("predict", "feedback"):
        principal = found.check(bearer(key), role)
        assert (principal.name, principal.rate) == ("shop", 5)
    refusal = refused(403, found.check, bearer(key), "operate")
    assert "role operate; 'shop' has predict, feedback" in str(refusal)
    assert b'error="insufficient_scope"' in dict(refusal.headers)[b"www-authenticate"]
    assert found.check(None, None).roles == frozenset()
    assert found.check(b"bearer   " + key.encode() + b" ", "predict").name == "shop"


HEADERS = [None, b"", b"Bearer", b"Bearer ", b"Basic abc", b"Bearer noria_", b"noria_x", b"Bearer \xff\xfe"]


@pytest.mark.parametrize("header", [*HEADERS, b"Bearer " + b"x" * 99999])
def test_without_a_known_key_nobody_gets_in(path, header):
    keys.add(path, "shop", ["predict"], NOW)
    refusal = refused(401, Keys.load(path).check, header, "predict")
    assert dict(refusal.headers)[b"www-authenticate"].startswith(b"Bearer")


def test_a_key_that_only_begins_like_one_is_refused(path, monkeypatch):
    """The index holds the first bytes of a hash; the whole is compared, in constant time."""
    monkeypatch.setattr(access, "INDEX_BYTES", 0)  # as if every key began alike
    keys.add(path, "shop", ["predict"], NOW)
    refused(401, Keys.load(path).check, bearer("noria_" + "A" * 43), "predict")
    assert "compare_digest" in access.Keys.identify.__code__.co_names


def test_without_a_file_everybody_gets_in_unless_keys_are_required(path):
    assert Keys.load(path).check(None, "operate").name == ""
    refused(401, Keys.load(path, required=True).check, None, "predict")


def test_the_file_holds_no_key_and_is_the_owners(path):
    key = keys.add(path, "shop", ["predict"], NOW)
    assert key.startswith("noria_") and len(key) == len("noria_") + 43
    assert key not in path.read_text() and key[6:] not in path.read_text()
    for found in path.parent.iterdir():
        assert stat.S_IMODE(found.stat().st_mode) == 0o600, found
    path.chmod(0o620)
    with pytest.raises(SettingsError, match="chmod 600"):
        Keys.load(path)


def test_a_revoked_key_stops_working_within_a_second_and_a_new_one_starts(path, clock):
    first = keys.add(path, "shop", ["predict"], NOW)
    found = Keys.load(path)
    assert found.check(bearer(first), "predict").name == "shop"

    def works(key):
        try:
            return found.on and found.check(bearer(key), "predict").name == "shop"
        except Refusal:
            return False

    keys.revoke(path, "shop")
    clock.seconds += 1
    assert not works(first)
    refused(401, found.check, None, "predict")  # it was the last one: the door does not open
    second = keys.add(path, "shop", ["predict"], NOW)
    clock.seconds += 1
    assert works(second)
    path.unlink()
    clock.seconds += 1
    assert not works(second)
    refused(401, found.check, None, "predict")


def test_the_first_key_closes_a_server_that_runs(path, clock):
    found = Keys.load(path)
    assert not found.on
    keys.add(path, "shop", ["predict"], NOW)
    clock.seconds += 1
    assert found.on
    refused(401, found.check, None, "predict")


def test_a_slip_in_the_file_leaves_the_keys_as_they_were(path, caplog, clock):
    key = keys.add(path, "shop", ["predict"], NOW)
    found = Keys.load(path)
    path.write_text("{")
    clock.seconds += 1
    assert found.on
    assert "not a keys file" in caplog.text
    assert found.check(bearer(key), "predict").name == "shop"


def test_the_file_is_looked_at_twice_a_second_at_most(path, monkeypatch, clock):
    key = keys.add(path, "shop", ["predict"], NOW)
    found, looked = Keys.load(path), []
    monkeypatch.setattr(access, "_mark", lambda path: looked.append(path) or found._mark)
    for _ in range(1000):
        found.on  # noqa: B018
        found.check(bearer(key), "predict")
        clock.seconds += 0.002
    assert len(looked) == 4


BAD = [
    "", "[]", "{}", '{"keys": 3}', '{"keys": [{}]}',
    '{"keys": [{"name": "a", "sha256": "zz", "roles": ["predict"], "created": "x"}]}',
    '{"keys": [{"name": "a", "sha256": "%s", "roles": ["root"], "created": "x"}]}' % ("0" * 64),
    '{"keys": [{"name": "a", "sha256": "%s", "roles": [], "created": "x"}]}' % ("0" * 64),
    '{"keys": [{"name": "a", "sha256": "%s", "roles": ["predict"], "created": "x", "rate": -1}]}' % ("0" * 64),
    '{"keys": [{"name": "a b", "sha256": "%s", "roles": ["predict"], "created": "x"}]}' % ("0" * 64),
]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_keys_file_is_said_at_the_start(tmp_path, text):
    (tmp_path / "keys.json").write_text(text)
    (tmp_path / "keys.json").chmod(0o600)
    with pytest.raises(SettingsError, match="is not a keys file"):
        Keys.load(tmp_path / "keys.json")


def test_wrong_commands_get_sentences(path):
    keys.add(path, "shop", ["predict"], NOW)
    for call, sentence in (
        (lambda: keys.add(path, "shop", ["predict"], NOW), "already"),
        (lambda: keys.add(path, "a b", ["predict"], NOW), "no name for a key"),
        (lambda: keys.add(path, "a", ["root"], NOW), "'root' is no role"),
        (lambda: keys.add(path, "a", [], NOW), "needs a role"),
        (lambda: keys.add(path, "a", ["predict"], NOW, rate=0), "above 0"),
        (lambda: keys.revoke(path, "stop"), "known are: shop"),
    ):
        with pytest.raises(SettingsError, match=sentence):
            call()
    assert [key.name for key in keys.read(path)] == ["shop"]


ADD = """
import sys
from pathlib import Path
from serving import keys
for number in range(20):
    keys.add(Path(sys.argv[1]), f"{sys.argv[2]}{number}", ["predict"], "x")
"""


def test_two_processes_that_write_at_once_lose_nothing(path):
    running = [subprocess.Popen([sys.executable, "-c", ADD, str(path), name]) for name in "abc"]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert {key.name for key in keys.read(path)} == {f"{name}{number}" for name in "abc" for number in range(20)}


def test_a_command_that_was_killed_half_way_hurts_nothing(path):
    key = keys.add(path, "shop", ["predict"], NOW)
    (path.parent / ".keys.json.aside").write_text('{"keys": [')
    keys.add(path, "other", ["operate"], NOW)
    assert Keys.load(path).check(bearer(key), "predict").name == "shop"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_keys(path, host):
    assert check_exposure(host, path) is False


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "noria.example.org", "", "localhost.example.org"])
def test_other_addresses_need_keys_or_the_word_open(path, host):
    with pytest.raises(SettingsError, match="--open"):
        check_exposure(host, path)
    assert check_exposure(host, path, is_open=True) is False
    keys.add(path, "shop", ["predict"], NOW)
    assert check_exposure(host, path) is True


def guard_of(tmp_path, host="127.0.0.1", **more):
    settings = load_settings(home=tmp_path / "home", **more)
    return Guard(protection(settings, {}, host))


def test_the_guard_lets_everybody_in_where_keys_are_off(tmp_path):
    guard = guard_of(tmp_path)
    for method, route in ROUTES:
        assert guard.admit(method, route, b"localhost:8080", None, "127.0.0.1").name == ""


@pytest.mark.parametrize("role", keys.ROLES)
def test_the_guard_walks_every_route(tmp_path, path, role):
    key, guard = keys.add(path, "shop", [role], NOW), guard_of(tmp_path)
    for (method, route), needed in ROUTES.items():
        ask = (method, route, b"localhost")
        if needed is None:
            assert guard.admit(*ask, None, "127.0.0.1").roles == frozenset()
            continue
        refused(401, guard.admit, *ask, None, "127.0.0.1")
        refused(401, guard.admit, *ask, bearer("noria_" + "A" * 43), "127.0.0.1")
        if needed == role:
            assert guard.admit(*ask, bearer(key), "127.0.0.1").name == "shop"
        else:
            refused(403, guard.admit, *ask, bearer(key), "127.0.0.1")
        if method == "POST" and route.count(".") == 1:
            refused(401, guard.call, route, None, "127.0.0.1")


def test_the_guard_limits_a_key_and_never_a_probe(tmp_path, path):
    key, guard = keys.add(path, "shop", ["predict"], NOW, rate=2), guard_of(tmp_path)
    ask = ("POST", "/predict/taxi", b"localhost", bearer(key), "127.0.0.1")
    guard.admit(*ask)
    guard.admit(*ask)
    assert dict(refused(429, guard.admit, *ask).headers)[b"retry-after"] == b"1"
    for _ in range(10):
        guard.admit("GET", "/v2/health/live", b"localhost", None, "127.0.0.1")


def test_the_guard_limits_an_address_where_keys_are_off(tmp_path):
    guard = guard_of(tmp_path, rate=1)
    ask = ("POST", "/predict/taxi", b"localhost", None)
    guard.admit(*ask, "10.0.0.1")
    guard.admit(*ask, "10.0.0.2")
    refused(429, guard.admit, *ask, "10.0.0.1")
    guard.admit("GET", "/v2/health/live", b"localhost", None, "10.0.0.1")


def test_the_guard_refuses_foreign_hosts_before_it_looks_at_keys(tmp_path, path):
    key, guard = keys.add(path, "shop", ["predict"], NOW), guard_of(tmp_path)
    for _ in range(2):
        refused(421, guard.admit, "GET", "/status", b"evil.example.org", bearer(key), "127.0.0.1")
    refused(400, guard.admit, "GET", "/status", None, bearer(key), "127.0.0.1")
    for number in range(500):
        refused(421, guard.admit, "GET", "/status", b"h%d" % number, None, "127.0.0.1")
        guard.admit("GET", "/v2/health/live", b"localhost:%d" % number, None, "127.0.0.1")
    assert len(guard._known) <= 64


def test_a_probe_without_a_host_is_answered(tmp_path):
    guard = guard_of(tmp_path)  # HTTP/1.0 does not ask for one
    for route in ("/v2/health/live", "/v2/health/ready"):
        guard.admit("GET", route, None, None, "127.0.0.1")
        refused(421, guard.admit, "GET", route, b"evil.example.org", None, "127.0.0.1")


PAGES = [
    ({}, True),
    ({b"origin": b"http://localhost:8080"}, True),
    ({b"origin": b"https://127.0.0.1"}, True),
    ({b"origin": b"https://shop.example"}, True),
    ({b"origin": b"http://localhost:8080", b"sec-fetch-site": b"same-origin"}, True),
    ({b"sec-fetch-site": b"none"}, True),
    ({b"origin": b"https://evil.example"}, False),
    ({b"origin": b"https://localhost.evil.example"}, False),
    ({b"origin": b"null"}, False),
    ({b"origin": b""}, False),
    ({b"sec-fetch-site": b"cross-site"}, False),
]


@pytest.mark.parametrize(("headers", "welcome"), PAGES)
def test_a_page_of_another_site_gives_no_orders(tmp_path, headers, welcome):
    guard = guard_of(tmp_path, hosts="shop.example")
    for path in ("/v2/repository/models/taxi/unload", "/v2/models/taxi/infer", "/predict/taxi", "/feedback/taxi"):
        ask = ("POST", path, b"localhost", None, "127.0.0.1")
        if welcome:
            guard.admit(*ask, origin=origin_of(headers))
        else:
            refused(403, guard.admit, *ask, origin=origin_of(headers))
    guard.admit("GET", "/status", b"localhost", None, "127.0.0.1", origin=origin_of(headers))


def test_a_page_with_a_key_is_no_forgery(tmp_path, path):
    key, guard = keys.add(path, "shop", ["predict"], NOW), guard_of(tmp_path)
    guard.admit("POST", "/predict/taxi", b"localhost", bearer(key), "127.0.0.1", origin=b"https://app.example")


def test_a_configured_file_that_is_missing_lets_nobody_in(tmp_path):
    guard = guard_of(tmp_path, api_keys=str(tmp_path / "elsewhere.json"))
    refused(401, guard.admit, "GET", "/status", b"localhost", None, "127.0.0.1")


SLIPS = [lambda path: path.write_text("{"), lambda path: path.chmod(0o664), lambda path: path.write_text("")]


@pytest.mark.parametrize("slip", SLIPS)
def test_a_worker_that_starts_during_a_slip_lets_nobody_in_until_it_is_mended(tmp_path, path, slip, caplog, clock):
    key, settings = keys.add(path, "shop", ["predict"], NOW), load_settings(home=tmp_path / "home")
    text, made = path.read_text(), protection(settings, {}, "127.0.0.1")  # where no key would be asked for
    assert not made.required
    slip(path)
    guard = Guard(made)
    ask = ("POST", "/predict/taxi", b"localhost", bearer(key), "127.0.0.1")
    refused(401, guard.admit, *ask)
    assert str(path) in caplog.text
    guard.admit("GET", "/v2/health/live", b"localhost", None, "127.0.0.1")
    with pytest.raises(SettingsError):
        protection(settings, {}, "127.0.0.1")  # a server's own start says so
    path.write_text(text)
    path.chmod(0o600)
    clock.seconds += 1
    assert guard.admit(*ask).name == "shop"


def test_protection_crosses_to_a_worker_as_json(tmp_path, path):
    settings = load_settings(home=tmp_path / "home", hosts="noria.example.org", rate=7, access_log="-")
    made = protection(settings, {"NORIA_LIMIT_QUEUE": "5"}, "127.0.0.1", workers=4)
    assert Protection.from_json(made.to_json()) == made
    assert made.limits.queue == 5 and made.workers == 4
    assert "noria.example.org" in json.loads(made.to_json())["hosts"]
    with pytest.raises(SettingsError, match="--open"):
        protection(settings, {}, "0.0.0.0")
    assert not protection(settings, {}, "0.0.0.0", is_open=True).required
    keys.add(path, "shop", ["predict"], NOW)
    assert protection(settings, {}, "0.0.0.0").required


def test_a_known_key_is_checked_in_microseconds(path):
    for number in range(50):
        keys.add(path, f"other{number}", ["predict"], NOW)
    header, found = bearer(keys.add(path, "shop", ["predict"], NOW)), Keys.load(path)

    def seconds(count=2000):
        began = time.perf_counter()
        for _ in range(count):
            found.check(header, role_of("POST", "/v2/models/taxi/infer"))
        return (time.perf_counter() - began) / count

    # 1.5 us where nothing else runs; this says that it is no file and no slow hash.
    assert min(seconds() for _ in range(5)) < 20e-6
