"""The node's end of the wire, in raw bytes: what it reads, what it answers, and when a guest may run."""

import asyncio
import contextlib
from dataclasses import dataclass
from random import Random

import msgspec
import pytest
from msgspec import structs

from conformance.worlds import ADDRESS, BODY_BYTES_MAX, Machine, machine, running, served, workload
from fakes.vmm import At
from simulation import virtual_time
from substrate_node.daemon import NodeDaemon, only
from substrate_seam.errors import GuestFailed, GuestUnavailable, InvocationCancelled, Ran, Reason
from substrate_seam.events import DefectFound
from substrate_seam.http1 import ReplyReader
from substrate_seam.invocation import Demands, GuestRequest, Invocation, Receipt
from substrate_seam.report import NodeReport
from substrate_seam.wire import FrameReader, FrameType, decode_end, decode_error, decode_head, encode_invocation
from substrate_seam.workload import Workload

LAST = b"0\r\n\r\n"
HELLO = b"5\r\nhello\r\n" + LAST
WORK = workload(concurrency=1)


class Agent(asyncio.Protocol):
    """A connection to the daemon that says what a test says."""

    def __init__(self):
        self.reader = ReplyReader()
        self.body = b""
        self.lost = False
        self.news = asyncio.Event()

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.body += b"".join(self.reader.feed(data))
        self.news.set()

    def connection_lost(self, _exc):
        self.lost = True
        self.news.set()

    def say(self, data: bytes) -> None:
        self.transport.write(data)

    async def until(self, met) -> None:
        """Wait until it is so; fail after two minutes."""
        async with asyncio.timeout(120.0):
            while not met():
                assert not self.lost, "the daemon closed the connection"
                self.news.clear()
                await self.news.wait()

    async def go_ahead(self) -> None:
        await self.until(lambda: self.reader.continues)
        assert not self.reader.status

    async def answer(self) -> tuple[int, bytes]:
        """A whole reply; the next one is read afresh."""
        await self.until(lambda: self.reader.complete)
        status, body = self.reader.status, self.body
        self.keeps_alive = self.reader.keep_alive
        self.reader, self.body = ReplyReader(), b""
        return status, body

    async def error(self):
        """The error that the daemon told."""
        status, body = await self.answer()
        assert status >= 400
        return status, decode_error(body)

    async def frames(self) -> list[tuple[FrameType, bytes]]:
        status, body = await self.answer()
        assert status == 200
        return FrameReader().feed(body)

    async def ending(self):
        """What the last frame says."""
        return decode_end((await self.frames())[-1][1])


@dataclass
class Place:
    """A daemon at work, and the machine it is on."""

    there: Machine

    async def agent(self, certificate=None) -> Agent:
        return (await self.there.network.connect(ADDRESS, Agent, certificate=certificate))[1]

    @property
    def node(self):
        return self.there.node

    @property
    def journal(self):
        return self.there.vmm.journal

    @property
    def faults(self):
        return self.there.vmm.faults

    def gone(self) -> bool:
        return not self.there.left()


def run(story, *, known=(WORK,), **options):
    """Tell a story to a daemon; in the end nothing is left, of calls or of the daemon."""

    async def main(dice: Random):
        async with machine(dice) as there, running(there) as node, served(node, there, **options):
            for work in known:
                await node.ensure(work)
            told = await story(Place(there))
            await asyncio.sleep(30.0)
            assert not there.left()
            return told

    return virtual_time.run(main, seed=1).value


def call(target="/", *, work=WORK, number=1, **changes) -> Invocation:
    usual = Invocation(
        id=f"{number:032x}",
        attempt=1,
        workload=work.ref,
        session=None,
        caller="anna",
        demands=Demands(),
        request=GuestRequest("POST", target, (), b""),
        start_within_s=30.0,
        run_within_s=60.0,
    )
    return structs.replace(usual, **changes)


def head(method: str, path: str, *fields: tuple[str, str], boot_id: str | None = "boot1") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: node-1", *(f"{name}: {value}" for name, value in fields)]
    if boot_id is not None:
        lines.append(f"substrate-boot-id: {boot_id}")
    return "\r\n".join([*lines, "", ""]).encode()


def post(invocation: Invocation | bytes, *, expect: bool = True) -> bytes:
    header = invocation if isinstance(invocation, bytes) else encode_invocation(invocation)
    fields = [("transfer-encoding", "chunked"), ("substrate-invocation", header.decode())]
    return head("POST", "/v1/invocations", *fields, *([("expect", "100-continue")] if expect else []))


