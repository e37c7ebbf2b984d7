"""`fc-invoke top`: what a daemon is at, drawn again and again on a terminal, or told line by line to a pipe."""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import msgspec

from fc_invoke.client import Unreachable, open_client, unanswered
from fc_invoke.drawing import drawn
from substrate_service.snapshot import Snapshot

_PATIENCE_S = 5.0
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l\x1b[?7l", "\x1b[?7h\x1b[?25h\x1b[?1049l"
"""The terminal's other screen, without cursor and without wrapping; and back."""
_HOME, _END_OF_LINE, _BELOW = "\x1b[H", "\x1b[K", "\x1b[J"


def watch(admin_url: str, *, token: str | None, once: bool, every_s: float) -> int:
    """Show the daemon at `admin_url` until told to stop (`q`, Ctrl-C); `once` shows it once. 0 when it went well.

    A terminal is drawn upon; a pipe gets one snapshot after another, plain. Raises `Unreachable` if the daemon is so at
    first; one that falls silent later is waited for.
    """
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal without our bars still counts
    with open_client(admin_url, token=token) as client:
        snapshot = _fetched(client, admin_url)
        if once or not sys.stdout.isatty():
            drawing = sys.stdout.isatty()
            columns = shutil.get_terminal_size().columns if drawing else sys.maxsize  # a pipe is as wide as it takes
            print(*drawn(snapshot, columns=columns, colour=drawing), sep="\n", flush=True)
            while not once:
                time.sleep(every_s)
                print("", *drawn(_fetched(client, admin_url), columns=columns), sep="\n", flush=True)
        else:
            _draw_until_told(client, admin_url, snapshot, every_s)
    return 0


def _draw_until_told(client: httpx.Client, admin_url: str, snapshot: Snapshot, every_s: float) -> None:
    silence, next_s = "", time.monotonic() + every_s
    with _screen() as waited:
        while True:
            _draw(snapshot, silence)
            if waited(max(0.0, next_s - time.monotonic())):
                return
            if time.monotonic() < next_s:
                continue  # the terminal has another size
            next_s = time.monotonic() + every_s
            try:
                snapshot, silence = _fetched(client, admin_url), ""
            except Unreachable as error:
                silence = f"no answer, this is the last known: {error}"


def _fetched(client: httpx.Client, admin_url: str) -> Snapshot:
    """The present. Raises `Unreachable`."""
    try:
        answer = client.get("/v1/live", timeout=_PATIENCE_S)
        if answer.status_code == 401:
            raise Unreachable(
                f"{admin_url} wants the operator's token: --admin-token-file names the file that holds it"
            )
        if answer.status_code != 200:
            raise Unreachable(f"{admin_url}: {answer.status_code} {answer.text.strip()}")
        return msgspec.json.decode(answer.content, type=Snapshot)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unreachable(unanswered(admin_url, error, option="--admin")) from error
    except msgspec.DecodeError as error:
        raise Unreachable(f"{admin_url} does not speak as a daemon of this version does: {error}") from error


def _draw(snapshot: Snapshot, silence: str) -> None:
    columns, lines = shutil.get_terminal_size()
    last = silence or "q quits"
    body = drawn(snapshot, columns=columns, lines=max(1, lines - 1), colour=True)
    body += [""] * (lines - 1 - len(body))
    dressed = f"\x1b[{'31' if silence else '2'}m{last[:columns]}\x1b[0m"
    sys.stdout.write(_HOME + "".join(f"{line}{_END_OF_LINE}\n" for line in body) + dressed + _END_OF_LINE + _BELOW)
    sys.stdout.flush()


class _Waiting:
    """Waits for a key, for the terminal to change its size, or for some seconds."""

    def __init__(self, woken: int) -> None:
        self._woken = woken
        self._sources = [woken, *([sys.stdin.fileno()] if sys.stdin.isatty() else [])]

    def __call__(self, within_s: float) -> bool:
        """Whether the reader has seen enough."""
        ready, _, _ = select.select(self._sources, [], [], within_s)
        if self._woken in ready:
            os.read(self._woken, 4096)
            ready.remove(self._woken)
        return any(os.read(source, 64)[:1] in {b"q", b"Q", b"\x04", b""} for source in ready)


@contextmanager
def _screen() -> Iterator[_Waiting]:
    """The terminal's other screen for the length of the block; afterwards the terminal is as it was."""
    woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = termios.tcgetattr(sys.stdin) if sys.stdin.isatty() else None
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGWINCH, lambda *_: None)  # it only has to wake us
    for end in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: some shells have what they start ignore it
        signal.signal(end, signal.default_int_handler)
    try:
        if before is not None:
            tty.setcbreak(sys.stdin)
        sys.stdout.write(_ENTER)
        yield _Waiting(woken)
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()
        if before is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
        signal.set_wakeup_fd(-1)
        os.close(woken)
        os.close(waker)
