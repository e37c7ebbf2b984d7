"""A reader of HTTP/1.1 replies without any I/O: bytes in, head and body pieces out, every limit ours.

httptools splits the bytes. The rules it does not have are here: bounded heads, one framing and never "until close",
no 101, a bounded number of interim replies, statuses from 200 to 599, nothing after the reply.
"""

from __future__ import annotations

import httptools

from substrate_seam.invocation import Headers

HEAD_BYTES_MAX = 65_536
HEAD_FIELDS_MAX = 100
INTERIM_MAX = 8


class BadReply(ValueError):
    """The peer did not speak HTTP/1.1 as this reader accepts it; the message says what it did."""


class ReplyReader:
    """Reads one reply. `status` is 0 until the head is complete; `complete` turns true with the last body byte.

    `continues` counts the `100 Continue` seen. `keep_alive` says whether the connection may carry another exchange;
    it never does when bytes followed the reply.
    """

    __slots__ = (
        "_body_expected",
        "_field_count",
        "_framing",
        "_head_bytes",
        "_head_request",
        "_interim",
        "_parser",
        "_pieces",
        "_wrong",
        "complete",
        "content_length",
        "continues",
        "headers",
        "keep_alive",
        "status",
    )

    def __init__(self, *, head_request: bool = False) -> None:
        self.status = 0
        self.headers: Headers = ()
        self.content_length: int | None = None
        self.complete = False
        self.keep_alive = False
        self.continues = 0
        self._head_request = head_request
        self._interim = 0
        self._head_bytes = 0
        self._field_count = 0
        self._framing: list[tuple[bytes, bytes]] = []
        self._pieces: list[bytes] = []
        self._wrong: str | None = None
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes from the peer and return the body pieces among them; raises `BadReply`."""
        if self.complete:
            self.keep_alive = False
            return []
        if not self.status:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._wrong = self._wrong or "it switched protocols"
        except httptools.HttpParserError as error:
            if not self.complete:  # what follows a whole reply cannot spoil it
                self._wrong = self._wrong or f"malformed HTTP ({error.__context__ or error})"
            self.keep_alive = False
        if self._wrong is not None and not self.complete:
            raise BadReply(self._wrong)
        if not self.status and self._head_bytes > HEAD_BYTES_MAX:
            raise BadReply(f"its head is over {HEAD_BYTES_MAX} bytes")
        pieces, self._pieces = self._pieces, []
        return pieces

    # What httptools calls.

    def on_message_begin(self) -> None:
        """A reply begins: the first, one after an interim reply, or one too many."""
        self._framing = []

    def on_header(self, name: bytes, value: bytes) -> None:
        """One field of a head, or a trailer."""
        if self.complete:
            return
        if self.status:  # trailers are dropped, but not without a bound
            self._field_count += 1
        else:
            self._framing.append((name.lower(), value))
        if len(self._framing) + self._field_count > HEAD_FIELDS_MAX:
            self._fail(f"its head has over {HEAD_FIELDS_MAX} fields")
        if b"\r" in value or b"\n" in value or b"\0" in value:
            self._fail("a header value has a line break or a NUL in it")

    def on_headers_complete(self) -> None:
        """A head is complete: interim, or the one that counts."""
        if self.complete:
            return
        status = self._parser.get_status_code()
        if status < 200:
            self._take_interim(status)
            return
        if status > 599:
            self._fail(f"its status is {status}; accepted are 200 to 599")
        if sum(len(name) + len(value) + 4 for name, value in self._framing) > HEAD_BYTES_MAX:
            self._fail(f"its head is over {HEAD_BYTES_MAX} bytes")
        self.headers = tuple(self._framing)
        self._framing = []
        self._body_expected = not self._head_request and status not in {204, 304}
        self._check_framing()
        self.status = status
        if not self._body_expected:
            # httptools would wait for the body that a HEAD reply's Content-Length speaks of.
            self.keep_alive = self._parser.should_keep_alive() and status in {204, 304}
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
        if status == 100:
            self.continues += 1
        if status == 101:
            self._fail("it switched protocols")
        if status < 100:
            self._fail(f"its status is {status}; accepted are 200 to 599")
        if self._interim > INTERIM_MAX:
            self._fail(f"it sent over {INTERIM_MAX} interim replies")
        self._head_bytes = 0

    def _check_framing(self) -> None:
        codings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        lengths = [value.strip() for name, value in self.headers if name == b"content-length"]
        if codings and lengths:
            self._fail("it has both Transfer-Encoding and Content-Length")
        elif codings and codings != [b"chunked"]:
            self._fail("its Transfer-Encoding is not exactly `chunked`")
        elif len(lengths) > 1 or (lengths and not lengths[0].isdigit()):
            self._fail("its Content-Length is not one number")
        elif not codings and not lengths and self._body_expected:
            self._fail("it has neither Content-Length nor chunked coding, so its end could not be told from a break")
        elif lengths:
            self.content_length = int(lengths[0])

    def _fail(self, wrong: str) -> None:
        self._wrong = self._wrong or wrong
        raise BadReply(wrong)  # httptools stops at an exception and wraps it
