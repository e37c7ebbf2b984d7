"""How long the listener waits for whom: the real protocol in virtual time, over a network in memory."""

import asyncio

import pytest
from uvicorn.server import ServerState

from service.loopback import answer, echo, refusal, whole_body
from simulation.network import Network
from simulation.virtual_time import run
from substrate_service.listener import ListenerLimits, protocol_factory, strict_config

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
LIMITS = ListenerLimits()
TRIP_S = 0.01
"""More than any trip through the network takes here."""


class Caller(asyncio.Protocol):
    """A client that notes what it got, and when the connection ended."""

    def __init__(self):
        self.got = b""
        self.ended_s = None
        self.stays = False
        self._news = asyncio.Event()

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.got += data
        self._news.set()

    def eof_received(self):
        return self.stays

    def connection_lost(self, exc):
        self.ended_s = asyncio.get_running_loop().time()
        self._news.set()

    async def has(self, end):
        while not self.got.endswith(end):
            assert self.ended_s is None, f"ended after {self.got!r}"
            self._news.clear()
            await self._news.wait()

    async def ends(self):
        """Return when the connection has ended, in virtual seconds."""
        while self.ended_s is None:
            self._news.clear()
            await self._news.wait()
        return self.ended_s


def in_virtual_time(app, story, limits=LIMITS):
    """Play `story(caller, state, connection)` against `app`; nothing may be left at its end."""

    async def main(dice):
        events = []
        config = strict_config(app, limits=limits, refusal=refusal, emit=events.append)
        state = ServerState()
        network = Network(dice, latency_s=(0.0001, 0.001))
        listener = network.listen(("node", 80), protocol_factory(config, state))
        _, caller = await network.connect(("node", 80), Caller)
        try:
            await story(caller, state)
        finally:
            caller.transport.abort()
            listener.close()
        await asyncio.sleep(1.0)
        assert events == []
        assert not state.connections
        assert not state.tasks

    run(main, seed=1)


def soon_after(expected_s):
    return pytest.approx(expected_s + TRIP_S / 2, abs=TRIP_S)


def now_s():
    return asyncio.get_running_loop().time()


def test_a_connection_without_a_byte_closes_when_idle_too_long():
    async def story(caller, state):
        assert await caller.ends() == soon_after(LIMITS.idle_s)
        assert caller.got == b""

    in_virtual_time(echo, story)


def test_a_connection_between_requests_closes_when_idle_too_long():
    async def story(caller, state):
        for _ in range(2):
            await asyncio.sleep(LIMITS.idle_s - 1)
            caller.transport.write(GET)
            await caller.has(b"0\r\n\r\n")
            replied_s, caller.got = now_s(), b""
        assert await caller.ends() == soon_after(replied_s + LIMITS.idle_s)
        assert caller.got == b""

    in_virtual_time(echo, story)


@pytest.mark.parametrize(("start", "drip"), [(b"G", b""), (b"\r\n", b"\r\n"), (GET[:-2], b"X: y\r\n")])
def test_a_head_has_ten_seconds_from_its_first_byte_however_it_drips(start, drip):
    async def story(caller, state):
        await asyncio.sleep(20)
        began_s = now_s()
        caller.transport.write(start)
        while not caller.got:
            await asyncio.sleep(1)
            caller.transport.write(drip)
        assert now_s() == pytest.approx(began_s + LIMITS.head_s, abs=1.0)
        await caller.ends()
        assert caller.got.startswith(b"HTTP/1.1 408 ")
        assert caller.got.count(b"HTTP/1.1") == 1

    in_virtual_time(echo, story)


def test_the_last_chunk_after_a_refusal_starts_the_idle_time_anew():
    async def app(scope, receive, send):
        await answer(send, 503, b"full")

    async def story(caller, state):
        caller.transport.write(
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
        )
        await caller.has(b"full")
        await asyncio.sleep(10)
        caller.transport.write(b"0\r\n\r\n")
        assert await caller.ends() == soon_after(10 + LIMITS.idle_s)

    in_virtual_time(app, story)


