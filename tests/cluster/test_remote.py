"""The agent's end of the wire: what it makes of every answer, of silence and of breaks, and what it never does."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from random import Random

import msgspec
import pytest
from msgspec import structs

from conformance.node_contract import known
from conformance.worlds import ADDRESS, NODE_ID, Bench, Wire, running, served, wired, workload
from fakes.vmm import At
from simulation import virtual_time
from simulation.network import Network
from substrate_cluster.nodes.remote import Patience, RemoteNode
from substrate_seam.errors import (
    DuplicateInvocation,
    GuestFailed,
    GuestTimeout,
    GuestUnavailable,
    InternalError,
    InvocationCancelled,
    Ran,
    Reason,
    SubstrateError,
)
from substrate_seam.invocation import Isolation, Receipt, Start, Started
from substrate_seam.report import NodeLimits, NodeReport
from substrate_seam.wire import data_frames, encode_error, error_frame, head_frame, receipt_frame

MARGIN_S = Patience().margin_s
BODY_UNDER_WAY_S = 0.02
"""After so long a connection stands, and of a body of some MiB a part has arrived."""
STARTED = Started(
    queue_ms=0, claim_ms=1, ready_ms=1, start=Start.POOL, node="n", guest="g", isolation=Isolation.MICROVM
)
REPORT = NodeReport(
    node_id=NODE_ID, boot_id="boot1", size_mib=1, free_mib=1, isolation=Isolation.MICROVM, arch="amd64", full=True
)
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HEAD = head_frame(STARTED, 200, ((b"a", b"b"),))
DATA = data_frames(b"hello")[0]
END = receipt_frame(Receipt(guest_ms=1, body_bytes=5))


def sized(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


def chunked(*chunks: bytes, last: bool = True) -> bytes:
    framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + framed + (b"0\r\n\r\n" if last else b"")


def told(error: SubstrateError) -> bytes:
    """An error as a node tells it before the commit."""
    return sized(*encode_error(error))


def run(story, *, seed=1):
    """Tell a story with dice in virtual time; nothing may be left of it."""
    return virtual_time.run(story, seed=seed).value


# A node that says what it is told to.


@dataclass
class Script:
    """What a node says to an invocation: to its head, and once its body is whole. `orders` answers everything else."""

    to_head: bytes = CONTINUE
    to_body: bytes = b""
    hang_up: bool = False
    orders: Callable[[str], bytes] = lambda _line: sized(200, b'{"ran":"no"}')
    seen: list[str] = field(default_factory=list)
    """First lines of requests, and the bodies of invocations."""
    peers: list["Peer"] = field(default_factory=list)


class Peer(asyncio.Protocol):
    """One connection of a scripted node."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.received = b""
        self.line = ""
        script.peers.append(self)

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.received += data
        while self._advance():
            pass

    def connection_lost(self, _exc):
        self.script.seen.append("lost")

    def _advance(self) -> bool:
        if not self.line:
            head, end, rest = self.received.partition(b"\r\n\r\n")
            if not end:
                return False
            self.line, self.received = head.split(b" HTTP/")[0].decode(), rest
            self.script.seen.append(self.line)
            return self._answer_head(head)
        body, end, rest = self.received.partition(b"0\r\n\r\n")
        if not end:
            return False
        self.script.seen.append(f"body {body!r}")
        self.line, self.received = "", rest
        if self.committed:
            self._say(self.script.to_body)
        return True

    def _answer_head(self, head: bytes) -> bool:
        if self.line.startswith("GET"):
            self._say(chunked(msgspec.json.encode(REPORT) + b"\n", last=False), never_hang_up=True)
        elif self.line.startswith("POST"):
            self.committed = self.script.to_head == CONTINUE
            self._say(self.script.to_head)
            return True
        else:
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            self.received = self.received[length:]
            self._say(self.script.orders(self.line), never_hang_up=True)
        self.line = ""
        return True

    def _say(self, data: bytes, *, never_hang_up: bool = False) -> None:
        self.transport.write(data)
        if self.script.hang_up and not never_hang_up and data != CONTINUE:
            self.transport.close()


