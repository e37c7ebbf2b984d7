"""A network in memory: asyncio transports joined by wires that have latency, windows and accidents.

What a protocol sees is what asyncio's socket transports would show it on Linux; where a real network may do several
things (how bytes are cut up, how an abort looks from afar), the dice choose.
"""

import asyncio
from asyncio.transports import _FlowControlMixin  # the water marks of the real transports, to the letter
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum
from math import inf, nextafter
from random import Random
from typing import Any, TypeVar

from simulation.virtual_time import VirtualLoop

AnyProtocol = TypeVar("AnyProtocol", bound=asyncio.Protocol)

Address = Hashable
"""A pair such as ("node-1", 8443), or the path of a Unix socket."""

WINDOW_BYTES = 64 * 1024
"""What one direction holds between the sender's buffer and the reader: on the wire, or arrived and unread."""
_FIRST_EPHEMERAL_PORT = 32_768
_SPLITS_PER_SEGMENT = 0.1
_RESET = "Connection reset by peer"


class End(Enum):
    """How one direction of a connection ends, as the reader sees it."""

    EOF = "eof"
    RESET = "reset"


class Network:
    """Addresses, who listens on them, the connections between them, and what goes wrong.

    Latencies are virtual seconds, drawn for every segment. Belongs to the running `VirtualLoop`, which fails the run
    if a connection or a listener is left at its end.
    """

    def __init__(self, dice: Random, *, latency_s: tuple[float, float] = (0.000_05, 0.002)) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop), "a Network lives in virtual time: make it inside `virtual_time.run`"
        self.loop = loop
        self.dice = dice
        self.connections: dict[Connection, None] = {}
        """The open ones, oldest first; a connection is open until both its ends are lost."""
        self.connections_made = 0
        self._latency_s = latency_s
        self._listeners: dict[Address, Listener] = {}
        self._partitions: dict[Address, _Partition] = {}
        self._faults: dict[Address, Callable[[Connection], object]] = {}
        loop.must_be_empty("connection", self.connections)
        loop.must_be_empty("listener", self._listeners)

    def listen(
        self,
        address: Address,
        protocol_factory: Callable[[], asyncio.Protocol],
        *,
        certificate: dict[str, Any] | None = None,
    ) -> "Listener":
        """Accept connections to `address` until the listener is closed; clients see `certificate` as `peercert`.

        Raises `OSError` if somebody listens there already.
        """
        if address in self._listeners:
            raise OSError(f"somebody listens on {address!r} already")
        self._listeners[address] = Listener(address, protocol_factory, certificate, self._listeners)
        return self._listeners[address]

    async def connect(
        self,
        address: Address,
        protocol_factory: Callable[[], AnyProtocol],
        *,
        certificate: dict[str, Any] | None = None,
    ) -> "tuple[MemoryTransport, AnyProtocol]":
        """Connect to whoever listens on `address`, who sees `certificate` as `peercert`.

        Raises `ConnectionRefusedError` if nobody does; waits as long as a silent partition lasts.
        """
        await self._cross(address)
        listener = self._listeners.get(address)
        if listener is None:
            raise ConnectionRefusedError(f"nobody listens on {address!r}")
        transport = self._accept(listener, certificate).client
        try:
            await self._cross(address)
            protocol = protocol_factory()
            await transport.attach(protocol)
        except BaseException:
            transport.give_up()
            raise
        return transport, protocol

    def on_connect(self, address: Address, fault: Callable[["Connection"], object] | None) -> None:
        """Do `fault` to every connection made to `address` from now on, before its first byte; None stops that."""
        if fault is None:
            self._faults.pop(address, None)
        else:
            self._faults[address] = fault

    def cut(self, address: Address, *, seen_as: End = End.RESET) -> None:
        """Cut every open connection to `address`, at once and at both ends."""
        for connection in self._connections_to(address):
            connection.cut(seen_as=seen_as)

    def partition(self, address: Address, *, refuse: bool = False) -> None:
        """Let nothing through to or from `address`: connections go silent, new ones hang or are refused."""
        self.heal(address)
        self._partitions[address] = _Partition(refuse)

    def heal(self, address: Address) -> None:
        """End the partition of `address`, if any: what was sent meanwhile arrives after all."""
        if partition := self._partitions.pop(address, None):
            partition.healed.set()
            for connection in self._connections_to(address):
                connection.resend()

    def is_partitioned(self, address: Address) -> bool:
        """Tell whether nothing gets through to `address` now."""
        return address in self._partitions

    def latency_s(self) -> float:
        """Draw the time of one trip, in virtual seconds."""
        return self.dice.uniform(*self._latency_s)

    def _connections_to(self, address: Address) -> "list[Connection]":
        return [connection for connection in self.connections if connection.address == address]

    async def _cross(self, address: Address) -> None:
        """Make one trip to or from `address`."""
        await asyncio.sleep(self.latency_s())
        while partition := self._partitions.get(address):
            if partition.refuse:
                raise ConnectionRefusedError(f"{address!r} cannot be reached")
            await partition.healed.wait()

    def _accept(self, listener: "Listener", client_certificate: dict[str, Any] | None) -> "Connection":
        connection = Connection(self, listener, client_certificate, number=self.connections_made)
        self.connections_made += 1
        self.connections[connection] = None
        if fault := self._faults.get(listener.address):
            fault(connection)
        connection.server.attach(listener.protocol_factory())
        return connection


