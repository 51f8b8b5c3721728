"""Which names of this server a request may use, and which pages may ask: `Host` and `Origin` against a list.

A page that somebody visits can point its own name at 127.0.0.1 once it is loaded (DNS rebinding). The browser then
takes this server for the page's own and hands over every answer, although it listens on loopback only. What such a
request cannot hide is the name in `Host`: it is the page's. An address written in digits cannot be rebound, so where
the server listens on every address of the machine all of those are welcome.

A page may also send orders without rebinding anything, if it does not need the answers (cross-site request forgery).
The browser says then whose page it is in `Origin`. Not here: keys, which such a page does not have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from noria.errors import SettingsError
from serving.wire import Refusal

LOOPBACK = ("localhost", "127.0.0.1", "::1")
EVERY_ADDRESS = frozenset({"0.0.0.0", "::", ""})
ANY = "*"
NAME = re.compile(r"\*|[a-z0-9._-]+|[0-9a-f:.]*:[0-9a-f:.]*")
"""Every name, a name or an address of IPv4, an address of IPv6."""
ANY_ADDRESS = "any address"


def allowed_hosts(bind: str, names: Iterable[str] = ()) -> frozenset[str]:
    """The allow-list: loopback names, the address that the server listens on, and `names` (`*` allows every name; a
    port does not matter).

    Raises:
        SettingsError: one of `names` is none that a request could be for.
    """
    for name in filter(str.strip, names := list(names)):
        if not NAME.fullmatch(_bare(name)):
            sentence = f"'{name.strip()[:80]}' in NORIA_HOSTS is no host; give names as in models.example.com."
            raise SettingsError(sentence)
    bound = _bare(bind)
    own = ANY_ADDRESS if bound in EVERY_ADDRESS else bound
    return frozenset({*LOOPBACK, own, *(_bare(name) for name in names if name.strip())})


def host_allowed(header: bytes, allowed: frozenset[str]) -> bool:
    """Whether the value of a `Host` header names this server; port, letter case and a last dot do not matter."""
    try:
        host = header.decode("ascii").strip().lower()
    except UnicodeDecodeError:
        return False
    if host.startswith("["):
        host, closed, port = host[1:].partition("]")
        if not closed or (port and port[0] != ":"):
            return False
        port, address = port[1:], True
    else:
        host, _, port = host.partition(":")
        host = host.removesuffix(".")
        address = host.replace(".", "").isdigit()
    if port and not port.isdigit():
        return False
    return host in allowed or ANY in allowed or (address and ANY_ADDRESS in allowed)


def check_host(header: bytes | None, allowed: frozenset[str]) -> None:
    """Raises Refusal: 400 without a `Host`, 421 for one that is not this server's.

    421 (Misdirected Request) and not 403: it says that this server does not speak for that name, whoever asks, which is
    the case; a 403 would send people looking for a key.
    """
    if header is None:
        raise Refusal(400, "The request has no Host header; HTTP/1.1 asks for one.")
    if not host_allowed(header, allowed):
        shown = header[:80].decode("latin-1")
        raise Refusal(421, f"This server does not answer for the host '{shown}'; add it to NORIA_HOSTS if it should.")


def origin_of(headers: Mapping[bytes, bytes]) -> bytes | None:
    """The origin of the page that makes a browser ask; None: no page of another site does."""
    unnamed = b"null" if headers.get(b"sec-fetch-site") == b"cross-site" else None
    return headers.get(b"origin", unnamed)


def check_origin(origin: bytes, allowed: frozenset[str]) -> None:
    """Raises Refusal 403 where the page is not one of this server's own names."""
    if not host_allowed(origin.partition(b"://")[2], allowed):
        shown = origin[:80].decode("latin-1")
        raise Refusal(403, f"A page of '{shown}' may not ask this server; add its host to NORIA_HOSTS if it should.")


def _bare(name: str) -> str:
    """As it is compared: in small letters, without brackets, port and last dot."""
    name = name.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    host, _, port = name.rpartition(":")
    return (host if port.isdigit() and ":" not in host else name).removesuffix(".")