@asynccontextmanager
async def scripted(dice: Random, script: Script, **patience):
    """An agent's node whose other end follows a script; its reports are heard until the end."""
    network = Network(dice)
    listener = network.listen(ADDRESS, lambda: Peer(script))
    node = RemoteNode(
        NODE_ID, lambda protocol: network.connect(ADDRESS, protocol), patience=Patience(**{"silence_s": 1e5} | patience)
    )
    async with asyncio.TaskGroup() as background, node, aclosing(node.reports()) as reports:
        assert await anext(reports) == REPORT
        yield Bench(node, None, [], list, background.create_task), network
        listener.close()


def heard(script: Script, **changes):
    """What a caller hears when the node follows this script, and how long it took; None is a whole answer."""

    async def story(dice):
        async with scripted(dice, script) as (bench, _):
            began_s = asyncio.get_running_loop().time()
            outcome = await bench.call(workload(), **changes)
            took_s = asyncio.get_running_loop().time() - began_s
            await asyncio.sleep(1.0)
            return outcome, took_s

    return run(story)


BEFORE = {
    "a refusal": (told(GuestUnavailable(Reason.CAPACITY, "full", retry_after_s=3.0)), GuestUnavailable, "capacity"),
    "cancelled": (told(InvocationCancelled("late")), InvocationCancelled, "cancelled"),
    "a bad request": (told(SubstrateError(Reason.BAD_REQUEST, "x", ran=Ran.NO)), SubstrateError, "bad-request"),
    "an unknown refusal": (
        sized(503, b'{"error":{"reason":"tuesday","ran":"no","message":"x"}}'),
        GuestUnavailable,
        "node-unreachable",
    ),
    "a page": (sized(503, b"<html>"), GuestUnavailable, "node-unreachable"),
    "an empty answer": (sized(404, b""), GuestUnavailable, "node-unreachable"),
    "success without a body": (sized(200, b""), GuestUnavailable, "node-unreachable"),
    "frames without a body": (chunked(HEAD, DATA, END), GuestUnavailable, "node-unreachable"),
    "no HTTP": (b"SSH-2.0\r\n\r\n", GuestUnavailable, "node-unreachable"),
    "other interim replies": (b"HTTP/1.1 102 X\r\n\r\n" * 9, GuestUnavailable, "node-unreachable"),
    "half a head": (b"HTTP/1.1 503 X\r\ncontent-le", GuestUnavailable, "node-unreachable"),
    "half an error": (told(GuestUnavailable(Reason.MEMORY, "x"))[:-5], GuestUnavailable, "node-unreachable"),
    "nothing": (b"", GuestUnavailable, "node-unreachable"),
    "an endless error": (sized(503, b"x" * 2_000_000), GuestUnavailable, "node-unreachable"),
}


@pytest.mark.parametrize(("answer", "kind", "reason"), BEFORE.values(), ids=BEFORE)
def test_whatever_a_node_says_before_the_commit_nothing_ran(answer, kind, reason):
    """And not a byte of the body has left."""
    script = Script(to_head=answer, hang_up=True)
    outcome, took_s = heard(script)
    assert type(outcome.error) is kind
    assert (outcome.error.reason, outcome.error.ran) == (reason, Ran.NO)
    assert not any("hello" in line for line in script.seen)
    assert took_s < 1.0


def test_a_duplicate_is_passed_on():
    """The first delivery may have run; ingress knows what to say."""
    outcome, _ = heard(Script(to_head=told(DuplicateInvocation("again"))))
    assert isinstance(outcome.error, DuplicateInvocation)
    assert outcome.error.ran is Ran.MAYBE


