"""One HTTP exchange over hybrid vsock: whole or an error, written once or never, and nothing left of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulation import virtual_time
from simulation.network import Connection, Network
from substrate_node.vsockhttp import Exchange, request_head
from substrate_seam.errors import GuestFailed, GuestTimeout, Ran

HEAD = request_head("POST", "/invoke", ((b"host", b"vsock"),), 4)
OK = b"OK 1073741824\n"
REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\nX-Mine: 1\r\n\r\nhello world"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"


class Peer(asyncio.Protocol):
    """The guest's end: notes what it gets, says what a test lets it say."""

    def __init__(self) -> None:
        self.got = b""
        self.transport: Any = None
        self.lost = asyncio.get_running_loop().create_future()
        self.made = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.made.set_result(None)

    def data_received(self, data: bytes) -> None:
        self.got += data

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.set_result(error)


class Line:
    """A network with one address, and the guest that answers there."""

    def __init__(self, dice: Random) -> None:
        self.network = Network(dice)
        self.peer: Peer | None = None
        self.listener = self.network.listen("guest", self._accept)
        self.loop = asyncio.get_running_loop()
        self.accepted: asyncio.Future[Peer] = self.loop.create_future()

    def _accept(self) -> Peer:
        self.peer = Peer()
        if not self.accepted.done():
            self.accepted.set_result(self.peer)
        return self.peer

    async def open(self, **options: Any) -> tuple[Exchange, Peer]:
        """An exchange whose request has been written."""
        exchange = Exchange(1027, HEAD, options.pop("body", b"ping"), **options)
        await self.dial(exchange)
        assert self.peer is not None
        await self.peer.made
        return exchange, self.peer

    async def dial(self, exchange: Exchange) -> None:
        await self.network.connect("guest", lambda: exchange)

    @property
    def connection(self) -> Connection:
        (connection,) = self.network.connections
        return connection


def simulated(story: Callable[[Line], Awaitable[Any]], *, seed: int = 1) -> Any:
    """Nothing of a connection may be left when the story has ended."""

    async def main(dice: Random) -> Any:
        line = Line(dice)
        result = await story(line)
        await asyncio.sleep(1.0)
        assert not line.network.connections
        line.listener.close()
        return result

    return virtual_time.run(main, seed=seed).value


async def read(exchange: Exchange) -> tuple[int, bytes] | GuestFailed | GuestTimeout:
    """The whole reply, or what its reader is told."""
    try:
        await exchange.head()
        body = b"".join([piece async for piece in exchange])
    except (GuestFailed, GuestTimeout) as error:
        return error
    finally:
        exchange.close()
    return exchange.status, body


def fed(pieces: list[bytes], **options: Any) -> tuple[int, bytes] | GuestFailed | GuestTimeout:
    """What comes of a guest that says these pieces, one after the other, and hangs up."""

    async def story(line: Line) -> Any:
        exchange, peer = await line.open(**options)
        reading = line.loop.create_task(read(exchange))
        for piece in pieces:
            peer.transport.write(piece)
            await asyncio.sleep(0.01)
        peer.transport.close()
        return await reading

    return simulated(story)


def cut(data: bytes, edges: set[int]) -> list[bytes]:
    places = [0, *sorted(edge for edge in edges if edge < len(data)), len(data)]
    return [data[here:there] for here, there in pairwise(places)]


def test_the_connect_line_and_the_request_leave_in_one_write():
    """A large body follows in a second one."""

    async def story(line: Line) -> None:
        exchange, peer = await line.open()
        await asyncio.sleep(0.1)
        assert peer.got == b"CONNECT 1027\n" + HEAD + b"ping"
        exchange.close()
        exchange, peer = await line.open(body=b"x" * 100_000)
        await asyncio.sleep(0.1)
        assert peer.got == b"CONNECT 1027\n" + HEAD + b"x" * 100_000
        exchange.close()

    simulated(story)


@pytest.mark.parametrize("reply", [REPLY, CHUNKED])
@given(edges=st.sets(st.integers(1, 120), max_size=30))
@settings(max_examples=30, deadline=None)
def test_a_reply_is_the_same_however_its_bytes_are_cut(reply: bytes, edges: set[int]):
    assert fed(cut(OK + reply, edges)) == (200, b"hello world")


