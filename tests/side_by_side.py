"""`make test`: three runs of pytest beside each other, because much of what the tests do is wait.

One has what uses the whole stack or a Ray, one most of what starts servers (marks that tests/conftest.py sets), the
third everything else, so every test is in exactly one of them. The third is heard while it runs, the others when it has
ended; if one fails, so does this.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile

BESIDE = {
    "ray": ("test_cluster.py", "test_soak.py", "test_training.py"),
    "servers": (
        "test_first_deployment.py", "test_fleet.py", "test_following.py", "test_repository.py", "test_rpc.py",
        "test_serving.py", "test_shadowing.py",
    ),
}  # fmt: skip
"""The runs beside the one that is heard: by mark the files of tests/integration that have it. What uses the stack has
the first, too, so that one run has every Ray."""
NOTHING_TO_RUN = 5
"""What pytest ends with where the arguments leave no test."""


def main(arguments: list[str]) -> int:
    """All runs, with the same arguments of pytest; returns the exit code."""
    command = [sys.executable, "-m", "pytest", *arguments, "-m"]
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in BESIDE]
        runs = [subprocess.Popen([*command, " and ".join(f"not {mark}" for mark in BESIDE)])]
        for mark, file in zip(BESIDE, said, strict=True):
            runs.append(subprocess.Popen([*command, mark], stdout=file, stderr=subprocess.STDOUT))
        codes = [_ended(run) for run in runs]
        for file in said:
            file.seek(0)
            sys.stdout.write(file.read().decode(errors="replace"))
    ran = [code for code in codes if code != NOTHING_TO_RUN]
    return next((code for code in ran if code), 0) if ran else NOTHING_TO_RUN


def _ended(run: subprocess.Popen[bytes]) -> int:
    """Its exit code. Ctrl-C reaches the runs themselves, and each then ends what it has started."""
    while True:
        try:
            return run.wait()
        except KeyboardInterrupt:
            continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