AFTER = {
    "a whole answer": ([HEAD, DATA, END], None, None),
    "a refusal after all": ([error_frame(GuestUnavailable(Reason.NOT_READY, "x"))], GuestUnavailable, "not-ready"),
    "cancelled": ([error_frame(InvocationCancelled("x"))], InvocationCancelled, "cancelled"),
    "a failure": ([error_frame(GuestFailed("x"))], GuestFailed, "guest-failed"),
    "a timeout": ([error_frame(GuestTimeout("x"))], GuestTimeout, "guest-timeout"),
    "a defect": ([error_frame(InternalError("x"))], InternalError, "internal"),
    "a failure after the head": ([HEAD, error_frame(GuestFailed("x"))], GuestFailed, "guest-failed"),
    "a timeout after the head": ([HEAD, DATA, error_frame(GuestTimeout("x"))], GuestTimeout, "guest-timeout"),
    "that nothing ran, after the head": (
        [HEAD, error_frame(GuestUnavailable(Reason.MEMORY, "x"))],
        GuestFailed,
        "guest-failed",
    ),
    "no frames": ([], GuestFailed, "guest-failed"),
    "no end": ([HEAD, DATA], GuestFailed, "guest-failed"),
    "half an end": ([HEAD, DATA, END[:-1]], GuestFailed, "guest-failed"),
    "an end without a head": ([END], GuestFailed, "guest-failed"),
    "two heads": ([HEAD, HEAD, END], GuestFailed, "guest-failed"),
    "an end with more behind it": ([HEAD, DATA, END + b"x"], GuestFailed, "guest-failed"),
    "a head that cannot be read": ([b"H\0\0\0\2{}", END], GuestFailed, "guest-failed"),
    "no frames but a page": ([b"<html>"], GuestFailed, "guest-failed"),
}


@pytest.mark.parametrize("last", [True, False], ids=["ended", "cut"])
@pytest.mark.parametrize(("frames", "kind", "reason"), AFTER.values(), ids=AFTER)
def test_after_the_commit_only_the_nodes_word_says_what_ran(frames, kind, reason, last):
    """Whether or not the last chunk of the reply comes: without its end frame an answer is broken, with it whole."""
    outcome, took_s = heard(Script(to_body=chunked(*frames, last=last), hang_up=True))
    assert took_s < 1.0
    if kind is None:
        assert (outcome.error, outcome.status, outcome.body) == (None, 200, b"hello")
        assert outcome.receipt.body_bytes == 5
    else:
        assert type(outcome.error) is kind
        assert outcome.error.reason == reason
        assert not outcome.whole


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (told(SubstrateError(Reason.BODY_TIMEOUT, "slow", ran=Ran.NO)), GuestUnavailable),
        (told(SubstrateError(Reason.BODY_TOO_LARGE, "big", ran=Ran.NO)), SubstrateError),
        (told(InternalError("defect")), InternalError),
        (sized(500, b"<html>"), GuestFailed),
        (b"garbage", GuestFailed),
        (b"", GuestFailed),
    ],
)
def test_an_answer_without_frames_after_the_commit(answer, kind):
    """That nothing ran is believed when it is said, and only then."""
    outcome, _ = heard(Script(to_body=answer, hang_up=True))
    assert type(outcome.error) is kind


@pytest.mark.parametrize(
    ("frames", "kind"), [((HEAD, DATA, END), None), ((HEAD, error_frame(GuestFailed("x"))), GuestFailed)]
)
def test_an_answer_that_comes_byte_by_byte_is_heard_to_its_end(frames, kind):
    """Behind its last frame there are bytes to come: its connection is used again only after them, and then is."""
    script = Script()

    async def trickle(data):
        for byte in data:
            script.peers[-1].transport.write(bytes([byte]))
            await asyncio.sleep(0.01)

    async def story(dice):
        async with scripted(dice, script) as (bench, _):
            for _ in range(2):
                call = bench.background(bench.call(workload()))
                await asyncio.sleep(0.5)
                await trickle(chunked(*frames))
                outcome = await call
                assert (type(outcome.error) if outcome.error else None) is kind
        assert opened(script) == 1

    run(story)
    script.peers.clear()
    frames = frames[-1:] if kind else frames  # an error instead of a head
    run(story)


# Silence.


def test_a_node_that_says_nothing_before_the_commit_is_left_and_told_so():
    """A little after the call had to start; the node is told not to keep its place."""
    script = Script(to_head=b"")
    outcome, took_s = heard(script, start_within_s=5.0)
    assert (outcome.error.reason, outcome.error.ran) == (Reason.NODE_UNREACHABLE, Ran.NO)
    assert "nor said why" in outcome.error.message
    assert 5.0 <= took_s <= 5.0 + MARGIN_S + 0.1
    assert f"DELETE /v1/invocations/{outcome.invocation.id}" in script.seen