def order(method: str, path: str, body: bytes = b"", **options) -> bytes:
    return head(method, path, ("content-length", str(len(body))), **options) + body


# The commit.


def test_the_body_is_asked_for_when_the_guest_is_ready_and_not_before():
    """Slot, memory and guest come first; the guest has seen nothing by then."""

    async def story(place):
        agent, began_s = await place.agent(), asyncio.get_running_loop().time()
        agent.say(post(call()))
        await agent.go_ahead()
        assert asyncio.get_running_loop().time() - began_s > place.there.vmm.latencies.boot_s
        assert place.faults.draw(At.RESTORED, "echo") is None
        assert not place.journal
        await asyncio.sleep(5.0)
        assert not place.journal
        agent.say(HELLO)
        kinds = await agent.frames()
        assert [kind for kind, _ in kinds] == [FrameType.HEAD, FrameType.DATA, FrameType.END]
        assert decode_head(kinds[0][1])[1] == 200
        assert kinds[1][1] == b"hello"
        assert decode_end(kinds[2][1]).body_bytes == 5
        assert place.journal == [(call().id, 1)]

    run(story)


def test_an_empty_body_is_committed_by_its_last_chunk():
    async def story(place):
        agent = await place.agent()
        agent.say(post(call()))
        await agent.go_ahead()
        assert not place.journal
        agent.say(LAST)
        assert isinstance(await agent.ending(), Receipt)

    run(story)


def test_an_agent_that_does_not_wait_for_the_word_is_served_as_well():
    """Its body waits for the guest instead."""

    async def story(place):
        agent = await place.agent()
        agent.say(post(call(), expect=False) + HELLO)
        assert isinstance(await agent.ending(), Receipt)
        assert not agent.reader.continues

    run(story)


def test_one_connection_carries_accepted_and_refused_calls_in_a_row():
    async def story(place):
        agent = await place.agent()
        for number in range(1, 7):
            accepted = number % 3
            agent.say(post(call(number=number, work=WORK if accepted else workload("stranger"))))
            if accepted:
                await agent.go_ahead()
                agent.say(HELLO if number % 2 else LAST)
                assert isinstance(await agent.ending(), Receipt)
            else:
                status, error = await agent.error()
                assert (status, error.reason, error.ran) == (503, Reason.UNKNOWN_DIGEST, Ran.NO)
                agent.say(LAST)
            assert agent.keeps_alive

    run(story)


@pytest.mark.parametrize(
    "leave", ["before the word", "after the word", "within the body", "behind the body", "within the answer"]
)
def test_an_agent_that_leaves_takes_its_guest_with_it(leave):
    """Whenever it leaves; before its body was whole nothing has run."""

    async def story(place):
        agent = await place.agent()
        agent.say(post(call("/?pieces=9&chunked=1&pace_s=5")))
        if leave != "before the word":
            await agent.go_ahead()
        if leave == "within the body":
            agent.say(b"5\r\nhel")
        elif leave in {"behind the body", "within the answer"}:
            agent.say(HELLO)
            await asyncio.sleep(1.0 if leave == "behind the body" else 7.0)
        await asyncio.sleep(0.02)
        agent.transport.abort()
        await asyncio.sleep(0.2)
        assert place.gone()
        return len(place.journal)

    assert run(story) == (leave in {"behind the body", "within the answer"})


def test_a_body_that_does_not_come_in_time_ran_nothing():
    """Ten seconds after the node was ready for it; a slow trickle is no excuse."""

    async def story(place):
        agent = await place.agent()
        agent.say(post(call()))
        await agent.go_ahead()
        began_s = asyncio.get_running_loop().time()
        trickle = asyncio.get_running_loop().create_task(_trickle(agent))
        status, error = await agent.error()
        assert (status, error.ran) == (408, Ran.NO)
        assert 9.9 < asyncio.get_running_loop().time() - began_s < 10.2
        trickle.cancel()
        assert not place.journal

    async def _trickle(agent):
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                agent.say(b"1\r\nx\r\n")
                await asyncio.sleep(1.0)

    run(story)


