"""Who takes part: noria in its ways, each peer in its own environment, and the limits inside one process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.serving import bodies, models, subject
from benchmarks.serving.bodies import Dialect
from benchmarks.serving.contest import CHECKED, Bench, InProcess, Server, exchanges
from benchmarks.serving.environments import environment
from benchmarks.serving.peers import FILES, PEERS, Peer
from benchmarks.serving.processes import Served, running


def noria(
    bench: Bench,
    model: str,
    *,
    dialect: Dialect = bodies.V2,
    name: str = subject.NAME,
    rows: int = 1,
    variables: Mapping[str, str] | None = None,
) -> Server:
    """noria with a plain model, everything on but what `variables` change."""  # fmt: skip
    repository = bench.folder / "repository"
    given = models.rows_of(model, CHECKED * rows)
    scores = models.expected(models.file_of(repository, model), given)

    def start(port: int, right: Callable[[int], str]) -> AbstractContextManager[Served]:
        home = Path(tempfile.mkdtemp(dir=bench.folder, prefix="home-"))
        return subject.plain(repository, home, port, right=right, core=bench.server_core, variables=variables)

    return Server(name, start, subject.infer_path(model), exchanges(dialect, given, scores, rows))


def peer(bench: Bench, name: str) -> Server:
    """A peer with the small model, one row a request."""
    found = PEERS[name]
    file = models.file_of(bench.folder / "repository", "small")
    given = models.rows_of("small", CHECKED)

    def start(port: int, right: Callable[[int], str]) -> AbstractContextManager[Served]:
        return running(
            name, _command(found, port, bench), port, right=right, log=bench.folder / f"{name}.log",
            core=bench.server_core, variables=_variables(found, port, file),
        )  # fmt: skip

    return Server(name, start, found.path, exchanges(found.dialect, given, models.expected(file, given)))


def _command(found: Peer, port: int, bench: Bench) -> list[str]:
    executables = environment(found.environment, bench.cache)
    first, *rest = (part.replace("{port}", str(port)) for part in found.command)
    return [str(executables / first), *rest]


def _variables(found: Peer, port: int, file: Path) -> dict[str, str]:
    # Their own files only: nothing of noria may be importable, and no thread pool may guess at the machine's cores.
    own = {"MODEL": str(file), "PORT": str(port), "PYTHONPATH": str(FILES), "OMP_NUM_THREADS": "1"}
    return {**own, **found.variables}


def limit(bench: Bench, what: str, *arguments: object, name: str) -> InProcess:
    """A limit of `benchmarks.serving.inprocess`."""
    return InProcess(name, (what, *(str(argument) for argument in arguments)))