def test_a_node_that_is_silent_on_a_connection_used_before_is_not_asked_again():
    """The connection stands: it is not one that was closed under us."""
    script = whole_answers()

    async def story(dice):
        async with scripted(dice, script) as (bench, _):
            await bench.call(workload())
            script.to_head = b""
            error = await bench.refusal(workload(), start_within_s=5.0)
            assert (error.reason, error.ran) == (Reason.NODE_UNREACHABLE, Ran.NO)
            script.orders = lambda _line: b""
            assert isinstance(await refusal_of("resume", bench), GuestUnavailable)
        assert script.seen.count("POST /v1/invocations") == 2
        assert script.seen.count("DELETE /v1/node/drain") == 1

    run(story)


@pytest.mark.parametrize("frames", [[], [HEAD], [HEAD, DATA]])
def test_a_node_that_falls_silent_after_the_commit_is_left(frames):
    """A little after the call had to be over: something may have run."""
    outcome, took_s = heard(Script(to_body=chunked(*frames, last=False)), run_within_s=7.0)
    assert isinstance(outcome.error, GuestTimeout)
    assert 7.0 <= took_s <= 7.0 + 10.0 + MARGIN_S + 0.1


@pytest.mark.parametrize("frames", [(HEAD, DATA, END), (error_frame(GuestFailed("x")),)])
def test_a_node_that_has_said_all_and_does_not_end_its_reply_is_not_waited_for_long(frames):
    """What it said counts; only its connection is of no more use."""
    outcome, took_s = heard(Script(to_body=chunked(*frames, last=False)))
    assert outcome.whole == (len(frames) == 3)
    assert took_s <= 2 * MARGIN_S


def test_a_slow_reader_is_not_taken_for_a_silent_node():
    """Time that the caller takes is not the node's."""
    body = b"".join(data_frames(b"x" * 1_000_000))
    script = Script(to_body=chunked(HEAD, body, END))

    async def story(dice):
        async with scripted(dice, script) as (bench, _):
            async with bench.node.invoke(bench.invocation(workload(), run_within_s=1.0)) as reply:
                size = 0
                async for piece in reply.body:
                    size += len(piece)
                    await asyncio.sleep(20.0)
            return size

    assert run(story) == 1_000_000


def test_a_node_that_cannot_be_reached_is_told_at_once_and_one_that_does_not_answer_soon():
    """Refused: at once. Swallowed by the network: after three seconds, for a call that has more time than that."""

    async def story(dice):
        async with scripted(dice, Script()) as (bench, network):
            took_s = []
            for refuse in (True, False):
                network.partition(ADDRESS, refuse=refuse)
                began_s = asyncio.get_running_loop().time()
                error = await bench.refusal(workload())
                took_s.append(asyncio.get_running_loop().time() - began_s)
                assert (error.reason, error.ran) == (Reason.NODE_UNREACHABLE, Ran.NO)
                network.heal(ADDRESS)
            return took_s

    refused_s, swallowed_s = run(story)
    assert refused_s < 0.1
    assert 2.9 < swallowed_s < 3.1


# Connections.


def whole_answers() -> Script:
    return Script(to_body=chunked(HEAD, DATA, END))


def opened(script: Script) -> int:
    """How many connections were made, but for that of the reports."""
    return len(script.peers) - 1


def test_one_connection_carries_call_after_call_also_after_refusals():
    """Every framing of an exchange comes to its end, on both sides."""
    script = whole_answers()

    async def story(dice):
        async with scripted(dice, script) as (bench, _):
            for body in (b"hello", b"", b"x" * 200_000, b"hello"):
                assert (await bench.call(workload(), body=body)).whole
                script.to_head = told(GuestUnavailable(Reason.CAPACITY, "full"))
                assert (await bench.refusal(workload())).reason is Reason.CAPACITY
                script.to_head = CONTINUE
                await bench.node.forget("digest")
        assert opened(script) == 1

    run(story)


def test_what_was_not_read_of_an_answer_is_no_part_of_the_next():
    """Its connection can be used again all the same, if it was whole."""
    body = b"".join(data_frames(b"x" * 1_000_000))
    script = Script(to_body=chunked(HEAD, body, END))

    async def story(dice):
        async with scripted(dice, script) as (bench, _):
            async with bench.node.invoke(bench.invocation(workload())):
                await asyncio.sleep(1.0)
            script.to_body = chunked(HEAD, DATA, END)
            for _ in range(2):
                async with bench.node.invoke(bench.invocation(workload())):
                    await asyncio.sleep(1.0)
                assert (await bench.call(workload())).body == b"hello"
        assert opened(script) == 2, "the first answer was not whole: nobody had read so far"

    run(story)


