"""Whatever bytes arrive, and however they are cut: one answer to each request, no traceback, no hang."""

import asyncio
import itertools
import re

import httptools
from hypothesis import example, given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from real_parts import fuzz_examples
from service.loopback import answer, refusal
from service.test_listener_clocks import Caller
from service.test_listener_exchanges import MALFORMED
from simulation.network import Network
from simulation.virtual_time import run
from substrate_service.bodies import BodyRefused, ChunkedBody
from substrate_service.listener import ListenerLimits, protocol_factory, strict_config

REQUEST_LINES = [
    b"GET / HTTP/1.1",
    b"POST /a?b=%ff HTTP/1.1",
    b"HEAD / HTTP/1.1",
    b"GET / HTTP/1.0",
    b"BREW / HTTP/1.1",
]
FIELDS = [
    *[b"Host: a", b"Host: b", b"Content-Length: 5", b"Content-Length: 0", b"Transfer-Encoding: chunked"],
    *[b"Expect: 100-continue", b"Connection: close", b"Connection: Upgrade", b"Upgrade: h2c", b"X: \xff", b" folded"],
]
BODIES = [b"", b"hello", b"0\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n", b"5;x=y\r\nhello\r\n0\r\nT: z\r\n\r\n", b"\r\n"]
PATIENCE_S = 1000.0


@st.composite
def requests(draw):
    """A request that is well-formed more often than not, though not by much."""
    fields = draw(st.lists(st.sampled_from(FIELDS), max_size=4))
    lines = [draw(st.sampled_from(REQUEST_LINES)), *([b"Host: a"] if draw(st.booleans()) else []), *fields, b"", b""]
    return b"\r\n".join(lines) + draw(st.sampled_from(BODIES))


@st.composite
def damaged(draw, well_formed):
    """The same bytes, with a few replaced, lost or added."""
    data = bytearray(draw(well_formed))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    return bytes(data)


def spoken_to(data: bytes, cuts: list[int]) -> tuple[int, bytes]:
    """Send `data` cut at `cuts`; how often the application was called, and everything the caller got."""
    calls = 0

    async def app(scope, receive, send):
        nonlocal calls
        calls += 1
        while (message := await receive())["type"] == "http.request" and message["more_body"]:
            pass
        await answer(send, body=b"done")

    async def main(dice):
        events = []
        limits = ListenerLimits(head_bytes=300, head_fields=6)
        config = strict_config(app, limits=limits, refusal=refusal, emit=events.append)
        state = ServerState()
        network = Network(dice, latency_s=(0.0001, 0.001))
        listener = network.listen(("node", 80), protocol_factory(config, state))
        _, caller = await network.connect(("node", 80), Caller)
        edges = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
        for start, end in itertools.pairwise(edges):
            caller.transport.write(data[start:end])
            await asyncio.sleep(0.01)
        await asyncio.wait_for(caller.ends(), PATIENCE_S)
        listener.close()
        assert events == []
        assert not state.tasks
        return caller.got

    got = run(main, seed=1).value
    return calls, got


def answers(got: bytes) -> list[int]:
    """The statuses of the final replies in what a caller got."""
    statuses = map(int, re.findall(rb"HTTP/1\.1 (\d{3}) ", got))
    return [status for status in statuses if status >= 200]


@settings(max_examples=fuzz_examples(120))
@given(st.lists(damaged(requests()), min_size=1, max_size=3).map(b"".join), st.lists(st.integers(0, 400), max_size=4))
@example(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 3, [30])
def test_every_request_has_one_answer_however_the_bytes_are_cut(data, cuts):
    calls, got = spoken_to(data, cuts)
    statuses = answers(got)
    refusals = [status for status in statuses if status != 200]
    assert calls <= len(statuses) <= calls + 1
    assert len(refusals) <= 1
    assert statuses[-1:] == refusals or not refusals
    assert (calls, got) == spoken_to(data, [])


@settings(max_examples=fuzz_examples(50))
@given(st.binary(min_size=1, max_size=500), st.lists(st.integers(0, 500), max_size=4))
def test_noise_never_reaches_the_application(data, cuts):
    calls, got = spoken_to(data, cuts)
    assert calls == 0
    assert len(answers(got)) == 1


class Oracle:
    """What llhttp makes of a chunked body."""

    def __init__(self, data: bytes) -> None:
        self.body, self.whole = b"", False
        parser = httptools.HttpRequestParser(self)
        parser.feed_data(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.whole = True


@st.composite
def chunked(draw):
    """A chunked body that any reader should take."""
    pieces = draw(st.lists(st.binary(min_size=1, max_size=20), max_size=4))
    extension = draw(st.sampled_from([b"", b";x=y", b";x"]))
    chunks = [b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces]
    return b"".join([*chunks, b"0\r\n", draw(st.sampled_from([b"", b"T: z\r\n"])), b"\r\n"])


@settings(max_examples=fuzz_examples(300))
@given(damaged(chunked()) | st.sampled_from(list(MALFORMED.values())), st.integers(1, 50))
def test_what_we_take_for_a_chunked_body_llhttp_takes_for_the_same(data, size):
    reader, body, rest = ChunkedBody(), b"", b""
    try:
        for at in range(0, len(data), size):
            assert not rest
            piece, rest = reader.take(data[at : at + size])
            body += piece
            if reader.whole:
                rest += data[at + size :]
                break
    except BodyRefused:
        return
    if reader.whole:  # until then llhttp may have found fault with half a line that we still wait for
        oracle = Oracle(data[: len(data) - len(rest)])
        assert (oracle.body, oracle.whole) == (body, True)


@given(chunked(), st.binary(max_size=10), st.integers(1, 50))
def test_a_well_formed_chunked_body_is_taken_whole_and_nothing_after_it(data, after, size):
    reader, body, rest = ChunkedBody(), b"", data + after
    while not reader.whole:
        piece, left = reader.take(rest[:size])
        body, rest = body + piece, left + rest[size:]
    assert body == Oracle(data).body
    assert rest == after
