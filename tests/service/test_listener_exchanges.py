"""Between a whole head and the end of its reply: what an application is told, and what its caller gets."""

import asyncio
import ssl

import pytest
import trustme

from service.loopback import PATIENCE_S, answer, echo, served, whole_body
from substrate_seam.events import DefectFound
from substrate_service.exchange import WATCH, WHOLE

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
OFFERED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"


def post(length: int, *fields: bytes) -> bytes:
    lines = (b"POST / HTTP/1.1", b"Host: a", b"Content-Length: %d" % length, *fields, b"", b"")
    return b"\r\n".join(lines)


# Replies.


@pytest.mark.parametrize(
    ("method", "status", "fields", "body", "expected"),
    [
        ("GET", 200, [(b"Content-Length", b"2")], b"ok", {"content-length": "2"}),
        ("GET", 200, [], b"ok", {"transfer-encoding": "chunked"}),
        ("GET", 200, [(b"Transfer-Encoding", b"chunked")], b"ok", {"transfer-encoding": "chunked"}),
        ("GET", 599, [], b"", {"transfer-encoding": "chunked"}),
        ("HEAD", 200, [(b"content-length", b"2")], b"", {"content-length": "2"}),
        ("HEAD", 200, [], b"dropped", {}),
        ("GET", 204, [(b"content-length", b"0")], b"", {}),
        ("GET", 304, [(b"content-length", b"2")], b"", {"content-length": "2"}),
    ],
)
async def test_a_reply_is_framed_by_its_length_or_in_chunks(method, status, fields, body, expected):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": status, "headers": fields})
        await send({"type": "http.response.body", "body": body})

    async with served(app) as listener, listener.peer() as peer:
        for _ in range(2):  # and the connection is good for another one
            peer.send(GET.replace(b"GET", method.encode()))
            reply = await peer.reply(to=method)
            assert reply.status == status
            assert {name.lower(): value for name, value in reply.headers.items()} == expected
            assert reply.body == (b"" if method == "HEAD" else body)
        assert listener.events == []


async def test_chunks_of_a_reply_are_sent_as_they_come():
    step = asyncio.Event()

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        for piece in (b"a", b"", b"b"):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await step.wait()
        await send({"type": "http.response.body"})

    async with served(app) as listener, listener.peer() as peer:
        peer.send(GET)
        assert (await peer.reader.readuntil(b"1\r\na\r\n")).endswith(b"\r\n\r\n1\r\na\r\n")
        step.set()
        assert await peer.reader.readexactly(11) == b"1\r\nb\r\n0\r\n\r\n"


@pytest.mark.parametrize("by", ["application", "caller"])
async def test_either_side_may_ask_to_close_after_the_reply(by):
    async def app(scope, receive, send):
        await answer(send, body=b"bye", headers=[(b"connection", b"close")] if by == "application" else [])

    async with served(app) as listener, listener.peer() as peer:
        peer.send(GET if by == "application" else GET.replace(b"\r\n\r\n", b"\r\nConnection: x, Close\r\n\r\n"))
        reply = await peer.reply()
        assert (reply.headers["connection"], reply.body) == ("close", b"bye")
        assert await peer.rest() == b""


async def raises(scope, receive, send):
    raise LookupError("a bug")


async def returns(scope, receive, send):
    pass


async def forges_a_field(scope, receive, send):
    await answer(send, headers=[(b"x", b"a\r\nfc-node: forged")])


async def forges_a_name(scope, receive, send):
    await answer(send, headers=[(b"x: y\r\nz", b"a")])


async def informs(scope, receive, send):
    await answer(send, status=101)


async def starts_with_the_body(scope, receive, send):
    await send({"type": "http.response.body", "body": b"x"})


async def contradicts_itself(scope, receive, send):
    await answer(send, headers=[(b"transfer-encoding", b"chunked")])


async def counts_twice(scope, receive, send):
    await answer(send, headers=[(b"content-length", b"7")])


@pytest.mark.parametrize(
    "app",
    [
        raises,
        returns,
        forges_a_field,
        forges_a_name,
        informs,
        starts_with_the_body,
        contradicts_itself,
        counts_twice,
    ],
)
async def test_an_application_that_breaks_before_its_head_is_a_500_and_a_defect(app):
    async with served(app) as listener, listener.peer() as peer:
        peer.send(GET)
        reply = await peer.reply()
        assert (reply.status, reply.headers["fc-error"]) == (500, "internal")
        assert "fc-node" not in reply.headers
        assert await peer.rest() == b""
        assert [type(event) for event in listener.events] == [DefectFound]