def test_the_connection_used_last_is_used_first_and_unused_ones_go():
    """After thirty seconds, well before the node would close them."""
    script = whole_answers()

    async def story(dice):
        async with scripted(dice, script) as (bench, network):
            async with asyncio.TaskGroup() as callers:
                for _ in range(5):
                    callers.create_task(bench.call(workload()))
            assert opened(script) == 5
            for _ in range(20):
                await asyncio.sleep(2.0)
                assert (await bench.call(workload())).whole
            assert len(network.connections) == 1 + 1
            await asyncio.sleep(31.0)
            assert len(network.connections) == 1
        assert opened(script) == 5

    run(story)


def test_only_so_many_connections_are_kept():
    script = whole_answers()

    async def story(dice):
        async with scripted(dice, script) as (bench, network):
            async with asyncio.TaskGroup() as callers:
                for _ in range(80):
                    callers.create_task(bench.call(workload()))
            await asyncio.sleep(1.0)
            assert len(network.connections) == 1 + 64
        assert opened(script) == 80

    run(story)


@pytest.mark.parametrize("unasked", [b"HTTP/1.1 408 Late\r\n\r\n", b"x"])
def test_a_connection_on_which_the_node_speaks_unasked_is_not_used_again(unasked):
    script = whole_answers()

    async def story(dice):
        async with scripted(dice, script) as (bench, _):
            await bench.call(workload())
            script.peers[-1].transport.write(unasked)
            await asyncio.sleep(1.0)
            assert (await bench.call(workload())).whole
        assert opened(script) == 2

    run(story)


def test_bytes_behind_an_answer_end_its_connection():
    script = Script(to_body=chunked(HEAD, DATA, END) + b"HTTP/1.1 200 OK\r\n")

    async def story(dice):
        async with scripted(dice, script) as (bench, _):
            for _ in range(2):
                assert (await bench.call(workload())).whole
        assert opened(script) == 2

    run(story)


def test_a_connection_that_the_node_closes_just_then_costs_nothing():
    """The request and the end of the connection pass each other on their way: another connection carries it."""
    script = whole_answers()

    async def story(dice):
        async with scripted(dice, script) as (bench, _):
            await bench.call(workload())
            script.peers[-1].transport.close()
            assert (await bench.call(workload())).whole
            await bench.node.forget("digest")
            script.peers[-1].transport.close()
            await bench.node.forget("digest")
        assert [line for line in script.seen if line.startswith("POST")] == ["POST /v1/invocations"] * 2

    run(story)


def test_a_call_that_was_admitted_on_a_connection_that_then_broke_did_not_run():
    """The same request is sent again, since not a byte had come back; the node knows it, and is told to forget it."""

    async def story(dice):
        async with wired(dice) as wire:
            bench = wire.bench
            work = await known(bench)
            bench.faults.on(At.BOOT, delay_s=5.0)
            idle = list(wire.network.connections)[-1]
            call = bench.background(bench.call(work))
            await bench.faults.reached(At.BOOT)
            idle.cut()
            outcome = await call
            await asyncio.sleep(0.5)
            assert not wire.there.node.running
            await bench.settled()
            return outcome, bench.journal

    outcome, journal = run(story)
    assert (outcome.error.reason, outcome.error.ran) == (Reason.NODE_UNREACHABLE, Ran.NO)
    assert not journal


def test_a_call_that_was_admitted_on_a_fresh_connection_that_then_broke_did_not_run():
    """It is told as such, and the node is told to forget it."""

    async def story(dice):
        async with wired(dice) as wire:
            bench = wire.bench
            work = workload()
            await wire.there.node.ensure(work)
            bench.faults.on(At.BOOT, delay_s=5.0)
            call = bench.background(bench.call(work))
            await bench.faults.reached(At.BOOT)
            list(wire.network.connections)[-1].cut()
            outcome = await call
            await asyncio.sleep(0.5)
            assert not wire.there.node.running
            await bench.settled()
            return outcome, bench.journal

    outcome, journal = run(story)
    assert (outcome.error.reason, outcome.error.ran) == (Reason.NODE_UNREACHABLE, Ran.NO)
    assert not journal