@dataclass
class Listener:
    """Somebody who accepts connections to `address`, until closed."""

    address: Address
    protocol_factory: Callable[[], asyncio.Protocol]
    certificate: dict[str, Any] | None
    _listeners: dict[Address, "Listener"] = field(repr=False)

    def close(self) -> None:
        """Accept no more; connections already made go on."""
        if self._listeners.get(self.address) is self:
            del self._listeners[self.address]


@dataclass
class _Partition:
    refuse: bool
    healed: asyncio.Event = field(default_factory=asyncio.Event)


class Connection:
    """Two transports and the two directions between them."""

    def __init__(
        self, network: Network, listener: Listener, client_certificate: dict[str, Any] | None, *, number: int
    ) -> None:
        self.address = listener.address
        self._network = network
        self._number = number
        # An unnamed Unix socket has an empty name, as the kernel would tell.
        from_ = "" if isinstance(self.address, str) else ("client", _FIRST_EPHEMERAL_PORT + number)
        common = {"socket": None, "sslcontext": None}
        self.client = MemoryTransport(
            self, {"sockname": from_, "peername": self.address, "peercert": listener.certificate, **common}
        )
        self.server = MemoryTransport(
            self, {"sockname": self.address, "peername": from_, "peercert": client_certificate, **common}
        )
        self.to_server = Direction(self, sender=self.client, target=self.server)
        self.to_client = Direction(self, sender=self.server, target=self.client)
        self.client.outgoing, self.client.incoming = self.to_server, self.to_client
        self.server.outgoing, self.server.incoming = self.to_client, self.to_server

    def __repr__(self) -> str:
        return f"#{self._number} to {self.address!r} (client {self.client.state}, server {self.server.state})"

    @property
    def network(self) -> Network:
        """The network it crosses."""
        return self._network

    @property
    def is_silent(self) -> bool:
        """Whether nothing arrives for now."""
        return self._network.is_partitioned(self.address)

    def cut(self, *, seen_as: End = End.RESET) -> None:
        """End both directions at once, partitioned or not: what is on the wire is lost, what arrived can be read."""
        for direction in (self.to_server, self.to_client):
            direction.cut(seen_as)

    def resend(self) -> None:
        """Put everything on the wire on its way again."""
        for direction in (self.to_server, self.to_client):
            direction.resend()

    def lost(self) -> None:
        """Hear that one end is gone; when both are, the connection is no longer open."""
        if self.client.is_gone and self.server.is_gone:
            self._network.connections.pop(self, None)


