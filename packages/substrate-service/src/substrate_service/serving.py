"""Serving applications until asked to stop, and then stopping in good order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Final, cast

import uvicorn
import uvloop
from msgspec import Struct
from uvicorn.server import ServerState

from substrate_service.address import Address, TcpAddress, bound
from substrate_service.listener import StrictConfig, StrictProtocol
from substrate_service.signals import Stopping

_ABORT_GRACE_S: Final = 1.0
"""Seconds that cancelled applications have to clean up after themselves."""

_GC_THRESHOLDS: Final = (10_000, 20, 20)

_LAST_REPLIES_S: Final = 1.0
"""Seconds that a listener which outlasts the others has for what it is answering when they are quiet."""


class Listener(Struct, frozen=True, kw_only=True):
    """One address and what is served there; `setting` names the address in errors.

    A listener that `outlasts` the others closes after they are quiet, so that probes and metrics can watch them drain.
    """

    setting: str
    address: Address
    config: StrictConfig
    outlasts: bool = False


async def serve(
    listeners: Sequence[Listener],
    *,
    stopping: Stopping,
    drain_s: float,
    listening: Callable[[list[Address]], None] = lambda _: None,
) -> bool:
    """Serve every listener until `stopping` is requested; true when every request then ended within `drain_s` seconds.

    `listening` is told the addresses once all of them accept connections. What is left after `drain_s`, or when
    `stopping` is forced, is aborted, and so is everything when this call is cancelled. An application ends its own
    endless replies when `stopping` is requested; those of a listener that outlasts the others are cut, and that is
    no fault. Raises `ListenFailed`, before anything is served.
    """
    with contextlib.ExitStack() as sockets:
        places = [sockets.enter_context(bound(each.address, setting=each.setting)) for each in listeners]
        servers = [uvicorn.Server(each.config) for each in listeners]
        try:
            for server, place in zip(servers, places, strict=True):
                await _open(server, place)
            async with asyncio.TaskGroup() as duties:
                clock = duties.create_task(_keep_date(servers), name="keep-date")
                listening([_address_of(each.address, place) for each, place in zip(listeners, places, strict=True)])
                await stopping.requested.wait()
                first, last = _by_stage(listeners, servers)
                clean = await _drain(first, within_s=drain_s, forced=stopping.forced)
                await _drain(last, within_s=_LAST_REPLIES_S, forced=stopping.forced)
                clock.cancel()
            return clean
        finally:
            await _abort(servers)


def run(main: Coroutine[Any, Any, int], *, loop_factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.Loop) -> int:
    """Run a daemon to its end on an event loop of its own; what it returns is its exit status.

    The collector of cycles looks less often than by default: calls leave hardly any, and keep many events for a while.
    """
    # Read by uvloop's libuv. Most connections here live for one exchange, and the ring costs more than it saves then.
    os.environ.setdefault("UV_USE_IO_URING", "0")
    gc.set_threshold(*_GC_THRESHOLDS)
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main)


async def _open(server: uvicorn.Server, place: socket.socket) -> None:
    server.lifespan = server.config.lifespan_class(server.config)
    await server.on_tick(0)
    await server.startup(sockets=[place])


def _by_stage(
    listeners: Sequence[Listener], servers: Sequence[uvicorn.Server]
) -> tuple[list[uvicorn.Server], list[uvicorn.Server]]:
    """The servers that stop first, and those that outlast them."""
    pairs = list(zip(listeners, servers, strict=True))
    return [s for each, s in pairs if not each.outlasts], [s for each, s in pairs if each.outlasts]


async def _keep_date(servers: Iterable[uvicorn.Server]) -> None:
    """Let uvicorn renew the Date field of its replies, once a second."""
    while True:
        await asyncio.sleep(1.0)
        for server in servers:
            await server.on_tick(0)


async def _drain(servers: Sequence[uvicorn.Server], *, within_s: float, forced: asyncio.Event) -> bool:
    """Stop accepting and wait until no request is left; false when that took too long or was forced."""
    _stop_accepting(servers)
    try:
        async with asyncio.timeout(within_s) as grace, asyncio.TaskGroup() as race:
            hurry = race.create_task(_end_when(forced, grace), name="force")
            for server in servers:
                await _quiet(server.server_state)
            hurry.cancel()
    except TimeoutError:
        await _abort(servers)
        return False
    return True


async def _end_when(forced: asyncio.Event, grace: asyncio.Timeout) -> None:
    await forced.wait()
    grace.reschedule(asyncio.get_running_loop().time())


async def _quiet(state: ServerState) -> None:
    """Return once no request is at work and no connection is left."""
    while state.tasks or state.connections:
        for connection in _connections(state):  # one may have been accepted at the last moment
            connection.shutdown()
        if state.tasks:
            await asyncio.wait(set(state.tasks), return_when=asyncio.FIRST_COMPLETED)
        else:
            await _connections(state)[0].closed()


async def _abort(servers: Iterable[uvicorn.Server]) -> None:
    _stop_accepting(servers)
    tasks = set[asyncio.Task[None]]()
    for server in servers:
        for connection in _connections(server.server_state):
            connection.abort()
        tasks |= server.server_state.tasks
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_ABORT_GRACE_S)


def _stop_accepting(servers: Iterable[uvicorn.Server]) -> None:
    for server in servers:
        for acceptor in server.servers if server.started else ():
            acceptor.close()


def _connections(state: ServerState) -> list[StrictProtocol]:
    return list(cast(set[StrictProtocol], state.connections))


def _address_of(asked: Address, place: socket.socket) -> Address:
    """The address as it came to be: port 0 has become a real one."""
    return TcpAddress(asked.host, place.getsockname()[1]) if isinstance(asked, TcpAddress) else asked
