"""Closed-loop load: `wrk` on its own core, one body again and again over keep-alive connections.

Its figures come back as JSON from its own counters. Not here: open-loop load (`benchmarks.serving.openloop`).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.bodies import Body
from benchmarks.serving.environments import Unavailable

LUA = """
function init(given)
  local file = io.open(given[1], "rb")
  wrk.method, wrk.body = "POST", file:read("*a")
  file:close()
  for number = 2, #given, 2 do wrk.headers[given[number]] = given[number + 1] end
end
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '\\n{"requests":%d,"seconds":%f,"p50":%f,"p99":%f,"broken":%d,"refused":%d}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.timeout, errors.status))
end
"""


@dataclass(frozen=True)
class Loaded:
    """What a run of load saw."""

    rate: float
    """Answers a second."""
    p50: float
    """Milliseconds."""
    p99: float
    """Milliseconds."""
    requests: int
    broken: int
    """Connections that failed, and answers that did not come."""
    refused: int
    """Answers with a status of 400 or more."""

    @property
    def clean(self) -> bool:
        """Every request was answered, and well."""
        return self.requests > 0 and not self.broken and not self.refused


def parse(output: str) -> Loaded:
    """From what wrk printed."""
    found = json.loads(output.strip().splitlines()[-1])
    return Loaded(
        found["requests"] / found["seconds"], found["p50"], found["p99"], found["requests"], found["broken"],
        found["refused"],
    )  # fmt: skip


def load(port: int, path: str, body: Body, *, connections: int, seconds: float, core: int | None = 1) -> Loaded:
    """Drive a server for so many whole seconds.

    Raises:
        Unavailable: wrk is not installed, or did not run.
    """
    if shutil.which("wrk") is None:
        raise Unavailable("The load generator wrk is not installed; `apt-get install wrk` brings it.")
    pinned = [] if core is None else ["taskset", "-c", str(core)]
    headers = {"content-type": body.content_type, **body.headers}
    with tempfile.TemporaryDirectory() as folder:
        script, content = Path(folder) / "post.lua", Path(folder) / "body"
        script.write_text(LUA)
        content.write_bytes(body.content)
        command = [
            *pinned, "wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "20s", "-s",
            str(script), f"http://127.0.0.1:{port}{path}", "--", str(content),
            *(part for pair in headers.items() for part in pair),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"wrk ended with {done.returncode}: {(done.stderr or done.stdout)[-300:]}")
    return parse(done.stdout)