async def test_a_500_to_head_has_no_body():
    async with served(raises) as listener, listener.peer() as peer:
        peer.send(GET.replace(b"GET", b"HEAD"))
        assert (await peer.reply(to="HEAD")).status == 500
        assert await peer.rest() == b""


async def raises_late(scope, receive, send):
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": b"half", "more_body": True})
    raise LookupError("a bug")


async def returns_early(scope, receive, send):
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": b"half", "more_body": True})


async def sends_too_much(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"half more"})


async def sends_too_little(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"half"})


async def aborts(scope, receive, send):
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": b"half", "more_body": True})
    await send({"type": "substrate.abort"})
    await send({"type": "http.response.body", "body": b"never"})


@pytest.mark.parametrize("app", [raises_late, returns_early, sends_too_much, sends_too_little, aborts])
async def test_a_reply_that_breaks_off_never_looks_complete(app):
    async with served(app) as listener, listener.peer() as peer:
        peer.send(GET)
        data = await peer.rest()
        assert not data.endswith(LAST_CHUNK)
        assert b"more" not in data
        assert b"never" not in data
        assert len(listener.events) == (0 if app is aborts else 1)


async def test_an_abort_before_the_head_closes_without_a_word():
    async def app(scope, receive, send):
        assert "substrate.abort" in scope["extensions"]
        await send({"type": "substrate.abort"})

    async with served(app) as listener, listener.peer() as peer:
        peer.send(GET)
        assert await peer.rest() == b""
        assert listener.events == []


async def test_a_defect_after_the_reply_is_told_and_costs_the_caller_nothing():
    async def app(scope, receive, send):
        await answer(send, body=b"ok")
        await send({"type": "http.response.body", "body": b"more"})

    async with served(app) as listener, listener.peer() as peer:
        for _ in range(2):
            peer.send(GET)
            assert (await peer.reply()).body == b"ok"
        async with asyncio.timeout(PATIENCE_S):
            while listener.state.tasks:
                await asyncio.wait(listener.state.tasks)
        assert len(listener.events) == 2


# Hanging up.


async def test_a_hang_up_is_told_while_the_application_waits():
    told = asyncio.Event()

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        assert (await receive())["more_body"] is False
        assert await receive() == {"type": "http.disconnect"}
        await send({"type": "http.response.body", "body": b"to nobody"})
        told.set()

    async with served(app) as listener, listener.peer() as peer:
        peer.send(GET)
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.hang_up()
        await asyncio.wait_for(told.wait(), PATIENCE_S)
        assert listener.events == []


async def test_once_the_reply_is_complete_receive_says_so():
    told = asyncio.Event()

    async def app(scope, receive, send):
        await whole_body(receive)
        async with asyncio.TaskGroup() as both:
            watcher = both.create_task(receive())
            await answer(send)
        assert watcher.result() == {"type": "http.disconnect"}
        told.set()

    async with served(app) as listener, listener.peer() as peer:
        peer.send(GET)
        assert (await peer.reply()).status == 200
        await asyncio.wait_for(told.wait(), PATIENCE_S)


async def test_an_application_may_have_itself_called_when_the_peer_leaves():
    """Once, however it leaves; and never when its reply is complete."""
    told, kept = asyncio.Event(), asyncio.Event()

    async def app(scope, receive, send):
        await whole_body(receive)
        if scope["path"] == "/whole":
            scope["extensions"][WATCH](told.set)
            await answer(send)
            assert not told.is_set()
            return
        scope["extensions"][WATCH](told.set)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive())["type"] != "http.disconnect":
            pass
        kept.set()

    async with served(app) as listener:
        for path, hears in (("/whole", False), ("/", True)):
            async with listener.peer() as peer:
                peer.send(GET.replace(b"GET / ", b"GET %b " % path.encode()))
                await peer.reader.readuntil(b"\r\n\r\n")
                if path != "/whole":
                    peer.hang_up()
                    await asyncio.wait_for(kept.wait(), PATIENCE_S)
            assert told.is_set() is hears, path
            kept.clear()


async def test_an_application_that_asks_too_late_is_called_at_once():
    told, left = asyncio.Event(), asyncio.Event()

    async def app(scope, receive, send):
        await whole_body(receive)
        while (await receive())["type"] != "http.disconnect":
            pass
        scope["extensions"][WATCH](told.set)
        left.set()

    async with served(app) as listener, listener.peer() as peer:
        peer.send(GET)
        peer.hang_up()
        await asyncio.wait_for(left.wait(), PATIENCE_S)
        assert told.is_set()