class Direction:
    """What one end has sent and the other has not yet read, in order."""

    def __init__(self, connection: Connection, *, sender: "MemoryTransport", target: "MemoryTransport") -> None:
        self.arrived_bytes = 0
        self._connection = connection
        self._network = connection.network
        self._sender = sender
        self._target = target
        self._wire: deque[tuple[bytes | End, asyncio.TimerHandle]] = deque()
        self._taken_bytes = 0
        self._due_s = 0.0
        self._cut_after: tuple[int, End] | None = None
        self._is_cut = False

    @property
    def room_bytes(self) -> int:
        """How much more the window takes before the other end reads."""
        return WINDOW_BYTES if self._is_cut else WINDOW_BYTES - self._taken_bytes

    def cut_after(self, count: int, *, seen_as: End = End.RESET) -> None:
        """Cut the connection as soon as `count` bytes have arrived in this direction, counted from its beginning.

        With 0 nothing arrives, and the first byte cuts.
        """
        if 0 < count <= self.arrived_bytes:
            self._connection.cut(seen_as=seen_as)
        else:
            self._cut_after = (count, seen_as)

    def send(self, data: bytes) -> None:
        """Put `data` on the wire, in one piece or two."""
        self._taken_bytes += len(data)
        dice = self._network.dice
        if len(data) > 1 and dice.random() < _SPLITS_PER_SEGMENT:
            middle = dice.randrange(1, len(data))
            self._dispatch(data[:middle])
            data = data[middle:]
        self._dispatch(data)

    def send_end(self, end: End) -> None:
        """End this direction behind all that was sent."""
        self._dispatch(end)

    def cut(self, seen_as: End) -> None:
        """End this direction now, whatever is still on the wire or sent later."""
        self.lose_all()
        self._is_cut = True
        self._target.arrived(seen_as)
        if self._sender.get_write_buffer_size():
            self._sender.arrived(End.RESET)

    def read(self, count: int) -> None:
        """Hear that the target has read `count` bytes: the sender may send as many."""
        self._taken_bytes -= count
        if self._sender.get_write_buffer_size():
            self._network.loop.call_soon(self._sender.has_room_again)

    def lose_all(self) -> None:
        """Lose what is on the wire."""
        while self._wire:
            _, timer = self._wire.popleft()
            timer.cancel()

    def resend(self) -> None:
        """Send what is on the wire again, as after a pause in which nothing got through."""
        waiting, self._wire = self._wire, deque()
        for item, timer in waiting:
            timer.cancel()
            self._dispatch(item)

    def _dispatch(self, item: bytes | End) -> None:
        loop = self._network.loop
        if self._is_cut:
            loop.call_later(self._network.latency_s(), self._sender.arrived, End.RESET)
            return
        # Nothing overtakes, and no two are due at once: the loop would run their timers in any order.
        self._due_s = max(nextafter(self._due_s, inf), loop.time() + self._network.latency_s())
        self._wire.append((item, loop.call_at(self._due_s, self._arrive)))

    def _arrive(self) -> None:
        if self._connection.is_silent:
            return  # healing sends it again
        item, _ = self._wire.popleft()
        if isinstance(item, End):
            self._target.arrived(item)
        elif self._cut_after is None or self.arrived_bytes + len(item) < self._cut_after[0]:
            self.arrived_bytes += len(item)
            self._target.arrived(item)
        else:
            self._arrive_in_part(item, *self._cut_after)

    def _arrive_in_part(self, data: bytes, count: int, seen_as: End) -> None:
        kept = data[: max(0, count - self.arrived_bytes)]
        self.arrived_bytes += len(kept)
        if kept:
            self._target.arrived(kept)
        self._connection.cut(seen_as=seen_as)


