"""`make test`: two runs of pytest beside each other, because much of what the tests do is wait.

One has what uses the whole stack, and some long files (the mark `beside`, which tests/conftest.py sets), the other
everything else, so every test is in exactly one of them. What the first says comes after the second has ended; if one
fails, so does this.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

NOTHING_TO_RUN = 5
"""What pytest ends with where the arguments leave no test."""


def main(arguments: list[str]) -> int:
    """Both runs, with the same arguments of pytest; returns the exit code."""
    command = [sys.executable, "-m", "pytest", *arguments]
    with tempfile.TemporaryFile() as said:
        beside = subprocess.Popen([*command, "-m", "beside"], stdout=said, stderr=subprocess.STDOUT)
        runs = [subprocess.Popen([*command, "-m", "not beside"]), beside]
        codes = [_ended(run) for run in runs]
        said.seek(0)
        sys.stdout.write(said.read().decode(errors="replace"))
    ran = [code for code in codes if code != NOTHING_TO_RUN]
    return next((code for code in ran if code), 0) if ran else NOTHING_TO_RUN


def _ended(run: subprocess.Popen[bytes]) -> int:
    """Its exit code. Ctrl-C reaches both runs themselves, and each then ends what it has started."""
    while True:
        try:
            return run.wait()
        except KeyboardInterrupt:
            continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
