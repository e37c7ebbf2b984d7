"""One HTTP exchange: a whole request in, a framed reply out."""

import asyncio
import http.client
from contextlib import suppress

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from guest.host import read_reply, request_bytes
from substrate_guest.app import Request
from substrate_guest.exchange import BODY_BYTES_MAX, HEAD_BYTES_MAX, Exchange, Refused


async def test_a_request_arrives_whole(exchange_pair):
    """The body is complete, header names are in lower case and nothing else is changed."""
    peer, exchange = exchange_pair()
    peer.sendall(request_bytes("PUT", "/a%2Fb?x=1", b"12345", [("X-Odd", "caf\xe9")]))
    request = await exchange.request()
    assert (request.method, request.target, request.body) == ("PUT", "/a%2Fb?x=1", b"12345")
    assert request.headers == (("host", "vsock"), ("content-length", "5"), ("x-odd", "caf\xe9"))


async def test_bytes_read_with_the_handshake_are_part_of_the_request(exchange_pair):
    whole = request_bytes(body=b"12345")
    peer, exchange = exchange_pair(whole[:20])
    peer.sendall(whole[20:])
    assert (await exchange.request()).body == b"12345"


async def test_a_chunked_request_is_understood(exchange_pair):
    peer, exchange = exchange_pair()
    peer.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
    assert (await exchange.request()).body == b"abcde"


async def test_a_peer_that_waits_to_be_asked_for_its_body_is_asked(exchange_pair):
    peer, exchange = exchange_pair()
    peer.sendall(
        request_bytes(headers=[("expect", "100-continue"), ("content-length", "2")]).replace(
            b"content-length: 0\r\n", b""
        )
    )
    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(exchange.request())
        told = await asyncio.get_running_loop().run_in_executor(None, peer.recv, 64)
        assert told.startswith(b"HTTP/1.1 100 ")
        peer.sendall(b"ok")
    assert reading.result().body == b"ok"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no host
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: x\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (BODY_BYTES_MAX + 1), 413),
        (b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"x" * HEAD_BYTES_MAX, 431),
        (b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n", 501),
        (b"\x00\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
    ],
)
async def test_what_is_not_a_request_for_us_is_refused(exchange_pair, sent, status):
    _, exchange = exchange_pair(sent)
    with pytest.raises(Refused) as refused:
        await exchange.request()
    assert refused.value.status == status


async def test_a_refusal_reaches_a_peer_that_is_still_sending(exchange_pair):
    peer, exchange = exchange_pair(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (BODY_BYTES_MAX + 1))
    with pytest.raises(Refused) as refused:
        await exchange.request()

    def send_then_read():
        peer.sendall(bytes(4 * 1024 * 1024))
        return read_reply(peer)

    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(asyncio.to_thread(send_then_read))
        await exchange.refuse(refused.value)
    assert reading.result().status == 413


async def test_a_peer_that_leaves_early_is_not_an_http_error(exchange_pair):
    peer, exchange = exchange_pair()
    peer.close()
    with pytest.raises(ConnectionError):
        await exchange.request()


HEADS = st.one_of(
    st.binary(max_size=200),
    st.lists(
        st.sampled_from(
            [b"GET", b"POST", b" ", b"/", b"HTTP/1.1", b"\r\n", b"\n", b"host: x", b"content-length: 3", b":", b"abc"]
            + [b"transfer-encoding: chunked", b"3\r\nabc\r\n0\r\n\r\n", b"expect: 100-continue", b"\x00", b"\xff"]
        ),
        max_size=12,
    ).map(b"".join),
)