class MemoryTransport(_FlowControlMixin):
    """One end of a connection, to be treated like asyncio's transport of a socket."""

    outgoing: Direction
    incoming: Direction

    def __init__(self, connection: Connection, extra: dict[str, Any]) -> None:
        super().__init__(extra, connection.network.loop)
        self.connection = connection
        self.is_gone = False
        """Whether the socket behind it would be closed."""
        self._protocol: asyncio.Protocol | None = None
        self._unsent = bytearray()
        self._unread = bytearray()
        self._arrived_end: End | None = None
        self._begun = False
        self._paused = False
        self._closing = False
        self._aborted = False
        self._loss_is_scheduled = False
        self._eof_written = False
        self._eof_read = False

    @property
    def state(self) -> str:
        """How far it is with ending, for a reader of errors."""
        return "gone" if self.is_gone else "closing" if self._closing else "open"

    # What asyncio asks of a transport.

    def set_protocol(self, protocol: asyncio.Protocol) -> None:
        """Hand the connection to another protocol."""
        self._protocol = protocol

    def get_protocol(self) -> asyncio.Protocol | None:
        """Tell who is called with what arrives."""
        return self._protocol

    def is_closing(self) -> bool:
        """Tell whether it is closing or closed."""
        return self._closing

    def is_reading(self) -> bool:
        """Tell whether what arrives is handed over."""
        return not self._closing and not self._paused

    def pause_reading(self) -> None:
        """Hand over nothing, and learn nothing of the other end's fate, until reading is resumed."""
        if self.is_reading():
            self._paused = True

    def resume_reading(self) -> None:
        """Hand over what has arrived, from the next pass of the loop on."""
        if self._paused and not self._closing:
            self._paused = False
            self._loop.call_soon(self._hand_over)

    def get_write_buffer_size(self) -> int:
        """Tell how many bytes the window has had no room for."""
        return len(self._unsent)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send what the window takes and buffer the rest."""
        if self._eof_written:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self._loss_is_scheduled or not data:
            return
        if self._arrived_end is End.RESET:
            self._lose(BrokenPipeError("Broken pipe") if self._eof_read else ConnectionResetError(_RESET))
            return
        self._unsent += data
        self._send_what_fits()
        self._maybe_pause_protocol()

    def can_write_eof(self) -> bool:
        """Tell that half of it can be closed."""
        return True

    def write_eof(self) -> None:
        """End the outgoing direction once everything is sent."""
        if self._closing or self._eof_written:
            return
        self._eof_written = True
        if not self._unsent:
            self.outgoing.send_end(End.EOF)

    def close(self) -> None:
        """Read no more, send what is buffered, then end."""
        if self._closing:
            return
        self._closing = True
        if not self._unsent:
            self._lose(None)

    def abort(self) -> None:
        """End at once; what is buffered or on the wire is lost."""
        if not self._loss_is_scheduled:
            self._aborted = True
            self._lose(None)

    # What the network does to it.

    def attach(self, protocol: asyncio.Protocol) -> "asyncio.Future[MemoryTransport]":
        """Begin: call `connection_made`, and only then read; the future resolves after both."""
        self._protocol = protocol
        begun: asyncio.Future[MemoryTransport] = self._loop.create_future()
        self._loop.call_soon(protocol.connection_made, self)
        self._loop.call_soon(self._begin_reading)
        self._loop.call_soon(lambda: begun.done() or begun.set_result(self))
        return begun

    def give_up(self) -> None:
        """End, whether or not a protocol was attached: nobody waits for the connection any more."""
        if self._protocol is not None:
            self.close()
        else:
            self._closing = True
            self._close_socket()

    def arrived(self, item: bytes | End) -> None:
        """Take what has arrived, and hand it over if anybody reads."""
        if self.is_gone:
            if isinstance(item, bytes):  # as the kernel answers for a socket that is no longer there
                self.outgoing.send_end(End.RESET)
            return
        if isinstance(item, bytes):
            self._unread += item
        elif self._arrived_end is not End.RESET:
            self._arrived_end = item
            if item is End.RESET and self._unsent:
                self._lose(ConnectionResetError(_RESET))
        self._hand_over()

    def has_room_again(self) -> None:
        """Send what was waiting for the other end to read."""
        if self.is_gone or self._loss_is_scheduled or not self._unsent:
            return
        self._send_what_fits()
        self._maybe_resume_protocol()
        if not self._unsent:
            if self._closing:
                self._lose(None)
            elif self._eof_written:
                self.outgoing.send_end(End.EOF)

    def _begin_reading(self) -> None:
        self._begun = True
        self._hand_over()

    def _hand_over(self) -> None:
        """Give the protocol what has arrived: bytes first, then the end."""
        if not self._begun or not self.is_reading() or self._eof_read:
            return  # after an EOF a socket is polled no more, so that only a write would notice a reset
        if self._unread:
            data = bytes(self._unread)
            self._unread.clear()
            self.incoming.read(len(data))
            self._protocol.data_received(data)
            if self._arrived_end:
                self._loop.call_soon(self._hand_over)
        elif self._arrived_end is End.RESET:
            self._lose(ConnectionResetError(_RESET))
        elif self._arrived_end is End.EOF:
            self._eof_read = True
            if not self._protocol.eof_received():
                self.close()

    def _send_what_fits(self) -> None:
        if (room_bytes := self.outgoing.room_bytes) > 0:
            self.outgoing.send(bytes(self._unsent[:room_bytes]))
            del self._unsent[:room_bytes]

    def _lose(self, reason: Exception | None) -> None:
        """Have `connection_lost` called soon, once."""
        if self._loss_is_scheduled:
            return
        self._closing = self._loss_is_scheduled = True
        self._unsent.clear()
        self._loop.call_soon(self._lost, reason)

    def _lost(self, reason: Exception | None) -> None:
        protocol, self._protocol = self._protocol, None
        try:
            protocol.connection_lost(reason)
        finally:
            self._close_socket()

    def _close_socket(self) -> None:
        """Do what the kernel does with a closed socket: tell the other end, harshly if it was not read to its end."""
        self.is_gone = True
        if self._aborted:
            self.outgoing.lose_all()
            self.outgoing.send_end(End.RESET if self._unread else self.connection.network.dice.choice(list(End)))
        elif self._unread:
            self.outgoing.send_end(End.RESET)
        elif not self._eof_written:
            self.outgoing.send_end(End.EOF)
        self.connection.lost()
