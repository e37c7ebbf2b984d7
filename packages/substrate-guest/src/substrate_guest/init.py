"""The first process of a machine that was made from an image: makes it ready, serves its workload, reaps its dead.

Two processes do it, because whoever waits for every child can't also wait for one: the first of all starts the second,
which serves, and the machine ends when that does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from substrate_guest import machine, shim
from substrate_guest.command import words
from substrate_guest.failure import describe
from substrate_guest.image import SERVE_VARIABLE, Image, account, served

if TYPE_CHECKING:
    from substrate_guest.workload import Workload

IMAGE = "/.substrate/image.json"
SITE = "/.substrate/site"
STOP_S = 2.0
"""How long processes have to end when the machine is asked to, before they are killed."""
STOPPED_BY = {signal.SIGTERM, signal.SIGINT}
"""What asks the machine to end."""


def main() -> NoReturn:
    """Be the first process of this machine; never returns, since the kernel would panic."""
    status = shim.EXIT_PRIME_FAILED
    try:
        machine.set_up()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, *STOPPED_BY})
        server = os.fork()
        if server == 0:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD, *STOPPED_BY})
            shim.run(_workload)
        status = keep(server)
        say(f"the workload's server is gone, {words(status)}; the machine ends")
    except OSError as error:
        say(f"the machine can't be set up: {describe(error)}")
    try:
        machine.restart()
    finally:
        os._exit(status & 0xFF)


def keep(server: int) -> int:
    """Reap every child until `server` has ended; its status, negative for a signal. A call to end goes to everybody."""
    end_by_s: float | None = None
    while True:
        told = _told(end_by_s)
        if told in STOPPED_BY and end_by_s is None:
            end_by_s = time.monotonic() + STOP_S
            os.kill(-1, signal.SIGTERM)
        elif told is None:
            os.kill(-1, signal.SIGKILL)
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)) is not None:
            if ended.si_pid == server:
                return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _told(end_by_s: float | None) -> int | None:
    """The next signal of those that matter; None when `end_by_s` of the monotonic clock has passed without one."""
    signals = {signal.SIGCHLD, *STOPPED_BY}
    if end_by_s is None:
        return signal.sigwaitinfo(signals).si_signo
    told = signal.sigtimedwait(signals, max(end_by_s - time.monotonic(), 0.0))
    return None if told is None else told.si_signo


def say(text: str) -> None:
    """Write a line to the machine's console."""
    sys.stderr.write(f"substrate-guest: {text}\n")
    sys.stderr.flush()


def _workload() -> Workload:
    """The workload of this machine's image, in the image's own environment from now on."""
    image = Image.parse(_read(IMAGE))
    who = account(image.user, _read)
    environ = image.environ(who, os.environ)
    os.environ.clear()
    os.environ.update(environ)
    return served(environ.get(SERVE_VARIABLE, "exec"), image, who, SITE)


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123  # pathlib is slow to import
        return file.read()