# Backpressure.


def test_a_node_that_does_not_read_is_not_written_to():
    """A large body waits in the request, not in the socket's buffer."""
    script = whole_answers()

    async def story(dice):
        async with scripted(dice, script) as (bench, network):
            call = bench.background(bench.call(workload(), body=b"x" * 5_000_000))
            await asyncio.sleep(BODY_UNDER_WAY_S)
            script.peers[-1].transport.pause_reading()
            await asyncio.sleep(5.0)
            assert list(network.connections)[-1].client.get_write_buffer_size() < 200_000
            script.peers[-1].transport.resume_reading()
            assert (await call).whole

    run(story)


def test_a_caller_that_does_not_read_holds_the_node_back():
    """What is buffered on the way stays bounded."""
    script = Script()

    async def story(dice):
        async with scripted(dice, script) as (bench, network):
            async with bench.node.invoke(bench.invocation(workload())) as reply:
                await asyncio.sleep(10.0)
                unread = list(network.connections)[-1].server.get_write_buffer_size()
                size = sum([len(piece) async for piece in reply.body])
            return unread, size

    script.to_body = chunked(HEAD, *(data_frames(b"x" * 65_536) * 100), END)
    unread, size = run(story)
    assert size == 6_553_600
    assert unread > 6_000_000


def test_a_refusal_in_the_middle_of_a_large_body_is_heard_there():
    """The rest is not sent, and the connection can be used again."""
    script = Script(to_body=chunked(HEAD, DATA, END))

    async def story(dice):
        async with scripted(dice, script) as (bench, _):
            call = bench.background(bench.call(workload(), body=b"x" * 5_000_000))
            await asyncio.sleep(BODY_UNDER_WAY_S)
            peer = script.peers[-1]
            peer.transport.pause_reading()
            await asyncio.sleep(1.0)
            peer.transport.write(told(SubstrateError(Reason.BODY_TOO_LARGE, "big", ran=Ran.NO)))
            script.to_body = b""
            await asyncio.sleep(1.0)
            peer.transport.resume_reading()
            outcome = await call
            await asyncio.sleep(1.0)
            script.to_body = chunked(HEAD, DATA, END)
            assert (await bench.call(workload())).whole
            assert opened(script) == 1
            return outcome, max(map(len, script.seen))

    outcome, sent = run(story)
    assert outcome.error.reason is Reason.BODY_TOO_LARGE
    assert sent < 2_000_000


# Reports and boot ids.


VERBS = {
    "invoke": lambda bench: bench.refusal(workload()),
    "ensure": lambda bench: bench.node.ensure(workload()),
    "forget": lambda bench: bench.node.forget("digest"),
    "cancel": lambda bench: bench.node.cancel("0" * 32),
    "drain": lambda bench: bench.node.drain(within_s=1.0),
    "resume": lambda bench: bench.node.resume(),
    "limit": lambda bench: bench.node.limit(NodeLimits(generation=1, memory_mib=1)),
}


async def refusal_of(verb, bench) -> SubstrateError:
    """How a verb was refused."""
    try:
        error = await VERBS[verb](bench)
    except SubstrateError as raised:
        return raised
    return error


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_is_asked_of_a_node_that_was_never_heard(verb):
    """Nobody knows which start of it is meant."""

    async def story(dice):
        network = Network(dice)
        async with (
            asyncio.TaskGroup() as background,
            RemoteNode(NODE_ID, lambda protocol: network.connect(ADDRESS, protocol)) as node,
        ):
            error = await refusal_of(verb, Bench(node, None, [], list, background.create_task))
            assert (error.reason, error.ran) == (Reason.NODE_UNREACHABLE, Ran.NO)
            assert "not been heard" in error.message
            assert not network.connections_made

    run(story)


@pytest.mark.parametrize("verb", VERBS)
def test_a_node_that_has_started_anew_is_not_taken_for_the_one_before(verb):
    """The old one still reports; the new one refuses, its agent listens anew, and then all is well."""

    async def story(dice):
        async with wired(dice) as wire:
            bench = wire.bench
            work = await known(bench)
            wire.network.cut(ADDRESS)
            await asyncio.sleep(1.0)
            first = wire.node.boot_id()
            async with started_anew(wire, dice) as boot_id:
                error = await refusal_of(verb, bench)
                assert (error.reason, error.ran) == (Reason.NODE_UNREACHABLE, Ran.NO)
                assert "started anew" in error.message
                assert isinstance(await refusal_of("resume", bench), GuestUnavailable)
                await asyncio.sleep(1.0)
                assert wire.node.boot_id() == boot_id != first
                await bench.node.ensure(work)
                assert (await bench.call(work)).whole

    run(story)


