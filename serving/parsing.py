"""uvicorn's protocol class, but for what it makes of offers to speak another protocol, trailers, and headers twice.

A request may offer one (`Upgrade: h2c`, which Java's client and `curl --http2` do each time), and a server may pass it
over (RFC 9110, 7.8). httptools stops reading HTTP there: the body would be lost, or taken for the next request. Not
here: what is asked (`serving.http`).
"""

from __future__ import annotations

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.seldom import Seldom

INVALID = "Invalid HTTP request received."
INVALID_LINES = Seldom()
ONCE = (b"host", b"authorization")
"""Headers that decide who may ask for what. Which one of two counts, each server and proxy would say otherwise."""


class Parsing(HttpToolsProtocol):
    """One connection. Its callbacks must return at once while `upgrading`: the same request is told again."""

    reading: str
    """What is waited for (`serving.http`)."""
    upgrading = False
    """The request that is parsed offers another protocol."""

    def data_received(self, data: bytes) -> None:
        """Bytes have arrived."""
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                if self.parser.get_method() == b"CONNECT":
                    self.send_400_response("This server is no proxy.")
                    return
                data = self._head() + data[offer.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
            except httptools.HttpParserError:
                if (kept := INVALID_LINES.due()) is not None:
                    self.logger.warning("%s (%d more since the last such line)", INVALID, kept)
                self.send_400_response(INVALID)
                return
            else:
                return

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header. What stands behind a body is none, whatever its name (RFC 9110, 6.5.1)."""
        if self.reading == "headers":
            name = name.lower()
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True
            self.headers.append((name, value))

    def twice(self) -> str:
        """A header that stands there twice and may not; empty: none does."""
        if len(dict(self.headers)) == len(self.headers):
            return ""
        names = [name for name, _ in self.headers]
        return next((name.decode() for name in ONCE if names.count(name) > 1), "")

    def header_bytes(self) -> int:
        """How large the request line and the headers are, about."""
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _head(self) -> bytes:
        """The request's head again, without the offer."""
        version = self.parser.get_http_version().encode()
        lines = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        return b"%b %b HTTP/%b\r\n%b\r\n" % (self.parser.get_method(), self.url, version, b"".join(lines))
