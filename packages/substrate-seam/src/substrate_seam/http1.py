"""A reader of HTTP/1.1 replies without any I/O: bytes in, head and body pieces out, every limit ours.

httptools judges the syntax. The rules it does not have are here: bounded heads, one framing and never "until close",
no 101, a bounded number of interim replies, statuses from 200 to 599, nothing after the reply. However the bytes are
cut up on their way, what comes of them is the same.
"""

from __future__ import annotations

import httptools

from substrate_seam.invocation import Headers

HEAD_BYTES_MAX = 65_536
HEAD_FIELDS_MAX = 100
INTERIM_MAX = 8

_SPENT = httptools.HttpResponseParser(None)
"""What a reader has instead of its own parser once its reply is complete; it is never fed."""
_END_OF_HEAD = b"\r\n\r\n"


class BadReply(ValueError):
    """The peer did not speak HTTP/1.1 as this reader accepts it; the message says what it did."""


class ReplyReader:
    """Reads one reply. `status` is 0 until the head is complete; `complete` turns true with the last body byte.

    `continues` counts the `100 Continue` seen. `keep_alive` says whether the connection may carry another exchange;
    it never does when bytes followed the reply, nor after a reply to HEAD.
    """

    __slots__ = (
        "_fields",
        "_head_bytes",
        "_head_ended",
        "_head_request",
        "_idle_bytes",
        "_interim",
        "_parser",
        "_pieces",
        "_tail",
        "_trailers",
        "_wrong",
        "complete",
        "continues",
        "headers",
        "keep_alive",
        "status",
    )

    def __init__(self, *, head_request: bool = False) -> None:
        self.status = 0
        self.headers: Headers = ()
        self.complete = False
        self.keep_alive = False
        self.continues = 0
        self._head_request = head_request
        self._head_bytes = 0
        self._head_ended = False
        self._tail = b""  # of the head so far: its end may have begun there
        self._fields: list[tuple[bytes, bytes]] = []
        self._interim = 0
        self._pieces: list[bytes] = []
        self._trailers = 0
        self._idle_bytes = 0
        self._wrong: str | None = None
        self._parser: httptools.HttpResponseParser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes from the peer and return the body pieces among them; raises `BadReply`."""
        while data and not self.status:
            data = self._feed_head(data)
        if self.complete:
            if data.strip(b"\r\n"):  # blank lines behind a reply were always forgiven
                self.keep_alive = False
        elif data:
            self._parse(data)
            self._bound_idling(len(data))
        if self.complete:
            self._parser = _SPENT  # ours refers back to this reader: no garbage is left for the collector
        pieces, self._pieces = self._pieces, []
        return pieces

    def _feed_head(self, data: bytes) -> bytes:
        """Take bytes up to the end of a head, and return those behind it."""
        joined = self._tail + data
        found = joined.find(_END_OF_HEAD)
        end = found + len(_END_OF_HEAD) - len(self._tail) if found >= 0 else len(data)
        self._head_bytes += end
        if self._head_bytes > HEAD_BYTES_MAX:
            raise BadReply(f"its head is over {HEAD_BYTES_MAX} bytes")
        self._parse(data[:end])
        if self._head_ended != (found >= 0):
            raise BadReply("malformed HTTP (an empty line where a field was due)")
        if not self._head_ended:
            self._tail = joined[-len(_END_OF_HEAD) + 1 :]
            return b""
        self._head_bytes, self._head_ended, self._tail = 0, False, b""
        return data[end:]

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._wrong = self._wrong or "it switched protocols"
        except httptools.HttpParserError as error:
            self.keep_alive = False
            if not self.complete:  # what follows a whole reply cannot spoil it
                self._wrong = self._wrong or f"malformed HTTP ({error})"
        if self._wrong is not None:
            raise BadReply(self._wrong)

    def _bound_idling(self, count: int) -> None:
        """Let nobody send extensions of chunks, or trailers, for ever: the parser would keep some of them."""
        self._idle_bytes = 0 if self._pieces else self._idle_bytes + count
        if self._idle_bytes > HEAD_BYTES_MAX and not self.complete:
            raise BadReply(f"{HEAD_BYTES_MAX} bytes of it bring its body no further")

    # What httptools calls. It stops at an exception and wraps it.

    def on_message_begin(self) -> None:
        """A reply begins: the first, one after an interim reply, or one too many."""
        if self.complete:
            self.keep_alive = False
        self._fields = []

    def on_header(self, name: bytes, value: bytes) -> None:
        """One field of a head, or a trailer: these are dropped, but not without a bound."""
        if self.complete:
            return
        if self.status:
            self._trailers += 1
        else:
            self._fields.append((name.lower(), value.rstrip(b" \t")))
        if len(self._fields) > HEAD_FIELDS_MAX or self._trailers > HEAD_FIELDS_MAX:
            self._fail(f"its head has over {HEAD_FIELDS_MAX} fields")

    def on_headers_complete(self) -> None:
        """A head is complete: interim, or the one that counts."""
        if self.complete:
            return
        self._head_ended = True
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            self._take_interim(status)
            return
        if not 200 <= status <= 599:
            self._fail(f"its status is {status}; accepted are 200 to 599")
        if self._parser.get_http_version() not in {"1.0", "1.1"}:
            self._fail(f"it speaks HTTP/{self._parser.get_http_version()}")
        bodiless = self._head_request or status in {204, 304}
        self._check_framing(bodiless=bodiless)
        self.headers, self._fields = tuple(self._fields), []
        self.status = status
        if bodiless:
            # To HEAD, httptools would wait for the body that the Content-Length speaks of.
            self.keep_alive = not self._head_request and self._parser.should_keep_alive()
            self.complete = True

    def on_body(self, piece: bytes) -> None:
        """Some bytes of the body."""
        if not self.complete:
            self._pieces.append(piece)

    def on_message_complete(self) -> None:
        """The end of an interim reply, of the reply, or of what followed it."""
        if self.status and not self.complete:
            self.keep_alive = self._parser.should_keep_alive()  # only right within this callback
            self.complete = True

    def _take_interim(self, status: int) -> None:
        self._interim += 1
        self.continues += status == 100
        if status == 101:
            self._fail("it switched protocols")
        if self._interim > INTERIM_MAX:
            self._fail(f"it sent over {INTERIM_MAX} interim replies")

    def _check_framing(self, *, bodiless: bool) -> None:
        codings = [value.lower() for name, value in self._fields if name == b"transfer-encoding"]
        lengths = [value for name, value in self._fields if name == b"content-length"]
        if codings and lengths:
            self._fail("it has both Transfer-Encoding and Content-Length")
        elif codings and codings != [b"chunked"]:
            self._fail("its Transfer-Encoding is not exactly `chunked`")
        elif len(lengths) > 1 or (lengths and not lengths[0].isdigit()):
            self._fail("its Content-Length is not one number")
        elif not (codings or lengths or bodiless):
            self._fail("it has neither Content-Length nor chunked coding, so its end could not be told from a break")

    def _fail(self, wrong: str) -> None:
        self._wrong = self._wrong or wrong
        raise BadReply(wrong)