def test_a_late_word_from_the_node_before_does_not_make_the_new_one_forgotten():
    """It is refused for the start that it named; the agent knows of another one by then."""
    script = Script(orders=lambda _line: b"")
    anew = msgspec.json.encode(structs.replace(REPORT, boot_id="boot2")) + b"\n"
    misdirected = encode_error(GuestUnavailable(Reason.NODE_UNREACHABLE, "it has started anew"))[1]

    async def story(dice):
        network = Network(dice)
        listener = network.listen(ADDRESS, lambda: Peer(script))
        async with (
            RemoteNode(NODE_ID, lambda protocol: network.connect(ADDRESS, protocol)) as node,
            asyncio.TaskGroup() as background,
            aclosing(node.reports()) as reports,
        ):
            await anext(reports)
            late = background.create_task(refusal_of("resume", Bench(node, None, [], list, background.create_task)))
            await asyncio.sleep(1.0)
            script.peers[0].transport.write(b"%x\r\n%b\r\n" % (len(anew), anew))
            assert (await anext(reports)).boot_id == "boot2"
            script.peers[1].transport.write(sized(421, misdirected))
            assert "started anew" in (await late).message
            assert node.boot_id() == "boot2"
            listener.close()

    run(story)


@asynccontextmanager
async def started_anew(wire: Wire, dice: Random):
    """A second start of the daemon at the same address, while connections to the first one live on."""
    for listener in list(wire.network._listeners.values()):
        if listener.address == ADDRESS:
            listener.close()
    reports = next(iter(wire.network.connections))
    for connection in list(wire.network.connections):
        if connection is not reports and connection.address == ADDRESS:
            connection.cut()
    await asyncio.sleep(0.01)
    old = wire.there.node
    async with running(wire.there, boot_id="boot2") as node, served(node, wire.there):
        yield node.boot_id
        wire.there.node = old


def reports_of(answer: bytes, **patience):
    """The reports that a node sends, and how their stream ended."""

    async def story(dice):
        network = Network(dice)
        script = Script()
        listener = network.listen(ADDRESS, lambda: Raw(answer, script))
        seen = []
        try:
            async with RemoteNode(
                NODE_ID, lambda protocol: network.connect(ADDRESS, protocol), patience=Patience(**patience)
            ) as node:
                async for report in node.reports():
                    seen.append(report)  # noqa: PERF401  # what came before an error counts
        except GuestUnavailable as error:
            return seen, error.message
        finally:
            listener.close()
        return seen, None

    return run(story)


class Raw(Peer):
    """Answers everything with the same bytes."""

    def __init__(self, answer, script):
        super().__init__(script)
        self.answer = answer

    def data_received(self, data):
        self.transport.write(self.answer)


LINE = msgspec.json.encode(REPORT) + b"\n"
FOREIGN = LINE.replace(NODE_ID.encode(), b"other")


def test_reports_end_when_the_node_ends_them_or_falls_silent():
    """After the first one nothing is raised: the node was heard, and is not heard any more."""
    assert reports_of(chunked(LINE, LINE)) == ([REPORT] * 2, None)
    assert reports_of(chunked(LINE, last=False)) == ([REPORT], None)
    assert reports_of(chunked(LINE, LINE[:9], last=False)) == ([REPORT], None)
    assert reports_of(chunked(LINE) + b"x") == ([REPORT], None)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "said nothing"),
        (b"garbage\r\n\r\n", "malformed"),
        (chunked(LINE[:9]), "came to nothing"),
        (chunked(FOREIGN), "calls itself 'other'"),
        (chunked(b"{}\n"), "cannot be read"),
        (chunked(LINE.replace(b"boot1", b"a b")), "boot id"),
        (sized(401, b"<html>"), "401"),
        (told(SubstrateError(Reason.FORBIDDEN, "a certificate is needed", ran=Ran.NO)), "a certificate is needed"),
    ],
)
def test_a_node_that_cannot_be_heard_at_all_says_why(answer, why):
    seen, message = reports_of(answer)
    assert not seen
    assert why in message