async def test_an_application_may_have_the_body_at_once_if_all_of_it_is_here():
    """Once, and only then: what is still to come, or waits to be asked for, has to be received."""
    had, asked = [], asyncio.Event()

    async def app(scope, receive, send):
        whole = scope["extensions"][WHOLE]
        at_once = [whole(), whole()]
        asked.set()
        had.append([*at_once, await whole_body(receive) if at_once == [None, None] else None])
        await answer(send)

    async with served(app) as listener, listener.peer() as peer:
        offered = post(3, b"Expect: 100-continue")
        for sent, late in ((post(3) + b"abc", b""), (post(3) + b"a", b"bc"), (offered, b"abc")):
            peer.send(sent)
            await asked.wait()
            asked.clear()
            peer.send(late)
            while (await peer.reply()).status == 100:
                pass
    assert had == [[b"abc", None, None], [None, None, b"abc"], [None, None, b"abc"]]


# Expect: 100-continue, the commit point of the wire.


async def test_the_100_goes_out_when_the_application_first_receives_and_not_before():
    ready = asyncio.Event()

    async def app(scope, receive, send):
        await ready.wait()
        await echo(scope, receive, send)

    async with served(app) as listener, listener.peer() as peer:
        peer.send(OFFERED)
        early = asyncio.ensure_future(peer.reply())  # noqa: TID251  # awaited below
        done, _ = await asyncio.wait({early}, timeout=0.05)
        assert not done
        ready.set()
        assert (await early).status == 100
        peer.send(b"3\r\nabc\r\n" + LAST_CHUNK)
        assert (await peer.reply()).body == b"POST /  abc"


async def test_a_connection_keeps_its_framing_through_refusals_and_acceptances():
    verdicts = iter(["accept", "accept", "refuse", "accept", "refuse", "accept"] * 2)

    async def app(scope, receive, send):
        if next(verdicts) == "accept":
            await echo(scope, receive, send)
        else:
            await answer(send, 503, b"full")

    async with served(app) as listener, listener.peer() as peer:
        for together in (False, True):
            carried = b""
            for verdict in ["accept", "accept", "refuse", "accept", "refuse", "accept"]:
                peer.send(carried + OFFERED)
                carried = b""
                if verdict == "accept":
                    assert (await peer.reply()).status == 100
                    peer.send(LAST_CHUNK)
                    assert (await peer.reply()).body == b"POST /  "
                else:
                    assert (await peer.reply()).status == 503
                    if together:  # the last chunk and the next head in one segment
                        carried = LAST_CHUNK
                    else:
                        peer.send(LAST_CHUNK)
        assert listener.events == []


async def test_a_refused_offer_of_a_known_length_closes_because_nobody_knows_what_follows():
    async def app(scope, receive, send):
        await answer(send, 503, b"full")

    async with served(app) as listener, listener.peer() as peer:
        peer.send(post(3, b"Expect: 100-continue"))
        reply = await peer.reply()
        assert (reply.status, reply.headers["connection"]) == (503, "close")
        peer.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert await peer.rest() == b""


async def test_nobody_is_told_to_continue_with_an_empty_body():
    async with served(echo) as listener, listener.peer() as peer:
        peer.send(post(0, b"Expect: 100-continue"))
        assert (await peer.reply()).status == 200


# Bodies that are refused, or wrong.


