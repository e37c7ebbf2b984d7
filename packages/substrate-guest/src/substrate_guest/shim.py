"""The process in a guest: serves a workload to its host, one HTTP exchange per connection."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import TYPE_CHECKING, NoReturn

from substrate_guest.control import Control, Readiness
from substrate_guest.exchange import Exchange, Refused
from substrate_guest.failure import describe, log
from substrate_guest.identity import Identities, OwnKernel
from substrate_guest.journal import AUDIT_VARIABLE, journal
from substrate_guest.loading import NotAWorkload, load
from substrate_guest.vsock import CONTROL_PORT, DATA_PORT, from_environ, taken_socket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from substrate_guest.app import Request
    from substrate_guest.vsock import Answer, Vsock
    from substrate_guest.workload import Workload

CAPTURE_VARIABLE = "SUBSTRATE_CAPTURE_FD"
EXIT_PRIME_FAILED = 1
EXIT_USAGE = 2
TELL_S = 1.0
"""How long a guest that failed to get ready waits for the node to ask why."""


async def serve(workload: Workload, vsock: Vsock, *, primed: bool = False, audit: bool = False) -> NoReturn:
    """Serve `workload` on the data port and its control on the control port, until the process ends.

    `primed` says that `Workload.prime` has been awaited, in the process that this one was forked from. When priming or
    starting fails, the process ends with `EXIT_PRIME_FAILED`, so that the node hears of it.
    """
    readiness = Readiness()
    async with asyncio.TaskGroup() as duties:
        duties.create_task(vsock.serve(answers(workload, vsock, readiness, audit=audit)), name="vsock")

        async def begin() -> None:
            if not primed:
                await workload.prime()
            await workload.start(duties)

        await get_ready(readiness, begin())
    raise AssertionError("the vsock is served until the process ends")


def answers(workload: Workload, vsock: Vsock, readiness: Readiness, *, audit: bool = False) -> dict[int, Answer]:
    """Who answers on each port: the workload its requests, once it is ready, and `Control` the node's."""
    control = Control(workload, Identities(OwnKernel() if vsock.own_kernel else None, os.environ), readiness)

    async def respond(request: Request, exchange: Exchange) -> None:
        if not readiness.ready:
            raise Refused(503, readiness.failure or "not ready yet")
        if audit:
            await journal(request, vsock)
        await workload.respond(request, exchange)

    return {DATA_PORT: answering(respond), CONTROL_PORT: answering(control.respond)}


async def get_ready(readiness: Readiness, steps: Coroutine[None, None, None]) -> None:
    """Do what it takes to be ready; the process ends when that fails, as soon as the node has heard why."""
    try:
        await steps
    except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever it is, the guest cannot serve
        log(error)
        readiness.settle(f"the workload failed to get ready: {describe(error)}")
        with suppress(TimeoutError):
            await asyncio.wait_for(readiness.told.wait(), TELL_S)
        end(EXIT_PRIME_FAILED)
    readiness.settle()


def answering(respond: Callable[[Request, Exchange], Awaitable[None]]) -> Answer:
    """Answer a connection with one exchange; an error is a 502, or a cut reply once bytes of it have gone out."""

    async def answer(sock: socket.socket, received: bytes) -> None:
        exchange = Exchange(sock, received)
        try:
            try:
                request = await exchange.request()
            except OSError:  # the peer left: there is nobody to answer
                return
            await respond(request, exchange)
        except Refused as refused:
            await exchange.refuse(refused)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # one exchange never ends the others
            log(error)
            await exchange.refuse(Refused(502, f"the workload failed: {describe(error)}"))
        finally:
            exchange.close()

    return answer


def end(status: int) -> NoReturn:
    """End the process now, whatever its threads and tasks are in the middle of."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def end_on_sigterm(*, first: bool = False) -> None:
    """Let SIGTERM end the process at once, also in the middle of a request.

    `first` says that it may become the first of a namespace, which the kernel spares a signal without a handler.
    """
    if first or os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main(target: str, *, directory: str | None = None) -> NoReturn:
    """Serve the workload that `target` (`module:attribute`) names, with `directory` as the working directory."""

    def make() -> Workload:
        if directory is not None:
            os.chdir(directory)
        sys.path.insert(0, os.getcwd())  # noqa: PTH109  # pathlib would be half a dozen modules more to wait for
        return load(target)

    run(make)


def run(make: Callable[[], Workload]) -> NoReturn:
    """Serve what `make` returns; what it raises of `ValueError`, `OSError` and `NotAWorkload` ends the process."""
    end_on_sigterm()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a guest is killed once it has answered, and flushes nothing then
    try:
        vsock = from_environ(os.environ)
        audit = os.environ.pop(AUDIT_VARIABLE, "") == "1"
        capture = taken_socket(os.environ, CAPTURE_VARIABLE, socket.SOCK_SEQPACKET)
        workload = make()
    except (ValueError, OSError, NotAWorkload) as error:
        if isinstance(error, NotAWorkload) and error.__cause__ is not None:
            log(error.__cause__)  # the author's own failure, with its line
        print(f"substrate-guest: {error}", file=sys.stderr)  # noqa: T201  # the console is the guest's log
        sys.exit(EXIT_USAGE)
    if capture is None:
        asyncio.run(serve(workload, vsock, audit=audit))
    from substrate_guest import newborn, zygote

    clones_vsock, loop = zygote.be_cloned(workload, vsock, capture)
    newborn.serve(workload, clones_vsock, loop, audit=audit)