@given(sent=HEADS)
@example(sent=b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc")
def test_any_bytes_are_a_request_or_refused_or_a_peer_that_left(sent):
    """No bytes of a host make the guest fail in a way it has no word for."""

    async def read():
        import socket

        ours, theirs = socket.socketpair()
        with theirs:
            with ours:
                ours.sendall(sent)
            return await Exchange(theirs).request()

    with suppress(Refused, ConnectionError):
        assert isinstance(asyncio.run(read()), Request)


async def replied(exchange_pair, act, *, method="GET"):
    """What the peer reads when the exchange does `act`."""
    peer, exchange = exchange_pair(request_bytes(method))
    await exchange.request()
    await act(exchange)
    return read_reply(peer, method)


async def test_a_body_known_at_once_has_its_length(exchange_pair):
    async def act(exchange):
        exchange.begin(201, [(b"x-a", b"1"), (b"x-a", b"2")])
        await exchange.end(b"hello")

    reply = await replied(exchange_pair, act)
    assert (reply.status, reply.body) == (201, b"hello")
    assert (reply.headers["content-length"], reply.headers["connection"]) == ("5", "close")
    assert "transfer-encoding" not in reply.headers


async def test_each_piece_is_on_its_way_before_the_next_is_made(exchange_pair):
    peer, exchange = exchange_pair(request_bytes())
    await exchange.request()
    exchange.begin(200, [])
    peer.setblocking(False)
    for piece in (b"one", b"two"):
        await exchange.write(piece)
        assert piece in peer.recv(4096)
    await exchange.end()
    assert peer.recv(4096) == b"0\r\n\r\n"


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
async def test_replies_without_a_body_have_none(exchange_pair, method, status):
    async def act(exchange):
        exchange.begin(status, [])
        await exchange.end(b"dropped")

    reply = await replied(exchange_pair, act, method=method)
    assert (reply.status, reply.body) == (status, b"")
    assert reply.headers.get("content-length") == ("7" if method == "HEAD" else None)


async def test_framing_is_not_the_workloads_to_say(exchange_pair):
    async def act(exchange):
        exchange.begin(200, [(b"Connection", b"keep-alive"), (b"Transfer-Encoding", b"gzip"), (b"Upgrade", b"x")])
        await exchange.end(b"hello")

    reply = await replied(exchange_pair, act)
    assert reply.headers == {"content-length": "5", "connection": "close"}


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (99, []),
        (101, []),
        (1000, []),
        (200, [(b"a b", b"")]),
        (200, [(b"a", b"x\r\nb: c")]),
        (200, [(b"content-length", b"x")]),
    ],
)
async def test_a_head_that_http_does_not_know_is_refused_before_anything_is_sent(exchange_pair, status, headers):
    _, exchange = exchange_pair(request_bytes())
    await exchange.request()
    with pytest.raises(ValueError, match="not an HTTP response"):
        exchange.begin(status, headers)
    assert not exchange.started


@pytest.mark.parametrize("body", [b"", b"1234", b"123456"])
async def test_a_declared_length_must_be_true(exchange_pair, body):
    """Nothing has gone out when it is not, so the caller can still be told."""
    peer, exchange = exchange_pair(request_bytes())
    await exchange.request()
    exchange.begin(200, [(b"content-length", b"5")])
    with pytest.raises(ValueError, match="breaks HTTP"):
        await exchange.end(body)
    await exchange.reply(502, "sorry")
    assert read_reply(peer).status == 502


async def test_a_head_that_has_not_gone_out_can_be_replaced(exchange_pair):
    async def act(exchange):
        exchange.begin(200, [])
        await exchange.reply(502, "sorry")

    assert (await replied(exchange_pair, act)).status == 502


async def test_a_reply_that_has_begun_can_only_be_cut(exchange_pair):
    peer, exchange = exchange_pair(request_bytes())
    await exchange.request()
    exchange.begin(200, [])
    await exchange.write(b"half")
    await exchange.refuse(Refused(502, "too late"))
    exchange._sock.close()
    with pytest.raises(http.client.IncompleteRead):
        read_reply(peer)


async def test_the_peers_leaving_is_noticed(exchange_pair):
    peer, exchange = exchange_pair(request_bytes())
    await exchange.request()
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        tasks.create_task(exchange.peer_left())
        peer.close()
    exchange.close()


async def test_a_complete_reply_ends_the_wait_for_the_peer(exchange_pair):
    _, exchange = exchange_pair(request_bytes())
    await exchange.request()
    exchange.begin(200, [])
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        tasks.create_task(exchange.peer_left())
        await exchange.end(b"done")
    exchange.close()


@given(pieces=st.lists(st.binary(max_size=300), max_size=6), last=st.binary(max_size=300))
def test_what_is_written_is_what_is_read(pieces, last):
    """Whatever the pieces, an HTTP client of another make sees their sum and a complete message."""

    async def written():
        import socket

        ours, theirs = socket.socketpair()
        with ours, theirs:
            exchange = Exchange(theirs, request_bytes())
            await exchange.request()
            exchange.begin(200, [])
            for piece in pieces:
                await exchange.write(piece)
            await exchange.end(last)
            theirs.close()
            return b"".join(iter(lambda: ours.recv(65536), b""))

    reader = h11.Connection(h11.CLIENT)
    reader.send(h11.Request(method="POST", target="/", headers=[("host", "x")]))
    reader.send(h11.EndOfMessage())
    reader.receive_data(asyncio.run(written()))
    body = b""
    while not isinstance(event := reader.next_event(), h11.EndOfMessage):
        body += event.data if isinstance(event, h11.Data) else b""
    assert body == b"".join(pieces) + last
