"""`noria key`: make, list and take away the keys that the server asks for. Not here: the file (`serving.keys`)."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from noria.settings import load_settings
from serving import keys as file
from serving.audit import Audit

key = typer.Typer(no_args_is_help=True, help="Who may ask the server, and for what.")
Name = Annotated[str, typer.Argument(help="Whose key it is; appears in logs.")]


@key.command()
def add(
    name: Name,
    role: Annotated[list[str], typer.Option(help="predict, feedback or operate; may be given several times.")],
    rate: Annotated[float | None, typer.Option(help="Requests a second, where not what NORIA_RATE says.")] = None,
) -> None:
    """Make a key and print it, once. The first key makes the server ask everybody for one."""
    path = load_settings().keys_file
    made = file.add(path, name, role, datetime.now(UTC).isoformat(timespec="seconds"), rate)
    _tell("key add", name, roles=role)
    # The key alone on standard output, so that a script can take it from there.
    sys.stdout.write(made + "\n")
    Console(stderr=True).print(f"Keep it now: only its hash is in {path}.", highlight=False, soft_wrap=True)


@key.command("list")
def show() -> None:
    """Show whose keys there are, with their roles."""
    table = Table(box=None, header_style="dim", padding=(0, 2))
    for column in ("name", "roles", "rate", "created"):
        table.add_column(column)
    keys = file.read(load_settings().keys_file)
    for one in keys:
        table.add_row(one.name, ", ".join(one.roles), f"{one.rate:g}/s" if one.rate else "", one.created)
    Console().print(table if keys else "there are no keys")


@key.command()
def revoke(name: Name) -> None:
    """Take a key away; a server that runs refuses it within a second."""
    file.revoke(load_settings().keys_file, name)
    _tell("key revoke", name)
    Console().print(f"{name}'s key is revoked", highlight=False)


def _tell(action: str, name: str, **facts: Any) -> None:
    audit = Audit(load_settings().root / "audit.jsonl")
    audit.acted(action, "", "command line", name=name, user=os.getuid(), **facts)
    audit.close()
