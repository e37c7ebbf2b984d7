"""The life of a daemon around its listeners: started, reloaded, asked to stop, drained, stopped."""

from __future__ import annotations

import asyncio
import signal
import ssl
import sys
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Protocol, TypeVar

from msgspec import Struct

from substrate_seam.events import DaemonStarted, DaemonStopped, DaemonStopping, Emit, Event
from substrate_service.address import Address, ListenFailed
from substrate_service.exchange import App
from substrate_service.listener import Refusal, strict_config
from substrate_service.observing import Observed, Observing, observed
from substrate_service.serving import Listener, run, serve
from substrate_service.settings import SettingsInvalid
from substrate_service.signals import Stopping, stop_on_signals
from substrate_service.tracing import TracingSettings

_ENDING_S = 2.0
"""After its calls were ended by the drain deadline, so long the daemon lets the last answers out."""


class Assembled(Struct, frozen=True, kw_only=True):
    """A daemon put together and not yet listening: its public listener and its admin listener, and what it does."""

    listeners: list[Listener]
    duties: Duties
    drain_within_s: float


class Duties(Struct, frozen=True, kw_only=True):
    """What is particular to one daemon: how it reloads (SIGHUP), how it drains, and what it says once it listens.

    `drain` is told the seconds that calls have left, and returns when none is left or they are over.
    """

    reload: Callable[[], Awaitable[None]]
    drain: Callable[[float], Awaitable[None]]
    announce: Callable[[list[Address]], None] = lambda _: None


def exit_status(name: str, to_the_end: Callable[[], int], *, mistakes: tuple[type[Exception], ...]) -> int:
    """Run a daemon to its end; an operator's mistake becomes its words on standard error, and status 2."""
    found: list[BaseException] = []
    try:
        return to_the_end()
    except* mistakes as group:  # task groups wrap what is raised within them
        found = list(_leaves(group))
    for mistake in found:
        print(f"{name}: {mistake}", file=sys.stderr)  # noqa: T201  # the person who started it reads this
    return 2


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def two_listeners(
    prefix: str,
    addresses: tuple[Address, Address],
    apps: tuple[App, App],
    *,
    refusal: Refusal,
    emit: Emit,
    tls: ssl.SSLContext | None = None,
) -> list[Listener]:
    """The public listener (over `tls`, if given) and the admin listener, which outlasts it, so that drains show."""
    public, admin = apps
    return [
        Listener(
            setting=f"{prefix}LISTEN_ADDR",
            address=addresses[0],
            config=strict_config(public, refusal=refusal, emit=emit, tls=tls),
        ),
        Listener(
            setting=f"{prefix}ADMIN_LISTEN_ADDR",
            address=addresses[1],
            config=strict_config(admin, refusal=refusal, emit=emit),
            outlasts=True,
        ),
    ]


class DaemonSettings(Protocol):
    """What every daemon is told."""

    @property
    def quiet(self) -> frozenset[type[Event]]:
        """Kinds of events that its log leaves out."""
        ...

    @property
    def tracing(self) -> TracingSettings | None:
        """Where its traces go, if anywhere."""
        ...


Settings = TypeVar("Settings", bound=DaemonSettings)


def run_from_environment(
    name: str,
    version: str,
    environment: Mapping[str, str],
    *,
    read: Callable[[Mapping[str, str]], Settings],
    assemble: Callable[[Settings, Observed, Stopping], AbstractAsyncContextManager[Assembled]],
    mistakes: tuple[type[Exception], ...],
    observing: Observing = observed,
) -> int:
    """Be a daemon, from its environment to its exit status.

    0 after a clean drain, 1 after calls were cut short, 2 if it can't serve at all, and then `mistakes` say why.
    """

    async def live(settings: Settings, observations: Observed) -> int:
        stopping = Stopping()
        with stop_on_signals(stopping):
            async with assemble(settings, observations, stopping) as assembled:
                return await run_daemon(name, version, assembled, stopping=stopping, emit=observations.emit)

    def to_the_end() -> int:
        settings = read(environment)
        with observing(settings.tracing, settings.quiet) as observations:
            return run(live(settings, observations))

    return exit_status(name, to_the_end, mistakes=(SettingsInvalid, ListenFailed, *mistakes))


async def run_daemon(name: str, version: str, assembled: Assembled, *, stopping: Stopping, emit: Emit) -> int:
    """Serve until asked to stop; the exit status is 0 when every call had its answer by then, else 1.

    Once asked, the daemon is unready and takes no new calls; those that run have the seconds of its drain.
    Raises `ListenFailed` before anything is served.
    """
    duties, drain_within_s = assembled.duties, assembled.drain_within_s

    def listening(addresses: list[Address]) -> None:
        public, admin = (str(address) for address in addresses)
        emit(DaemonStarted(daemon=name, version=version, listen=public, admin=admin))
        duties.announce(addresses)

    async def drain() -> None:
        await stopping.requested.wait()
        emit(DaemonStopping(daemon=name, signal=stopping.by, within_s=drain_within_s))
        await duties.drain(drain_within_s)

    async with asyncio.TaskGroup() as tasks:
        draining = tasks.create_task(drain(), name="drain")
        hups = asyncio.Event()
        reloading = tasks.create_task(_reload_on(hups, duties.reload), name="reload")
        try:
            with _set_on_hup(hups):
                clean = await serve(
                    assembled.listeners, stopping=stopping, drain_s=drain_within_s + _ENDING_S, listening=listening
                )
        finally:
            draining.cancel()
            reloading.cancel()
    emit(DaemonStopped(daemon=name, clean=clean))
    return 0 if clean else 1


async def _reload_on(hups: asyncio.Event, reload: Callable[[], Awaitable[None]]) -> None:
    while True:
        await hups.wait()
        hups.clear()
        await reload()


@contextmanager
def _set_on_hup(hups: asyncio.Event) -> Generator[None]:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, hups.set)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