def test_a_body_over_the_nodes_bound_ran_nothing():
    async def story(place):
        agent = await place.agent()
        agent.say(post(call()))
        await agent.go_ahead()
        agent.say(b"%x\r\n" % (BODY_BYTES_MAX + 1) + b"x" * (BODY_BYTES_MAX + 1) + b"\r\n" + LAST)
        status, error = await agent.error()
        assert (status, error.reason, error.ran) == (413, Reason.BODY_TOO_LARGE, Ran.NO)
        assert not place.journal

    run(story)


def test_a_body_that_is_no_http_ran_nothing():
    """The listener says so, in the wire's words."""

    async def story(place):
        agent = await place.agent()
        agent.say(post(call()))
        await agent.go_ahead()
        agent.say(b"nonsense\r\n")
        status, error = await agent.error()
        assert (status, error.reason, error.ran) == (400, Reason.BAD_REQUEST, Ran.NO)
        await asyncio.sleep(1.0)
        assert place.gone()
        assert not place.journal

    run(story)


# Failures after the commit, and interruptions around it.


def test_a_failure_before_the_head_is_a_single_frame_on_a_success():
    async def story(place):
        place.faults.on(At.BEFORE_HEAD, die=True)
        agent = await place.agent()
        agent.say(post(call()))
        await agent.go_ahead()
        agent.say(HELLO)
        [(kind, payload)] = await agent.frames()
        assert kind is FrameType.END
        assert isinstance(decode_end(payload), GuestFailed)
        assert agent.keeps_alive

    run(story)


def test_a_guest_that_is_gone_when_the_body_comes_is_replaced():
    """It has seen nothing, so the next way of starting one is tried; if there is none, nothing ran."""

    async def story(place):
        agent = await place.agent()
        agent.say(post(call()))
        await agent.go_ahead()
        for guest in list(place.there.vmm.alive.values()):
            guest.die()
        agent.say(HELLO)
        error = await agent.ending()
        assert isinstance(error, GuestUnavailable)
        assert not place.journal

    run(story)


def test_a_call_that_is_cancelled_while_its_body_is_awaited_never_runs():
    """Its guest goes at once, though the body may still come."""

    async def story(place):
        agent, other = await place.agent(), await place.agent()
        agent.say(post(call()))
        await agent.go_ahead()
        other.say(order("DELETE", f"/v1/invocations/{call().id}"))
        assert await other.answer() == (200, b'{"ran":"no"}')
        await asyncio.sleep(0.1)
        assert not place.there.vmm.alive
        agent.say(HELLO)
        assert isinstance(await agent.ending(), InvocationCancelled)
        assert not place.journal

    run(story)


def test_a_node_that_ends_while_a_body_is_awaited_does_not_wait_for_it():
    async def story(place):
        agent = await place.agent()
        agent.say(post(call()))
        await agent.go_ahead()
        await place.node.drain(within_s=1.0)
        await asyncio.sleep(1.5)
        assert not place.there.vmm.alive
        agent.say(HELLO)
        assert (await agent.ending()).reason is Reason.DRAINING

    run(story)


def test_the_first_byte_of_an_answer_comes_when_the_guests_head_is_known():
    async def story(place):
        agent = await place.agent()
        agent.say(post(call("/?pieces=2&chunked=1&pace_s=20")))
        await agent.go_ahead()
        agent.say(HELLO)
        await agent.until(lambda: agent.body)
        began_s = asyncio.get_running_loop().time()
        assert agent.body[:1] == b"H"
        await agent.ending()
        assert asyncio.get_running_loop().time() - began_s > 19

    run(story)


def test_a_small_answer_leaves_in_one_piece():
    """Head, body and receipt are one chunk: whoever reads it wakes once."""

    async def story(place):
        agent = await place.agent()
        agent.say(post(call()))
        await agent.go_ahead()
        heard, take = [], agent.data_received
        agent.data_received = lambda data: (heard.append(data), take(data))
        agent.say(HELLO)
        await agent.ending()
        return b"".join(heard).partition(b"\r\n\r\n")[2]

    size, _, chunk = run(story).partition(b"\r\n")
    assert chunk[int(size, 16) :] == b"\r\n" + LAST


# What is no invocation.


def test_what_is_no_invocation_is_refused_in_the_wires_words():
    async def story(place):
        agent = await place.agent()
        for header in (b"", b"!!!", b"e30="):
            agent.say(post(header))
            status, error = await agent.error()
            assert (status, error.reason, error.ran) == (400, Reason.BAD_REQUEST, Ran.NO)
            agent.say(LAST)
        assert not place.there.vmm.alive

    run(story)


