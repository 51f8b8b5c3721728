"""The keys file: who may ask, and for what. Holds hashes only; a key itself is shown once, when it is made.

A key is 32 random bytes behind the prefix `noria_`. Nobody can guess 256 bits, so one plain SHA-256 is the right hash:
the slow hashes made for passwords protect guessable secrets, and would cost a server a tenth of a second a request.
The file is written aside and renamed, under a lock, readable by its owner only. Not here: the check of a request
(`serving.access`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from noria.errors import SettingsError

Role = Literal["predict", "feedback", "operate"]
ROLES: tuple[Role, ...] = get_args(Role)
PREFIX = "noria_"
RANDOM_BYTES = 32
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MOST_FILE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Key:
    """One line of the file."""

    name: str
    """Whose it is; appears in logs."""
    sha256: str
    """Hash of the key, hex."""
    roles: tuple[Role, ...]
    """What it may be used for."""
    created: str
    """ISO 8601, UTC."""
    rate: float | None = None
    """Requests a second that it may ask for; None: what the server allows every key."""


def digest(key: bytes) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key).hexdigest()


def read(path: Path) -> tuple[Key, ...]:
    """The file's keys; none where there is no file.

    Raises:
        SettingsError: it is not a keys file, or others than its owner may write it.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & 0o022:
                raise SettingsError(
                    f"Others than its owner may write {path}, and could let themselves in; run: chmod 600 {path}"
                )
            text = file.read(MOST_FILE_BYTES)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise SettingsError(f"The keys file {path} cannot be read: {error.strerror}.") from None
    try:
        keys = tuple(_key(entry) for entry in json.loads(text)["keys"])
        if len({key.name for key in keys}) < len(keys):
            raise ValueError("two keys have the same name")
    except (ValueError, TypeError, KeyError) as error:
        # Only what kind of error: its text may quote what somebody pasted into the file.
        kind = type(error).__name__
        sentence = f"{path} is not a keys file ({kind}); restore it, or delete it and add the keys again."
        raise SettingsError(sentence) from None
    return keys


def add(path: Path, name: str, roles: Sequence[str], created: str, rate: float | None = None) -> str:
    """Make a key and return it; nobody can read it again.

    Raises:
        SettingsError: the name is taken or malformed, or a role is unknown.
    """
    chosen = _roles(roles)
    if not NAME.fullmatch(name):
        raise SettingsError(f"'{name[:80]}' is no name for a key; use letters, digits, '.', '_' and '-', at most 64.")
    if rate is not None and not 0 < rate < float("inf"):
        raise SettingsError(f"A rate of {rate} requests a second lets nothing through; give a number above 0.")
    key = PREFIX + secrets.token_urlsafe(RANDOM_BYTES)

    def change(keys: tuple[Key, ...]) -> tuple[Key, ...]:
        if name in {one.name for one in keys}:
            raise SettingsError(f"There is a key '{name}' already; revoke it first, or choose another name.")
        return (*keys, Key(name, digest(key.encode()), chosen, created, rate))

    _change(path, change)
    return key


def revoke(path: Path, name: str) -> None:
    """Take a key away; servers that run refuse it within a second. The file stays, so nobody gets in when it was the
    last one.

    Raises:
        SettingsError: there is no such key.
    """

    def change(keys: tuple[Key, ...]) -> tuple[Key, ...]:
        left = tuple(key for key in keys if key.name != name)
        if len(left) == len(keys):
            known = ", ".join(key.name for key in keys) or "none"
            raise SettingsError(f"There is no key '{name[:80]}' in {path}; known are: {known}.")
        return left

    _change(path, change)


def _roles(given: Sequence[str]) -> tuple[Role, ...]:
    wrong = [role for role in given if role not in ROLES]
    if wrong or not given:
        found = f"'{str(wrong[0])[:40]}' is no role" if wrong else "A key needs a role"
        raise SettingsError(f"{found}; roles are {', '.join(ROLES)}.")
    return tuple(role for role in ROLES if role in given)


def _key(entry: dict[str, object]) -> Key:
    key = Key(**{**entry, "roles": tuple(entry["roles"])})  # type: ignore[arg-type]
    if not (isinstance(key.name, str) and NAME.fullmatch(key.name) and isinstance(key.created, str)):
        raise ValueError("name or time")
    if not key.roles or not set(key.roles) <= set(ROLES) or len(bytes.fromhex(key.sha256)) != 32:
        raise ValueError("roles or hash")
    if key.rate is not None and not 0 < float(key.rate) < float("inf"):
        raise ValueError("rate")
    return key


def _change(path: Path, change: Callable[[tuple[Key, ...]], tuple[Key, ...]]) -> None:
    """Read, change and replace the file while no other process does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        keys = change(read(path))
        aside = path.with_name(f".{path.name}.aside")
        aside.unlink(missing_ok=True)  # of a process that was killed here; its lock is gone with it
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"keys": [asdict(key) for key in keys]}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