@pytest.mark.parametrize("length", range(len(OK + CHUNKED)))
def test_a_reply_that_breaks_off_is_never_whole(length: int):
    """Wherever it does; what was missing is said."""
    error = fed([(OK + CHUNKED)[:length]])
    assert isinstance(error, GuestFailed)
    assert error.ran is Ran.MAYBE
    where = (
        "before it answered CONNECT"
        if length < len(OK)
        else "before the head"
        if length < (OK + CHUNKED).index(b"5\r\n")
        else "of its reply's body, before the end"
    )
    assert where in error.message


@pytest.mark.parametrize("greeting", [b"OK 1\n", b"OK 1073741824\n", b"OK 1027\r\n"])
def test_ok_and_a_number_is_an_answer_to_connect(greeting: bytes):
    assert fed([greeting + REPLY]) == (200, b"hello world")
    assert fed([greeting, REPLY]) == (200, b"hello world")


@pytest.mark.parametrize(
    "greeting",
    [
        b"",
        b"\n",
        b"OK\n",
        b"OK \n",
        b"ok 1\n",
        b"OK one\n",
        b"NO 1\n",
        b" OK 1\n",
        b"OK 12345678901\n",
        b"OK " + b"1" * 100 + b"\n",
        b"x" * 100,
        b"junk\nOK 1\n",
    ],
)
def test_any_other_answer_to_connect_is_none(greeting: bytes):
    """In one piece or byte by byte; nothing behind it is taken for HTTP."""
    for pieces in ([greeting + REPLY], [bytes([byte]) for byte in greeting + REPLY]):
        error = fed(pieces)
        assert isinstance(error, GuestFailed)
        assert "not with OK" in error.message


def test_what_follows_a_whole_reply_cannot_spoil_it():
    for junk in (b"HTTP/1.1 500 No\r\n\r\n", b"\x00" * 1000):
        assert fed([OK + REPLY + junk]) == (200, b"hello world")
        assert fed([OK + REPLY, junk]) == (200, b"hello world")


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nuntil the connection closes",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n",
    ],
)
def test_what_is_not_http_as_accepted_here_fails(reply: bytes):
    error = fed([OK + reply])
    assert isinstance(error, GuestFailed)
    assert "not HTTP as accepted here" in error.message