@pytest.mark.parametrize("boot_id", [None, "", "boot0", "boot11"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/invocations"),
        ("DELETE", f"/v1/invocations/{'0' * 32}"),
        ("PUT", f"/v1/workloads/{WORK.digest}"),
        ("DELETE", f"/v1/workloads/{WORK.digest}"),
        ("PUT", "/v1/node/drain"),
        ("DELETE", "/v1/node/drain"),
        ("PUT", "/v1/node/limits"),
    ],
)
def test_every_call_names_the_start_of_the_daemon_it_means(method, path, boot_id):
    """Another one is misdirected: nothing ran, and nothing is done."""

    async def story(place):
        agent = await place.agent()
        agent.say(order(method, path, boot_id=boot_id))
        status, error = await agent.error()
        assert (status, error.reason, error.ran) == (421, Reason.NODE_UNREACHABLE, Ran.NO)
        assert not place.node.report().draining

    run(story)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/v1/invocations"),
        ("POST", "/v1/node/reports"),
        ("PUT", "/v1/invocations/x"),
        ("PUT", "/v1/workloads"),
        ("PUT", "/v1/workloads/a/b"),
        ("GET", "/v1/node/drain"),
        ("DELETE", "/v1/node/limits"),
        ("PUT", "/v1/node/drain/"),
        ("POST", "/v1/invocations/*"),
    ],
)
def test_unknown_paths_and_methods_are_not_found(method, path):
    async def story(place):
        agent = await place.agent()
        agent.say(order(method, path))
        status, error = await agent.error()
        assert (status, error.ran) == (404, Ran.NO)

    run(story)


BAD_ORDERS = {
    "an id that is none": ("DELETE", "/v1/invocations/" + "g" * 32, b""),
    "a short id": ("DELETE", "/v1/invocations/abc", b""),
    "a workload under another digest": ("PUT", f"/v1/workloads/{'0' * 64}", WORK.raw),
    "no workload": ("PUT", f"/v1/workloads/{WORK.digest}", b"{}"),
    "a workload that names two guests": ("PUT", "/v1/workloads/x", b'{"name":"x","command":["a"],"rootfs_path":"/"}'),
    "no JSON": ("PUT", f"/v1/workloads/{WORK.digest}", b"\xff"),
    "no drain order": ("PUT", "/v1/node/drain", b"{}"),
    "a drain order for yesterday": ("PUT", "/v1/node/drain", b'{"within_s":-1}'),
    "a drain order for ever": ("PUT", "/v1/node/drain", b'{"within_s":1e300}'),
    "no limits": ("PUT", "/v1/node/limits", b'{"generation":1}'),
    "limits in words": ("PUT", "/v1/node/limits", b'{"generation":1,"memory_mib":"much"}'),
    "nothing": ("PUT", "/v1/node/limits", b""),
}


@pytest.mark.parametrize(("method", "path", "body"), BAD_ORDERS.values(), ids=BAD_ORDERS)
def test_an_order_that_cannot_be_read_changes_nothing(method, path, body):
    async def story(place):
        before = place.node.report()
        agent = await place.agent()
        agent.say(order(method, path, body))
        status, error = await agent.error()
        assert (status, error.reason, error.ran) == (400, Reason.BAD_REQUEST, Ran.NO)
        assert place.node.report() == before

    run(story)


def test_an_order_over_a_mebibyte_is_refused():
    async def story(place):
        agent = await place.agent()
        agent.say(order("PUT", "/v1/node/limits", b" " * 1_048_577))
        assert (await agent.error())[0] == 413

    run(story)


def test_a_workload_is_known_by_the_bytes_it_came_in():
    async def story(place):
        raw = b'{ "name": "odd", "command": ["x"], "memory_mib": 1, "of": "tomorrow" }'
        odd = Workload.parse(raw)
        agent = await place.agent()
        agent.say(order("PUT", f"/v1/workloads/{odd.digest}", raw))
        assert await agent.answer() == (204, b"")
        assert odd.digest in place.node.report().workloads

    run(story)


def test_a_head_that_the_listener_refuses_is_answered_in_the_wires_words():
    async def story(place):
        for bad in (b"nonsense\r\n\r\n", head("GET", "/v1/node/reports", ("x", "y" * 300_000))):
            agent = await place.agent()
            agent.say(bad)
            status, error = await agent.error()
            assert status in {400, 431}
            assert error.ran is Ran.NO

    run(story)


