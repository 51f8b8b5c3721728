"""The server on Ray as `noria cluster` starts it: real Ray, real MLflow, and replicas that die while requests run."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import onnx
import psutil
import pytest

from noria.errors import RegistryError
from noria.lake import Lake
from registry.proof import Proof
from registry.store import Store
from serving import state
from serving.ingress import place
from serving.state import Desired, State
from serving.telling import TAG

RECORD = {"pickup": "2020-03-15T00:00:00", "vendor": "A", "distance": 2.0, "zone": 1}
pytestmark = pytest.mark.timeout(900)
SCORES = {1: 3.0, 2: 13.0}
PAUSE_SECONDS = 0.01
"""Of each client between two requests, so that what the cluster does beside answering has a share of two cores."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait(condition, seconds=120.0, what=""):
    began = time.monotonic()
    while True:
        try:
            if condition():
                return time.monotonic() - began
        except (httpx.HTTPError, RegistryError):
            pass
        assert time.monotonic() - began < seconds, f"not within {seconds} s: {what() if callable(what) else what}"
        time.sleep(0.05)


class Cluster:
    """`noria cluster` in a process."""

    def __init__(self, mlflow_url, *options, **variables):
        # Short: Ray and HAProxy keep Unix sockets in it, whose paths are limited.
        self.home, self.port = Path(tempfile.mkdtemp(prefix="noria-test-")), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("NORIA_", "RAY_"))}
        self.environment = {**kept, "NORIA_HOME": str(self.home), "NORIA_MLFLOW_URI": mlflow_url, "COLUMNS": "200"}
        self.environment |= variables
        command = [sys.executable, "-m", "flows.cli", "cluster", "--port", str(self.port), "--cpus", "0.5", *options]
        with (self.home / "log").open("wb") as log:
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def log(self):
        return (self.home / "log").read_text()

    def start(self):
        def ready():
            assert self.process.poll() is None, self.log()[-5000:]
            return "serving on http" in self.log()

        return wait(ready, 240, lambda: self.log()[-5000:])

    def stop(self, by=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(by)
            self.process.wait(180)
        return self.process.returncode

    def members(self):
        """Every process of this Ray."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("NORIA_HOME") == str(self.home):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def replicas(self):
        """The processes of the replicas, by pid."""
        found = {}
        for one in self.members():
            with suppress(psutil.NoSuchProcess):  # or a zombie, which psutil takes for a kind of that
                if "ServeReplica:noria:noria" in " ".join(one.cmdline()):
                    found[one.pid] = one
        return found

    def listeners(self):
        found = set()
        for one in self.members():
            try:
                found |= {
                    (one.name(), at.laddr.ip.removeprefix("::ffff:"), at.laddr.port)
                    for at in one.net_connections("inet")
                    if at.status == psutil.CONN_LISTEN
                }
            except psutil.NoSuchProcess:
                continue
        return found

    def versions(self):
        """By replica, as its ids tell, the version that answers. A dozen calls reach both, nearly always."""
        url = f"{self.url}/predict/trips"
        replies = [httpx.post(url, json=[RECORD], timeout=40).raise_for_status().json() for _ in range(12)]
        return {reply["predictions"][0]["id"][11:14]: reply["version"] for reply in replies}

    def settled(self, version):
        """Whether the replicas serve the version that was asked for last, and it is this one."""
        folder = self.home / "rollout"
        asked = state.read(folder / "desired", Desired).get("trips")
        reached = state.read(folder / "state", State).get("trips")
        return asked and reached and (asked.version, asked.asked) == (version, reached.asked)

    def logged(self, schema):
        """Prediction ids as they lie in the table, duplicates included."""
        rows = Lake(str(self.home / "lake"), "trips", schema)._read("predictions", None, None, "event_time")
        return rows.column("prediction_id").to_pylist()


class Load:
    """Clients that hardly pause; what they were answered."""

    def __init__(self, url, clients=4):
        self.url, self.answers, self.failures, self.stop = url, [], [], threading.Event()
        self.threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def _run(self):
        with httpx.Client(base_url=self.url, timeout=40) as client:
            while not self.stop.is_set():
                try:
                    reply = client.post("/predict/trips", json=[RECORD] * 3)
                    if reply.status_code == 200:
                        content = reply.json()
                        found = [(one["id"], one["prediction"]) for one in content["predictions"]]
                        self.answers.append((time.monotonic(), content["version"], found))
                    else:
                        self.failures.append((reply.status_code, reply.text[:200]))
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                self.stop.wait(PAUSE_SECONDS)

    def ids(self):
        return [name for _, _, found in list(self.answers) for name, _ in found]

    def wait_for(self, more):
        target = len(self.answers) + more
        wait(lambda: len(self.answers) >= target, what=lambda: f"{more} answers; failures: {self.failures[:3]}")

    def wait_for_version(self, version):
        """Until what was answered last came from this version only."""
        wait(
            lambda: {one[1] for one in self.answers[-40:]} == {version},
            what=lambda: f"{[one[1] for one in self.answers[-40:]]}; failures: {self.failures[:3]}",
        )

    def assert_all_answered(self, cluster):
        assert not self.failures, f"{self.failures[:5]}; the cluster said:\n{cluster.log()[-3000:]}"


@pytest.fixture(scope="module")
def registered(mlflow_url, make_contents, trips_graph, trips_schema, trips):
    """Versions 1 and 2, whose scores differ by 10; version 1 is the champion."""
    other = onnx.load_from_string(trips_graph)
    (levels,) = (node for node in other.graph.node if node.op_type == "LabelEncoder")
    next(entry for entry in levels.attribute if entry.name == "values_floats").floats[1] = 11.0
    model = other.SerializeToString()
    store = Store(mlflow_url)
    for contents in (make_contents(), make_contents(model=model, proof=Proof.make(model, trips_schema, trips))):
        with store.run("trips", "by hand") as run:
            store.register(run, contents)
    store.move("trips", "champion", 1)
    return store


@contextmanager
def started(mlflow_url, *options, **variables):
    made = Cluster(mlflow_url, *options, **variables)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        for left in made.members():
            left.kill()
        shutil.rmtree(place(made.home), ignore_errors=True)
        shutil.rmtree(made.home, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(registered):
    with started(registered.uri, NORIA_ACK="durable") as made:
        yield made


@pytest.fixture
def champion(cluster, registered):
    """Both replicas answer with version 1, and nothing else is asked of them."""
    registered.move("trips", "champion", 1)
    registered.drop("trips", "previous")
    wait(lambda: list(cluster.versions().values()) == [1, 1], what=cluster.versions)
    wait(lambda: cluster.settled(1) and _said(registered, 1).startswith("serving since"))
    return cluster


def _said(store, version):
    """What the server did with the version, by its tag."""
    return store.get("trips", version).tags.get(TAG, "")


def test_the_same_app_answers_through_ray(champion):
    with httpx.Client(base_url=champion.url, timeout=40) as client:
        reply = client.post("/predict/trips", json=[RECORD, {**RECORD, "vendor": "B"}])
        assert [one["prediction"] for one in reply.json()["predictions"]] == [3.0, 4.0]
        assert client.get("/v2/health/ready").json() == {"ready": True}
        assert client.post("/predict/nothing", json=[RECORD]).status_code == 404
        assert client.post("/predict/trips", content=b"[" * (11 * 2**20)).status_code == 413
        label = [{"id": reply.json()["predictions"][0]["id"], "label": 4, "time": "2020-04-01"}]
        taken = [client.post("/feedback/trips", json=label).status_code for _ in range(8)]
    assert taken == [200] * 8  # whichever replica made the id, whichever hears of it
    assert len(champion.replicas()) == 2
    assert not [at for at in champion.listeners() if at[1] not in ("127.0.0.1", "::1")]


def test_moving_the_alias_under_load_fails_no_request(champion, registered):
    with Load(champion.url) as load:
        load.wait_for(50)
        for number in (2, 1, 2):
            registered.move("trips", "champion", number)
            moved = time.monotonic()
            load.wait_for_version(number)
            sys.stdout.write(f"\nversion {number} answers everywhere {time.monotonic() - moved:.1f} s after the move")
            load.wait_for(50)
            wait(lambda other=3 - number: _previous(registered) == other)
    sys.stdout.write(f"\n{len(load.answers)} answers, {len(load.failures)} failures while the alias moved three times")
    load.assert_all_answered(champion)
    for _, version, found in load.answers:
        assert {score for _, score in found} == {SCORES[version]}
    wait(lambda: "replaced version 1" in _said(registered, 2), what=lambda: _said(registered, 2))


def _previous(store):
    found = store.version("trips", "previous")
    return found.number if found else None


def test_a_version_that_fails_its_proof_reaches_no_request(champion, registered, make_contents, trips_graph, trips):
    contents = make_contents()
    wrong = Proof(contents.proof.records, [value + 1 for value in contents.proof.scores])
    with registered.run("trips", "broken") as run:
        broken = registered.register(run, make_contents(proof=wrong)).number
    before = set(champion.replicas())
    with Load(champion.url) as load:
        load.wait_for(20)
        registered.move("trips", "champion", broken)
        wait(lambda: "failed" in _said(registered, broken), what=lambda: champion.log()[-3000:])
        load.wait_for(50)
    load.assert_all_answered(champion)
    assert {version for _, version, _ in load.answers} == {1}
    assert set(champion.replicas()) == before, champion.log()[-3000:]  # nobody was replaced for it


def test_a_killed_replica_costs_its_own_requests_at_most_and_no_logged_row(champion, trips_schema):
    """With `ack=fast` it may take along what it answered within the last flush interval."""
    before = champion.replicas()
    with Load(champion.url, clients=8) as load:
        load.wait_for(100)
        next(iter(before.values())).kill()
        load.wait_for(100)
        wait(lambda: champion.replicas().keys() - before.keys(), what="a new replica")
        load.wait_for(100)
    failed = Counter(str(one)[:120] for one in load.failures)
    sys.stdout.write(
        f"\n{len(load.answers)} answers, {len(load.failures)} failures when a replica was killed: {dict(failed)}"
    )
    # What the dead one was answering: a client has one request in flight, and may be sent there once more before the
    # router knows.
    assert len(load.failures) <= 16, failed
    wait(lambda: set(load.ids()) <= set(champion.logged(trips_schema)), what="what was answered is in the lake")
    assert max(Counter(champion.logged(trips_schema)).values()) == 1


def test_being_stopped_ends_everything_and_drains_the_log(champion, trips_schema):
    """The last of this module that uses the cluster."""
    with Load(champion.url) as load:
        load.wait_for(50)
    assert champion.stop() == 0, champion.log()[-3000:]
    assert set(load.ids()) <= set(champion.logged(trips_schema))
    assert not list(champion.home.glob("nodes/*/log/ready/*"))
    wait(lambda: not champion.members(), what=champion.members)


def test_haproxy_in_front_is_closed_and_fails_no_request_when_the_alias_moves(registered):
    registered.move("trips", "champion", 1)
    ports = {f"RAY_SERVE_HAPROXY_{name}_PORT": str(free_port()) for name in ("STATS", "METRICS")}
    with started(registered.uri, "--haproxy", **ports) as cluster:
        served = ("haproxy", "127.0.0.1", cluster.port)
        wait(lambda: served in cluster.listeners(), what=lambda: sorted(cluster.listeners()))  # it may be reloading
        assert not [at for at in cluster.listeners() if at[1] not in ("127.0.0.1", "::1")]
        (admin,) = place(cluster.home).glob("*/admin.sock")
        assert stat.S_IMODE(admin.stat().st_mode) == 0o600
        assert stat.S_IMODE(place(cluster.home).stat().st_mode) == 0o700
        with Load(cluster.url) as load, socket.create_connection(("127.0.0.1", cluster.port)) as slow:
            slow.sendall(b"POST /predict/trips HTTP/1.1\r\n")  # and never the rest of its head
            load.wait_for(100)
            registered.move("trips", "champion", 2)
            load.wait_for_version(2)
            slow.settimeout(120)
            assert slow.recv(100).startswith(b"HTTP/1.1 408")
        sys.stdout.write(f"\n{len(load.answers)} answers, {len(load.failures)} failures, alias moved behind HAProxy")
        load.assert_all_answered(cluster)
        for _, version, found in load.answers:
            assert {score for _, score in found} == {SCORES[version]}
        assert cluster.stop(signal.SIGINT) == 0, cluster.log()[-3000:]