def test_a_reply_to_head_has_no_body():
    assert fed([OK + b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n"], head_request=True) == (200, b"")


def test_a_reply_before_the_request_was_read_is_a_reply():
    """A guest may refuse a large request without reading it."""

    async def story(line: Line) -> None:
        exchange = Exchange(1027, HEAD, b"x" * 1_000_000)
        dialling = line.loop.create_task(line.dial(exchange))
        peer = await line.accepted
        await peer.made
        peer.transport.pause_reading()
        await dialling
        peer.transport.write(OK + b"HTTP/1.1 413 No\r\nContent-Length: 2\r\n\r\nno")
        assert await read(exchange) == (413, b"no")
        peer.transport.abort()

    simulated(story)


def test_a_slow_reader_holds_the_guest_back():
    """Not much more than 256 KiB are ever in memory, and all of it arrives in the end."""

    async def story(line: Line) -> None:
        exchange, peer = await line.open()
        size = 5_000_000
        peer.transport.write(OK + b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size)
        await exchange.head()
        got = 0
        async for piece in exchange:
            got += len(piece)
            await asyncio.sleep(0.1)
            assert exchange._buffered <= 2 * 262_144
        assert got == size

    simulated(story)


def test_a_guest_that_dribbles_does_not_fill_the_memory_either():
    """A byte at a time, for a reader that does not read: what a piece costs is counted, not only its bytes."""

    async def story(line: Line) -> None:
        exchange, peer = await line.open()
        transport = exchange._transport
        assert transport is not None
        exchange.data_received(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n")
        pieces = 0
        while transport.is_reading():
            exchange.data_received(b"x")
            pieces += 1
        assert pieces < 3_000
        exchange.data_received(b"".join(b"x" for _ in range(10_000)))
        assert len(exchange._pieces) == pieces + 1
        exchange.close()
        peer.transport.abort()

    simulated(story)


def test_many_chunks_in_one_read_are_one_piece():
    async def story(line: Line) -> None:
        exchange, _ = await line.open()
        chunks = b"1\r\nx\r\n" * 10_000 + b"0\r\n\r\n"
        exchange.data_received(OK + b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
        assert [piece async for piece in exchange] == [b"x" * 10_000]

    simulated(story)


# When it must not, or no longer, go on.


@pytest.mark.parametrize("end", ["fail", "close"])
def test_an_exchange_ended_while_it_connects_is_never_written(end: str):
    """The guest gets no byte, and the connection is dropped."""

    async def story(line: Line) -> None:
        exchange = Exchange(1027, HEAD, b"ping")
        exchange.bound(1.0, on_expiry=lambda: pytest.fail("it never began"))
        dialling = line.loop.create_task(line.dial(exchange))
        await asyncio.sleep(0)
        if end == "fail":
            exchange.fail(GuestFailed("no more"))
        else:
            exchange.close()
        await asyncio.wait({dialling})
        await asyncio.sleep(1.0)
        assert not exchange.written
        assert line.peer.got == b""
        assert isinstance(await read(exchange), GuestFailed)

    simulated(story)


def test_its_time_begins_with_its_first_byte():
    """Connecting is not on the guest's account."""

    async def story(line: Line) -> None:
        exchange = Exchange(1027, HEAD, b"ping")
        expired: list[float] = []
        exchange.bound(1.0, on_expiry=lambda: expired.append(line.loop.time()))
        await asyncio.sleep(60.0)
        assert exchange.error is None
        await line.dial(exchange)
        began_s = line.loop.time()
        error = await read(exchange)
        assert isinstance(error, GuestTimeout)
        assert expired == [pytest.approx(began_s + 1.0, abs=0.01)]

    simulated(story)


def test_its_time_is_up_even_if_only_the_reader_is_slow():
    """The guest is ended; a reply that was whole by then can still be read, one that was not is an error."""

    async def story(line: Line, size: int) -> Any:
        expired: list[None] = []
        exchange = Exchange(1027, HEAD, b"ping")
        exchange.bound(1.0, on_expiry=lambda: expired.append(None))
        await line.dial(exchange)
        line.peer.transport.write(OK + b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size)
        await asyncio.sleep(2.0)
        assert expired == [None]
        return await read(exchange)

    assert simulated(lambda line: story(line, 1000)) == (200, b"x" * 1000)
    assert isinstance(simulated(lambda line: story(line, 1_000_000)), GuestTimeout)


def test_an_error_comes_after_all_that_was_said_before_it():
    async def story(line: Line) -> None:
        exchange, peer = await line.open()
        peer.transport.write(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello")
        await exchange.head()
        await asyncio.sleep(0.1)
        exchange.fail(GuestFailed("the guest died"))
        assert await anext(exchange) == b"hello"
        for _ in range(2):
            with pytest.raises(GuestFailed, match="the guest died"):
                await anext(exchange)

    simulated(story)


def test_whoever_waits_for_a_closed_exchange_is_told():
    """Nobody waits for ever."""

    async def story(line: Line) -> None:
        exchange, _ = await line.open()
        reading = line.loop.create_task(read(exchange))
        await asyncio.sleep(0.1)
        exchange.close()
        assert "given up" in (await reading).message

    simulated(story)


def test_a_cancelled_reader_may_be_followed_by_another():
    async def story(line: Line) -> None:
        exchange, peer = await line.open()
        waiting = line.loop.create_task(exchange.head())
        await asyncio.sleep(0.01)
        waiting.cancel()
        peer.transport.write(OK + REPLY)
        assert await read(exchange) == (200, b"hello world")

    simulated(story)


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        ("GET\r\nX: 1", "/", ()),
        ("GET", "/\n", ()),
        ("GET", "/a b", ()),
        ("GET", "/", ((b"x", b"1\r\n2"),)),
        ("GET", "/", ((b"x", b"1\r"),)),
        ("GET", "/", ((b"x\n", b"1"),)),
        ("GET", "/\0", ()),
        ("GET", "/\u20ac", ()),
    ],
)
def test_a_head_keeps_to_its_lines(method: str, target: str, headers: Any):
    with pytest.raises(ValueError):  # noqa: PT011  # whatever it says
        request_head(method, target, headers, 0)


def test_a_head_says_how_long_the_body_is_and_that_there_is_no_more():
    assert request_head("PUT", "/a?b", ((b"x", b"1"),), 7) == (
        b"PUT /a?b HTTP/1.1\r\nx: 1\r\ncontent-length: 7\r\nconnection: close\r\n\r\n"
    )
