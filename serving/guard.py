"""One call that decides whether a request may go on, for HTTP and gRPC alike: host, key, role, rate.

Built by the parent from settings, sent to the workers as JSON, so that a worker reads no environment. Not here: each of
the checks (`serving.hosts`, `serving.access`, `serving.rates`), and the limits of a body (`serving.limits`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from serving.access import ANYBODY, PROBE, Keys, Principal, check_exposure, forbidden, role_of
from serving.audit import AccessLog, Audit
from serving.hosts import allowed_hosts, check_host, check_origin
from serving.limits import Limits
from serving.rates import Rates
from serving.wire import Refusal

if TYPE_CHECKING:  # a worker builds a guard, and does without the settings' library
    from noria.settings import Settings

MOST_KNOWN_HOSTS = 64
LOOKING = ("GET", "HEAD", "OPTIONS")


@dataclass(frozen=True)
class Protection:
    """What a worker must know to protect itself."""

    keys: str
    """The keys file."""
    required: bool
    """Nobody gets in where that file is missing."""
    hosts: tuple[str, ...]
    """Names that requests may use."""
    rate: float
    """Requests a second of one key or address, the whole server's; 0: no limit."""
    access_log: str
    """Where every answer gets a line; empty: nowhere."""
    audit: str
    """Where operators' actions and refused access get a line."""
    limits: Limits = field(default_factory=Limits)
    workers: int = 1

    def to_json(self) -> str:
        """For a worker's command line; there is no secret in it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Protection:
        """What `to_json` wrote."""
        given = json.loads(text)
        return cls(**{**given, "hosts": tuple(given["hosts"]), "limits": Limits(**given["limits"])})


def protection(
    settings: Settings, variables: Mapping[str, str], host: str, *, is_open: bool = False, workers: int = 1
) -> Protection:
    """What the settings say for a server that listens on `host`; `variables` are the limits' (`NORIA_LIMIT_*`).

    Raises:
        SettingsError: a limit or the keys file is malformed, or others could reach a server that asks for no key.
    """
    keys = settings.keys_file
    required = check_exposure(host, keys, is_open=is_open) or bool(settings.api_keys)
    Keys.load(keys, required=required)
    return Protection(
        str(keys),
        required,
        tuple(sorted(allowed_hosts(host, settings.hosts.split(",")))),
        settings.rate,
        settings.access_log,
        str(settings.root / "audit.jsonl"),
        Limits.of(variables),
        workers,
    )


class Guard:
    """The checks of one worker. For its event loop only."""

    def __init__(self, protection: Protection) -> None:
        self.limits = protection.limits
        self.keys = Keys(Path(protection.keys), required=protection.required)
        self.rates = Rates(protection.rate, protection.workers)
        self.audit = Audit(Path(protection.audit))
        self.access_log = AccessLog(protection.access_log) if protection.access_log else None
        self._allowed = frozenset(protection.hosts)
        self._known: set[bytes] = set()

    def admit(
        self,
        method: str,
        path: str,
        host: bytes | None,
        authorization: bytes | None,
        client: str,
        *,
        origin: bytes | None = None,
    ) -> Principal:
        """Who asks, when the request may go on. `path` is decoded and without the query, `client` an IP address,
        `origin` that of the page that makes a browser ask.

        Raises:
            Refusal: 400 or 421 (host), 401, 403 (key or origin), 429 (rate).
        """  # fmt: skip
        try:
            # Probes of HTTP/1.0 name no host (HAProxy's own are such), and learn nothing.
            if host not in self._known and (host is not None or role_of(method, path) is not None):
                self._check_host(host)
            # Where keys are asked for, a page has none; and what it may only look at it cannot read.
            if origin is not None and not self.keys.on and method not in LOOKING:
                check_origin(origin, self._allowed)
        except Refusal as refusal:
            self.audit.refused(refusal.status, client, method, path)
            raise
        return self._admit(method, path, authorization, client)

    def call(self, path: str, authorization: bytes | None, client: str) -> Principal:
        """The same for a gRPC call (`/service/Method`), which no page in a browser can make: its host is not looked at.

        Raises:
            Refusal: 401, 403, 429.
        """
        return self._admit("POST", path, authorization, client)

    def _admit(self, method: str, path: str, authorization: bytes | None, client: str) -> Principal:
        principal = ANYBODY
        try:
            if self.keys.on or self.rates.rate:
                role = role_of(method, path)
                if role is None:
                    return PROBE
                if self.keys.on:
                    principal = self.keys.identify(authorization)
                    if role not in principal.roles:
                        raise forbidden(principal, role)
                self.rates.take(principal, time.monotonic(), client)
        except Refusal as refusal:
            self.audit.refused(refusal.status, client, method, path, principal.name)
            raise
        return principal

    def close(self) -> None:
        """Write what waits and let go of the logs."""
        self.audit.close()
        if self.access_log is not None:
            self.access_log.close()

    def _check_host(self, host: bytes | None) -> None:
        check_host(host, self._allowed)
        if host is not None and len(self._known) < MOST_KNOWN_HOSTS and len(host) < 256:
            self._known.add(host)