def test_the_largest_head_that_a_caller_may_send_reaches_the_node():
    """64 KiB of fields are more than that as JSON in base64."""

    async def story(place):
        agent = await place.agent()
        fields = tuple((b"x-%02d" % number, b"\xff" * 640) for number in range(99))
        agent.say(post(call(request=GuestRequest("POST", "/", fields, b""))))
        await agent.go_ahead()
        agent.transport.abort()

    run(story)


# Reports.


def test_reports_are_lines_and_need_no_boot_id():
    async def story(place):
        agent = await place.agent()
        agent.say(head("GET", "/v1/node/reports", boot_id=None))
        await agent.until(lambda: agent.body.count(b"\n") >= 3)
        reports = [msgspec.json.decode(line, type=NodeReport) for line in agent.body.splitlines()]
        assert [report.full for report in reports] == [True, False, False]
        assert reports[0].boot_id == "boot1"
        agent.transport.abort()
        await asyncio.sleep(0.1)
        assert not place.node._hearers

    run(story)


def test_reports_end_when_the_daemon_is_asked_to_end_them():
    """Their stream comes to its end, in good order."""

    async def main(dice):
        async with machine(dice) as there, running(there) as node, served(node, there) as daemon:
            agent = await Place(there).agent()
            agent.say(head("GET", "/v1/node/reports", boot_id=None))
            await agent.until(lambda: agent.body)
            daemon.close()
            assert (await agent.answer())[0] == 200
            assert not node._hearers

    virtual_time.run(main, seed=1)


def test_a_daemon_that_was_asked_to_end_its_reports_begins_no_more():
    async def main(dice):
        async with machine(dice) as there, running(there) as node:
            daemon = NodeDaemon(node, emit=there.events.append)
            daemon.close()
            answers = []

            async def send(message):
                answers.append(message)

            async def receive():
                return {"type": "http.request"}

            scope = {"type": "http", "method": "GET", "path": "/v1/node/reports", "headers": []}
            await daemon(scope, receive, send)
            return answers

    start, body = virtual_time.run(main, seed=1).value
    assert start["status"] == 503
    assert decode_error(body["body"]).reason is Reason.DRAINING


def test_reports_end_with_the_node():
    async def story(place):
        agent = await place.agent()
        agent.say(head("GET", "/v1/node/reports", boot_id=None))
        await agent.until(lambda: agent.body)
        await place.node.__aexit__()
        status, _ = await agent.answer()
        assert status == 200

    run(story)


# Who may speak.


AGENT = {"subject": ((("commonName", "agent-1"),),), "subjectAltName": (("DNS", "agents"),)}


@pytest.mark.parametrize(
    ("certificate", "status"),
    [(None, 401), ({"subject": ((("commonName", "mallory"),),)}, 403), (AGENT, 200)],
)
@pytest.mark.parametrize("name", ["agent-1", "agents"])
def test_only_those_with_the_right_certificate_may_speak(certificate, status, name):
    """Not even to hear reports; who has none is told so, who has a wrong one too."""

    async def story(place):
        agent = await place.agent(certificate)
        agent.say(order("DELETE", f"/v1/invocations/{'0' * 32}"))
        if status == 200:
            assert (await agent.answer())[0] == 200
        else:
            told, error = await agent.error()
            assert (told, error.ran) == (status, Ran.NO)
            assert "certificate" in error.message

    run(story, allow=only([name]))


# Defects of ours.


def test_a_defect_is_told_to_the_agent_and_to_the_maintainers(monkeypatch):
    """Before the commit as an error, after it as an end; the daemon serves on."""

    async def story(place):
        agent = await place.agent()
        monkeypatch.setattr(place.node, "cancel", broken)
        agent.say(order("DELETE", f"/v1/invocations/{'0' * 32}"))
        status, error = await agent.error()
        assert (status, error.reason, error.ran) == (500, Reason.INTERNAL, Ran.MAYBE)
        monkeypatch.setattr("substrate_node.daemon.head_frame", broken)
        agent.say(post(call()))
        await agent.go_ahead()
        agent.say(HELLO)
        assert (await agent.ending()).reason is Reason.INTERNAL
        assert agent.keeps_alive
        defects = [event for event in place.there.events if isinstance(event, DefectFound)]
        assert [defect.invocation_id for defect in defects] == [None, call().id]
        assert all("ZeroDivisionError" in defect.traceback for defect in defects)
        place.there.events.clear()

    def broken(*_):
        raise ZeroDivisionError

    run(story)
