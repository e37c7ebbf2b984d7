"""Callers: each speaks raw HTTP/1.1 over a connection of its own, well-behaved or not, and notes what it was told."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import h11

from simulation.guests import meant, wish_of
from simulation.network import Address, Connection, MemoryTransport, Network

PATIENCE_S = 60.0
"""Longer than any caller may be kept waiting, whatever happens to the system."""


@dataclass
class Call:
    """One request, and what its caller was told: `status` is 0 until a final head has come.

    `invocation` is what it is called inside. `raw` replaces a well-formed request. `guest_target` is what a guest
    should see of `target`.
    """

    number: int
    workload: str
    method: str
    target: str
    fields: tuple[tuple[str, str], ...]
    body: bytes
    guest_target: str = ""
    raw: bytes | None = None

    is_first: bool = True
    """Whether no other call was made on its connection before."""
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    answer: bytes = b""
    whole: bool = False
    continued: bool = False
    broken: str = ""
    """How the answer broke off, if it did."""
    sent: bool = False
    """Whether anything of it was sent at all."""
    left: bool = False
    """Whether its caller left before the end, or had its connection cut by the network."""
    left_at_s: float | None = None
    """When its caller closed the connection before the end."""

    def __post_init__(self) -> None:
        self._http = h11.Connection(h11.CLIENT)
        chunked = ("transfer-encoding", "chunked") in self.fields
        length = () if chunked or not self.body else (("content-length", str(len(self.body))),)
        fields = [("host", "front"), ("x-number", str(self.number)), *self.fields, *length]
        self.head_bytes = self._sent(h11.Request(method=self.method, target=self.target, headers=fields))
        self.body_bytes = self._sent(h11.Data(self.body)) if self.body else b""
        self.body_bytes += self._sent(h11.EndOfMessage())

    @property
    def invocation(self) -> str:
        """The id that the front mints for it."""
        return f"{self.number:032x}"

    @property
    def request(self) -> bytes:
        """All that it sends."""
        return self.head_bytes + self.body_bytes if self.raw is None else self.raw

    @property
    def over(self) -> bool:
        """Whether nothing more can come."""
        return self.whole or bool(self.broken)

    @property
    def meant(self) -> bytes:
        """What a guest means to answer."""
        if self.method == "HEAD":
            return b""
        return b"".join(meant(self.invocation, self.method, self.guest_target, self.body))

    @property
    def meant_status(self) -> int:
        """The status that a guest means to answer with."""
        return wish_of(self.guest_target).status

    def hear(self, data: bytes) -> bytes:
        """Take what the connection brings (no bytes: its end) and return what follows the answer."""
        try:
            self._http.receive_data(data)
            while not self.over and not isinstance(event := self._http.next_event(), type):
                self._take(event)  # what is no event but a class means that there is none for now
        except h11.RemoteProtocolError as error:
            self.broken = str(error)
        return self._http.trailing_data[0] if self.whole and data else b""

    def _take(self, event: object) -> None:
        if isinstance(event, h11.InformationalResponse):
            self.continued = event.status_code == 100
        elif isinstance(event, h11.Response):
            self.status = event.status_code
            self.headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
            if len(self.headers) < len(event.headers):
                self.broken = f"a field came twice: {list(event.headers)}"
        elif isinstance(event, h11.Data):
            self.answer += event.data
        elif isinstance(event, h11.EndOfMessage):
            self.whole = True
        elif isinstance(event, h11.ConnectionClosed):
            self.broken = "the connection ended"

    def _sent(self, event: object) -> bytes:
        return self._http.send(event) or b""


class Line(asyncio.Protocol):
    """A caller's connection, on which its calls are answered one after the other."""

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls
        for call in calls[1:]:
            call.is_first = False
        self._loop = asyncio.get_running_loop()
        self._transport: MemoryTransport
        self._news = asyncio.Event()
        self._lost = False

    # What the loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, MemoryTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        while data and (call := self._current()) is not None:
            data = call.hear(data)
        if data:
            self.calls[-1].broken = f"{len(data)} bytes behind the last answer: {data[:80]!r}"
        self._news.set()

    def eof_received(self) -> None:
        self._end("the connection ended")

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._end(f"the connection broke ({exc})")

    def _end(self, how: str) -> None:
        if (call := self._current()) is not None:
            call.hear(b"")
        for each in self.calls:
            if not each.over:
                each.broken = how
        self._news.set()

    def _current(self) -> Call | None:
        return next((call for call in self.calls if not call.over), None)

    # What a caller does.

    @property
    def connection(self) -> Connection:
        """What it runs over."""
        return self._transport.connection

    @property
    def is_lost(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._lost or self._transport.is_closing()

    @property
    def closes(self) -> bool:
        """Whether the front has said that it answers nothing more."""
        return any(call.headers.get("connection") == "close" for call in self.calls)

    def say(self, data: bytes) -> None:
        """Send some bytes."""
        if not self.is_lost:
            self._transport.write(data)

    def say_no_more(self) -> None:
        """Close the half of the connection on which we speak."""
        if not self.is_lost:
            self._transport.write_eof()

    async def until(self, said: Callable[[], object], *, within_s: float | None = None) -> None:
        """Wait until something is so, or nothing more will be heard, or the time is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not (said() or self._current() is None):
                    self._news.clear()
                    await self._news.wait()

    def stall(self) -> None:
        """Read nothing for now."""
        self._transport.pause_reading()

    def read_on(self) -> None:
        """Read again."""
        self._transport.resume_reading()

    def leave(self, *, rudely: bool) -> None:
        """Close the connection, or reset it."""
        for call in self.calls:
            if not call.over and not self.is_lost:
                call.left, call.left_at_s = True, self._loop.time()
        if rudely:
            self._transport.abort()
        else:
            self._transport.close()

    async def gone(self) -> None:
        """Close the connection for good and wait until it is."""
        self._transport.close()
        while not self._lost:
            self._news.clear()
            await self._news.wait()


@dataclass(frozen=True)
class Manner:
    """How a caller behaves: its `kind`, and what the dice said of its moments.

    `fraction` is a place in whatever is to be cut, from 0 to 1; `pause_s` how long it dawdles; `rude` resets
    connections instead of closing them.
    """

    kind: str
    fraction: float = 0.5
    pause_s: float = 0.1
    rude: bool = False


async def patient(line: Line, _: Manner) -> None:
    """Ask, one call after the other, and read all."""
    for call in line.calls:
        if line.is_lost or line.closes:
            return
        call.sent = True
        line.say(call.request)
        await line.until(lambda call=call: call.over)


async def pipeliner(line: Line, _: Manner) -> None:
    """Ask everything at once."""
    for call in line.calls:
        call.sent = True
    line.say(b"".join(call.request for call in line.calls))
    await line.until(lambda: line.calls[-1].over)


async def slow_uploader(line: Line, manner: Manner) -> None:
    """Send the request in five parts."""
    (call,) = line.calls
    call.sent = True
    step = len(call.request) // 5 + 1
    for at in range(0, len(call.request), step):
        line.say(call.request[at : at + step])
        await line.until(lambda: call.over, within_s=manner.pause_s)
    await line.until(lambda: call.over)


async def expecter(line: Line, _: Manner) -> None:
    """Send the body once it is wanted."""
    (call,) = line.calls
    call.sent = True
    line.say(call.head_bytes)
    await line.until(lambda: call.continued or call.status)
    if call.continued and not call.over:
        line.say(call.body_bytes)
    await line.until(lambda: call.over)


async def leaver_at_byte(line: Line, manner: Manner) -> None:
    """Leave in the middle of the request."""
    (call,) = line.calls
    call.sent = True
    line.say(call.request[: int(len(call.request) * manner.fraction)])
    await asyncio.sleep(manner.pause_s * manner.fraction)
    line.leave(rudely=manner.rude)


async def leaver_after(line: Line, manner: Manner) -> None:
    """Leave after a while, whatever has happened by then."""
    await _ask_and_go(line, manner, lambda _: False, manner.pause_s)


async def leaver_at_head(line: Line, manner: Manner) -> None:
    """Leave as soon as the head of the answer is there."""
    await _ask_and_go(line, manner, lambda call: call.status, PATIENCE_S)


async def leaver_in_body(line: Line, manner: Manner) -> None:
    """Leave in the middle of the answer's body."""
    enough = int(len(line.calls[0].meant) * manner.fraction)
    await _ask_and_go(line, manner, lambda call: len(call.answer) > enough, PATIENCE_S)


async def half_closer(line: Line, _: Manner) -> None:
    """Say that nothing more will be sent: to this front that is leaving."""
    (call,) = line.calls
    call.sent = True
    line.say(call.request)
    call.left = True
    line.say_no_more()
    await line.until(lambda: call.over)


async def _ask_and_go(line: Line, manner: Manner, said: Callable[[Call], object], within_s: float) -> None:
    (call,) = line.calls
    call.sent = True
    line.say(call.request)
    await line.until(lambda: said(call), within_s=within_s)
    line.leave(rudely=manner.rude)


async def staller(line: Line, manner: Manner) -> None:
    """Read nothing of the answer for a while."""
    (call,) = line.calls
    call.sent = True
    line.say(call.request)
    await asyncio.sleep(manner.pause_s * manner.fraction)
    line.stall()
    await asyncio.sleep(manner.pause_s)
    line.read_on()
    await line.until(lambda: call.over)


MANNERS: Mapping[str, Callable[[Line, Manner], Awaitable[None]]] = {
    script.__name__: script
    for script in (
        *(patient, pipeliner, slow_uploader, expecter, staller, half_closer),
        *(leaver_at_byte, leaver_after, leaver_at_head, leaver_in_body),
    )
}


async def visit(network: Network, address: Address, calls: list[Call], manner: Manner) -> Connection | None:
    """Connect, make the calls in this manner, and go; None if nobody listens there.

    Raises `TimeoutError` if the caller is kept waiting for ever.
    """
    try:
        _, line = await network.connect(address, lambda: Line(calls))
    except ConnectionRefusedError:
        return None
    try:
        async with asyncio.timeout(PATIENCE_S * len(calls)):
            await MANNERS[manner.kind](line, manner)
    finally:
        await line.gone()
    return line.connection