def test_reports_of_a_silent_node_end_after_three_heartbeats():
    async def story(dice):
        async with wired(dice) as wire, aclosing(wire.node.reports()) as reports:
            await anext(reports)
            began_s = asyncio.get_running_loop().time()
            wire.network.partition(ADDRESS)
            async for _ in reports:
                pass
            silent_s = asyncio.get_running_loop().time() - began_s
            wire.network.heal(ADDRESS)
            return silent_s

    assert 4.0 < run(story) < 6.1


# The network goes silent, and comes back.


@pytest.mark.parametrize("when_s", [0.0, 0.01, 0.05, 0.2, 1.0, 6.0])
@pytest.mark.parametrize("lasts_s", [2.0, 15.0, 200.0])
def test_a_partition_at_any_time_and_of_any_length_ends_in_the_truth(when_s, lasts_s):
    """What was on its way arrives when it heals: nothing runs that was told as not run, nothing runs twice."""

    async def story(dice):
        async with wired(dice) as wire:
            bench, work = wire.bench, await known(wire.bench, concurrency=1)
            targets = ("/?after_s=3", "/?after_s=1", "/?pieces=3&chunked=1&pace_s=1", "/")
            calls = [
                bench.background(bench.call(work, target, start_within_s=8.0, run_within_s=5.0)) for target in targets
            ]
            await asyncio.sleep(when_s)
            wire.network.partition(ADDRESS)
            await asyncio.sleep(lasts_s)
            wire.network.heal(ADDRESS)
            await asyncio.wait(calls)
            await asyncio.sleep(60.0)
            await bench.settled()
            assert (await bench.call(await known(bench, "another"))).whole

    for seed in (1, 2):
        run(story, seed=seed)


# Leaving.


@pytest.mark.parametrize("after_s", [0.0, 0.02, 1.0])
def test_a_node_that_is_left_leaves_nothing(after_s):
    """No task, connection or timer, whatever goes on; what waits for it is told."""

    async def story(dice):
        outcomes = []
        async with wired(dice) as wire:
            bench, work = wire.bench, await known(wire.bench, concurrency=1)
            calls = [bench.background(bench.call(work, "/?after_s=5")) for _ in range(3)]
            await asyncio.sleep(after_s)
            await wire.node.__aexit__()
            await asyncio.wait(calls)
            outcomes = [call.result() for call in calls]
            assert isinstance(await bench.refusal(work), GuestUnavailable)
            await bench.settled()
        return outcomes

    for outcome in run(story):
        assert isinstance(outcome.error, GuestUnavailable | GuestFailed)


@pytest.mark.parametrize("cancels", [1, 3])
def test_a_node_may_be_left_by_somebody_who_is_cancelled(cancels):
    """Its connections are gone all the same."""

    async def story(dice):
        async with wired(dice) as wire:
            bench, work = wire.bench, await known(wire.bench, concurrency=1)
            waiting = [bench.background(bench.call(work, "/?after_s=5")) for _ in range(3)]
            await asyncio.sleep(1.0)
            waiting[-1].cancel()
            await asyncio.sleep(0)
            leaver = asyncio.get_running_loop().create_task(wire.node.__aexit__())
            for _ in range(cancels):
                await asyncio.sleep(0)
                leaver.cancel()
            await asyncio.wait({leaver})
            assert leaver.cancelled()
            assert not wire.node.connections._open
            await asyncio.wait(waiting)
            await bench.settled()

    run(story)


def test_only_so_many_calls_are_withdrawn_at_once():
    """A thousand callers that leave at once do not become a thousand tasks."""
    script = Script(to_head=b"", orders=lambda _line: b"")

    async def story(dice):
        async with scripted(dice, script) as (bench, _):
            calls = [bench.background(bench.call(workload())) for _ in range(1000)]
            await asyncio.sleep(1.0)
            before = len(asyncio.all_tasks())
            for call in calls:
                call.cancel()
            await asyncio.sleep(0.1)
            return before, len(asyncio.all_tasks())

    before, after = run(story)
    assert before > 1000
    assert after < 300