def test_a_refused_body_that_never_ends_is_not_waited_for():
    async def app(scope, receive, send):
        await answer(send, 503, b"full")

    async def story(caller, state):
        caller.transport.write(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        await caller.has(b"full")
        refused_s = now_s()
        while caller.ended_s is None:
            await asyncio.sleep(5)
            caller.transport.write(b"1\r\nx\r\n")
        assert caller.ended_s == soon_after(refused_s + LIMITS.idle_s)

    in_virtual_time(app, story)


def test_who_is_told_that_its_body_came_too_late_is_not_waited_for():
    """Least of all as long as a connection may be idle."""

    async def app(scope, receive, send):
        assert (await receive())["more_body"]
        await answer(send, status=408, body=b"too late")

    async def story(caller, state):
        caller.transport.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx")
        await caller.has(b"too late")
        assert b"connection: close" in caller.got
        assert await caller.ends() == soon_after(0.0)

    in_virtual_time(app, story)


def test_a_body_that_stalls_while_the_application_waits_is_a_408():
    left = []

    async def app(scope, receive, send):
        while (message := await receive())["type"] == "http.request":
            assert message["more_body"]
        assert message["substrate.answered"], "so that it does not tell of the same thing again"
        left.append(now_s())
        await answer(send, body=b"a second answer")

    async def story(caller, state):
        caller.transport.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")
        for _ in range(3):
            await asyncio.sleep(LIMITS.body_stall_s - 1)  # slow, but it moves
            assert caller.got == b""
            caller.transport.write(b"x")
        moved_s = now_s()
        await caller.ends()
        assert left == [soon_after(moved_s + LIMITS.body_stall_s)]
        assert caller.got.startswith(b"HTTP/1.1 408 ")
        assert b"fc-error: body-timeout" in caller.got
        assert caller.got.count(b"HTTP/1.1") == 1

    in_virtual_time(app, story)


def test_a_body_that_nobody_waits_for_may_take_its_time():
    async def app(scope, receive, send):
        await asyncio.sleep(10 * LIMITS.body_stall_s)
        await answer(send, body=await whole_body(receive))

    async def story(caller, state):
        caller.transport.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n")
        await asyncio.sleep(10 * LIMITS.body_stall_s + 1)
        caller.transport.write(b"x")
        await caller.has(b"\r\n\r\nx")

    in_virtual_time(app, story)


def test_a_hang_up_is_waited_for_as_long_as_the_application_likes():
    async def app(scope, receive, send):
        await whole_body(receive)
        assert await receive() == {"type": "http.disconnect"}

    async def story(caller, state):
        caller.transport.write(GET)
        await asyncio.sleep(36_000)
        assert state.tasks
        caller.transport.abort()
        await caller.ends()

    in_virtual_time(app, story)


@pytest.mark.parametrize("size", [70_000, 200_000, 10_000_000])
@pytest.mark.parametrize("fields", [[], [(b"connection", b"close")]])
def test_a_peer_that_reads_nothing_loses_its_connection(size, fields):
    """However much of the reply the network has taken already, and whether the application still waits or not."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": fields})
        for at in range(0, size, 65536):
            await send({"type": "http.response.body", "body": b"x" * min(65536, size - at), "more_body": True})
        await send({"type": "http.response.body"})

    async def story(caller, state):
        caller.transport.pause_reading()
        caller.transport.write(GET)
        await asyncio.sleep(LIMITS.idle_s + 2 * LIMITS.write_stall_s + 1)
        assert not state.connections
        assert not state.tasks

    in_virtual_time(app, story)


def test_a_peer_that_reads_slowly_keeps_its_connection():
    async def app(scope, receive, send):
        await answer(send, body=b"x" * 1_000_000)

    async def story(caller, state):
        caller.transport.write(GET)
        while not caller.got.endswith(b"x" * 1_000_000):
            caller.transport.pause_reading()
            await asyncio.sleep(LIMITS.write_stall_s - 1)
            caller.transport.resume_reading()
            await asyncio.sleep(0.0001)
        assert now_s() > 5 * LIMITS.write_stall_s

    in_virtual_time(app, story)


def test_a_peer_that_hangs_up_half_way_and_reads_nothing_is_not_waited_for():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
        await whole_body(receive)
        assert await receive() == {"type": "http.disconnect"}

    async def story(caller, state):
        caller.transport.pause_reading()
        caller.transport.write(GET)
        await asyncio.sleep(1)
        caller.transport.write_eof()
        await asyncio.sleep(2 * LIMITS.write_stall_s)
        assert not state.connections

    in_virtual_time(app, story)


def test_a_refused_head_is_lingered_over_only_so_long():
    async def story(caller, state):
        caller.stays = True
        caller.transport.write(b"nonsense\r\n\r\n")
        for _ in range(100):
            await asyncio.sleep(0.1)
            caller.transport.write(b"more of it")
            if not state.connections:
                break
        assert now_s() == pytest.approx(LIMITS.linger_s, abs=0.2)
        assert caller.got.count(b"HTTP/1.1") == 1

    in_virtual_time(echo, story)
