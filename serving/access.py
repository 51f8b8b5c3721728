"""Who may do what: the role that every route needs, and whether a key has it. The same for HTTP and gRPC.

Deny by default: a path that is not listed here needs the role `operate`, so a route that somebody forgets to list is
closed, not open. Not here: the keys file (`serving.keys`), and the other checks of a request (`serving.guard`).
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import time
from dataclasses import dataclass
from hmac import compare_digest
from pathlib import Path

from noria.errors import SettingsError
from serving import keys as file
from serving.keys import ROLES, Key, Role
from serving.wire import Refusal

LOOK_SECONDS = 0.5
"""How often the file is looked at, at most: a revoked key stops working within twice that."""
INDEX_BYTES = 8
PUBLIC = frozenset({"/v2/health/live", "/v2/health/ready"})
PAGES = frozenset({"/", "/docs", "/openapi.json", "/status", "/v2"})
GRPC = "/inference.GRPCInferenceService/"
GRPC_ROLES: dict[str, Role | None] = {
    "ServerLive": None,
    "ServerReady": None,
    "ModelReady": "predict",
    "ServerMetadata": "predict",
    "ModelMetadata": "predict",
    "ModelInfer": "predict",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks."""

    name: str
    """The key's name; empty where keys are off."""
    roles: frozenset[str]
    rate: float | None = None
    """Requests a second, where the key has its own."""


ANYBODY = Principal("", frozenset(ROLES))
"""Who asks where keys are off."""
PROBE = Principal("", frozenset())
"""Who asks for what is public."""


def role_of(method: str, path: str) -> Role | None:
    """The role that a request needs; None: anybody may. For gRPC the path is `/service/Method` and the method POST.

    `path` is what the router gets: decoded, without the query.
    """
    parts = path.split("/")
    count, first = len(parts), parts[1] if len(parts) > 1 else ""
    if count == 3 and first == "predict":
        return "predict"
    if count == 3 and first == "feedback":
        return "feedback"
    if first == "v2" and count > 3 and parts[2] == "models":
        return _model_role(parts[4:])
    if path in PUBLIC:
        return None if method in ("GET", "HEAD") else "operate"
    if path in PAGES:
        return "predict"
    if path.startswith(GRPC):
        return GRPC_ROLES.get(path[len(GRPC) :], "operate")
    return "operate"


def _model_role(rest: list[str]) -> Role:
    """Of `/v2/models/NAME` and what follows it."""
    if rest[:1] == ["versions"]:
        rest = rest[2:]
    return "predict" if rest in ([], ["infer"], ["ready"], ["stats"]) else "operate"


class Keys:
    """The keys of a file, read again when it changes. Not thread-safe: one for each event loop.

    A file that cannot be read is no reason to end: a worker that starts meanwhile lets nobody in, and looks again.
    """

    def __init__(self, path: Path, *, required: bool = False) -> None:
        """`required`: where there is no file nobody gets in; otherwise everybody does. The file is read when somebody
        asks."""
        self.path = path
        self.required = required
        self._found: dict[bytes, tuple[bytes, Principal]] = {}
        self._on = required
        self._mark: tuple[int, ...] | None = None
        self._next = 0.0

    @classmethod
    def load(cls, path: Path, *, required: bool = False) -> Keys:
        """The keys of a file, for a server's own start. Raises SettingsError when it is not a keys file."""
        keys = cls(path, required=required)
        keys._read(_mark(path))
        return keys

    @property
    def on(self) -> bool:
        """Whether a key is asked for; now and then this looks at the file."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + LOOK_SECONDS
            self._look()
        return self._on

    def check(self, authorization: bytes | None, role: Role | None) -> Principal:
        """Who asks, from the header `Authorization: Bearer KEY`.

        Raises:
            Refusal: 401 without a known key, 403 where the key has not the role.
        """
        if role is None:
            return PROBE
        if not self.on:
            return ANYBODY
        principal = self.identify(authorization)
        if role not in principal.roles:
            raise forbidden(principal, role)
        return principal

    def identify(self, authorization: bytes | None) -> Principal:
        """Who asks, whatever the role. Raises Refusal 401."""
        if not authorization:
            raise _unknown("This server asks for a key; send the header Authorization: Bearer KEY.", b"Bearer")
        if authorization[:7].lower() != b"bearer ":
            raise _unknown("The header Authorization must read: Bearer KEY.", b"Bearer")
        found = hashlib.sha256(authorization[7:].strip()).digest()
        # How long the look-up takes tells something of a hash at most, from which nobody makes a key; the hash itself
        # is compared in constant time all the same.
        whole, principal = self._found.get(found[:INDEX_BYTES], (b"", ANYBODY))
        if not compare_digest(whole, found):
            raise _unknown("The key is not known here, or was revoked.", b'Bearer error="invalid_token"')
        return principal

    def _look(self) -> None:
        mark = _mark(self.path)
        if mark == self._mark:
            return
        try:
            self._read(mark)
        except SettingsError as error:
            # What was read last goes on, or a slip of an editor would turn away everybody at once.
            self._mark = mark
            logger.error("The keys are those read before, of which there are %d: %s", len(self._found), error)

    def _read(self, mark: tuple[int, ...] | None) -> None:
        # Once keys are on they stay on: a file that goes away, or cannot be read, must not open the door.
        self._on = self._on or mark is not None
        self._found = dict(_entry(key) for key in file.read(self.path))
        self._mark = mark


def check_exposure(host: str, path: Path, *, is_open: bool = False) -> bool:
    """Whether keys are required on this address; to be asked before a server listens.

    Raises:
        SettingsError: others than this machine could ask, and there are no keys.
    """
    if is_loopback(host):
        return False
    if not path.exists() and not is_open:
        raise SettingsError(
            f"Other machines can reach {host}, and there are no keys in {path}. Make one with "
            "`noria key add NAME --role predict`, or say --open to let everybody in."
        )
    return not is_open


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _mark(path: Path) -> tuple[int, ...] | None:
    """What changes with the file, and with who may read and write it; None: there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    except OSError:
        return ()
    return status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode


def _entry(key: Key) -> tuple[bytes, tuple[bytes, Principal]]:
    whole = bytes.fromhex(key.sha256)
    return whole[:INDEX_BYTES], (whole, Principal(key.name, frozenset(key.roles), key.rate))


def _unknown(sentence: str, challenge: bytes) -> Refusal:
    return Refusal(401, sentence, ((b"www-authenticate", challenge),))


def forbidden(principal: Principal, role: Role) -> Refusal:
    """403 for a key that has not the role."""
    has = ", ".join(one for one in ROLES if one in principal.roles)
    challenge = b'Bearer error="insufficient_scope", scope="%s"' % role.encode()
    return Refusal(
        403,
        f"This needs a key with the role {role}; '{principal.name}' has {has}.",
        ((b"www-authenticate", challenge),),
    )
