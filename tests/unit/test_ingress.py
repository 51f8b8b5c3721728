"""HAProxy's configuration as Ray's own generator writes it, corrected, and tried on the real HAProxy."""

from __future__ import annotations

import http.client
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from serving import ingress
from serving.ingress import Unsafe, check, harden


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def written(tmp_path):
    """A configuration with one application whose only replica does not answer; its file and its port."""
    folder, port = tmp_path / "haproxy", free_port()
    tmp_path.chmod(0o755)
    folder.mkdir()
    config = HAProxyConfig(
        socket_path=str(folder / "admin.sock"), server_state_base=str(folder),
        server_state_file=str(folder / "server-state"), metrics_socket_path=str(folder / "metrics.sock"),
        http_options=HTTPOptions(host="0.0.0.0", port=port), metrics_port=free_port(), stats_port=free_port(),
        nbthread=1, has_received_routes=True, has_received_servers=True, is_head=True,
    )  # fmt: skip
    nobody = BackendConfig("noria", "/", servers=[ServerConfig("one", "127.0.0.1", free_port())], app_name="noria")
    HAProxyApi(config, {"noria": nobody}, str(folder / "haproxy.cfg"))._generate_config_file_internal()
    return folder / "haproxy.cfg", port


def asked(port):
    """Status of a request, once somebody listens."""
    deadline = time.monotonic() + 20
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        finally:
            connection.close()


def running(command):
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_ray_leaves_open_what_is_closed_here(written):
    """Why the launcher is there; when Ray closes one of these, the launcher can lose a rule."""
    text = written[0].read_text()
    assert "bind *:" in text
    assert "mode 666 level admin" in text
    assert "timeout http-request" not in text
    assert "errorfile 503" in text
    with pytest.raises(Unsafe):
        check(text, "127.0.0.1")


def test_requests_come_in_on_the_stated_host_and_the_rest_on_loopback(written):
    text = harden(written[0].read_text(), "192.0.2.7")
    check(text, "192.0.2.7")
    bound = sorted(line.split()[1].rpartition(":")[0] for line in text.splitlines() if line.strip().startswith("bind"))
    assert bound == ["127.0.0.1", "127.0.0.1", "192.0.2.7"]
    assert harden(text, "192.0.2.7") == text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("bind 127.0.0.1:", "bind :"),
        ("bind 127.0.0.1:", "bind 0.0.0.0:"),
        ("bind 127.0.0.1:", "bind ipv4@*:"),
        ("mode 600", "mode 666"),
        ("stats socket /", "stats socket ipv4@0.0.0.0:99 /"),
        ("timeout http-request", "timeout http-keep-alive"),
        ("option httplog", "errorfile 503 /x"),
    ],
)
def test_what_is_not_known_to_be_closed_is_refused(written, before, after):
    text = harden(written[0].read_text(), "127.0.0.1")
    assert before in text
    with pytest.raises(Unsafe):
        check(text.replace(before, after), "127.0.0.1")


def test_503_stays_503_and_the_admin_socket_is_its_owners(written):
    path, port = written
    plain = running([ingress._bundled(), "-db", "-f", str(path)])
    try:
        assert asked(port) == 500  # what Ray makes of it
        assert stat.S_IMODE((path.parent / "admin.sock").stat().st_mode) == 0o666
    finally:
        plain.kill()
        plain.wait()
    closed = running([ingress.install(path.parent), "-db", "-f", str(path)])
    try:
        assert asked(port) == 503
        assert stat.S_IMODE((path.parent / "admin.sock").stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    finally:
        closed.kill()
        closed.wait()


def test_a_folder_is_found_whose_sockets_have_a_name_short_enough():
    for home in ("/a", "/srv/teams/forecasting/models/noria"):
        assert len(str(ingress.place(Path(home)) / ("0" * 56) / "admin.sock.1234567.tmp")) < 107


def test_an_unknown_configuration_and_an_open_folder_do_not_run(written):
    path, _ = written
    launcher = ingress.install(path.parent)
    path.parent.chmod(0o755)
    open_folder = subprocess.run([launcher, "-c", "-f", str(path)], capture_output=True, text=True, check=False)
    assert open_folder.returncode == 1
    assert "chmod 700" in open_folder.stderr
    path.parent.chmod(0o700)
    path.write_text(path.read_text().replace("defaults\n", "defaults other\n"))
    unknown = subprocess.run([launcher, "-c", "-f", str(path)], capture_output=True, text=True, check=False)
    assert unknown.returncode == 1
    assert "no time limit" in unknown.stderr