async def test_what_follows_a_refusal_is_thrown_away_only_so_far():
    async def app(scope, receive, send):
        await answer(send, 503, b"full")

    async with served(app, discard_bytes=1000) as listener, listener.peer() as peer:
        peer.send(CHUNKED)
        reply = await peer.reply()
        assert "connection" not in reply.headers
        peer.send(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
        assert await peer.rest() == b""


async def test_a_large_body_does_not_keep_its_sender_from_reading_the_refusal():
    async def app(scope, receive, send):
        await answer(send, 413, b"too large")

    async with served(app) as listener, listener.peer() as peer:
        peer.send(post(20_000_000))
        peer.send(b"x" * 20_000_000)
        reply = await peer.reply()
        assert (reply.status, reply.body, reply.headers["connection"]) == (413, b"too large", "close")
        assert await peer.rest() == b""


MALFORMED = {
    "no size": b"\r\n",
    "a size that is no number": b"xyz\r\n",
    "a signed size": b"+1\r\na\r\n",
    "a size in Python's spelling": b"0x1\r\na\r\n",
    "a size beyond all bounds": b"1" * 17 + b"\r\n",
    "a blank before the size": b" 1\r\na\r\n",
    "a blank after the size": b"1 \r\na\r\n",
    "a bare line feed": b"1\na\r\n",
    "a chunk longer than its size": b"1\r\nab\r\n",
    "a control character in an extension": b"1;\x00\r\na\r\n",
    "an extension without end": b"1;" + b"x" * 5000,
    "extensions without bounds": (b"1;" + b"x" * 4000 + b"\r\na\r\n") * 6,
    "a malformed trailer": b"0\r\nno colon\r\n\r\n",
    "a folded trailer": b"0\r\na: b\r\n c\r\n\r\n",
    "trailers without bounds": b"0\r\n" + b"a:b\r\n" * 5000,
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_body_is_a_400_if_no_reply_has_begun(name):
    left = asyncio.Event()

    async def app(scope, receive, send):
        while (await receive())["type"] == "http.request":
            pass
        await answer(send, body=b"a second answer")
        left.set()

    async with served(app) as listener, listener.peer() as peer:
        peer.send(CHUNKED + MALFORMED[name])
        reply = await peer.reply()
        assert (reply.status, reply.headers["fc-error"]) == (400, "bad-request")
        assert await peer.rest() == b""
        await asyncio.wait_for(left.wait(), PATIENCE_S)
        assert listener.events == []


async def test_a_body_that_goes_wrong_under_a_reply_cuts_it():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        while (await receive())["type"] == "http.request":
            pass

    async with served(app) as listener, listener.peer() as peer:
        peer.send(CHUNKED)
        await peer.reader.readuntil(b"half")
        peer.send(b"nonsense\r\n")
        assert await peer.rest() == b"\r\n"
        assert listener.events == []


async def test_a_large_body_is_read_only_as_fast_as_the_application_takes_it():
    held = []

    async def app(scope, receive, send):
        total, more = 0, True
        while more:
            message = await receive()
            held.append(len(message["body"]))
            total, more = total + len(message["body"]), message["more_body"]
        await answer(send, body=b"%d" % total)

    async with served(app) as listener, listener.peer() as peer:
        peer.send(post(5_000_000) + b"x" * 5_000_000)
        assert (await peer.reply()).body == b"5000000"
        assert max(held) <= 65536 + 262144


# Requests sent ahead.


async def test_requests_sent_ahead_are_answered_in_order_and_one_at_a_time():
    at_work = 0

    async def app(scope, receive, send):
        nonlocal at_work
        at_work += 1
        assert at_work == 1
        await asyncio.sleep(0)
        at_work -= 1
        await echo(scope, receive, send)

    async with served(app) as listener, listener.peer() as peer:
        peer.send(
            b"".join(b"POST /%d HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n%d" % (n, n) for n in range(9))
            + b"nonsense"
        )
        for n in range(9):
            assert (await peer.reply()).body == b"POST /%d  %d" % (n, n)
        assert (await peer.reply()).status == 400
        assert await peer.rest() == b""
        assert listener.events == []


async def test_more_sent_ahead_than_is_held_waits_in_the_network():
    held = []

    async def app(scope, receive, send):
        await asyncio.sleep(0)
        held.extend(len(connection._ahead) for connection in listener.state.connections)
        await echo(scope, receive, send)

    async with served(app) as listener, listener.peer() as peer:
        peer.send((b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 5000 + b"\r\n\r\n") * 300)
        for _ in range(300):
            assert (await peer.reply()).status == 200
        assert 0 < max(held) <= 65536 + 262144


async def test_a_request_inherits_nothing_from_the_one_before():
    from contextvars import ContextVar

    trace = ContextVar("trace", default="none")

    async def app(scope, receive, send):
        seen = trace.get()
        trace.set("left over")
        await answer(send, body=seen.encode())

    async with served(app) as listener, listener.peer() as peer:
        peer.send(GET * 3)
        for _ in range(3):
            assert (await peer.reply()).body == b"none"


# Certificates.


@pytest.mark.parametrize("client_has", ["a certificate", "none"])
async def test_the_names_of_a_verified_client_certificate_are_told(client_has):
    authority = trustme.CA()
    server_tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(server_tls)
    authority.configure_trust(server_tls)
    server_tls.verify_mode = ssl.CERT_OPTIONAL
    client_tls = ssl.create_default_context()
    authority.configure_trust(client_tls)
    if client_has == "a certificate":
        authority.issue_cert("node-1.example", common_name="node-1").configure_cert(client_tls)
    scopes = []

    async def app(scope, receive, send):
        scopes.append(scope)
        await answer(send, body=b"x" * 300_000)

    async with served(app, tls=server_tls, linger_s=0.1) as listener, listener.peer(tls=client_tls) as peer:
        peer.send(GET)
        assert len((await peer.reply()).body) == 300_000
        assert scopes[0]["scheme"] == "https"
        told = scopes[0]["extensions"].get("substrate.peercert")
        assert told == ({"names": ["node-1", "node-1.example"]} if client_has == "a certificate" else None)
        peer.send(b"nonsense\r\n\r\n")
        assert (await peer.reply()).status == 400
        assert await peer.rest() == b""
