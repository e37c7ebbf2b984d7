"""Events as lines of JSON, or as readable ones on a terminal; the log lines of libraries among them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import select
import stat
import threading
import time
import traceback
from collections.abc import Callable, Generator
from functools import cache, lru_cache
from typing import Final

import msgspec

from substrate_seam import events
from substrate_seam.events import Emit, Event

_PENDING_BYTES_MAX: Final = 2**20
_TOGETHER_S: Final = 0.005
"""So long a line waits for others: to write each by itself, once in a turn of the loop, costs more than making it."""
_RETRY_S: Final = 0.05
_LAST_WORDS_S: Final = 1.0
_HASHED: Final = frozenset({"session", "url", "target"})
STEPS: Final[frozenset[type[Event]]] = frozenset(
    {
        *(events.InvocationAccepted, events.InvocationPlaced, events.InvocationEnded),
        *(events.CallQueued, events.SlotTaken, events.SlotFreed),
        *(events.GuestClaimed, events.ExchangeEnded, events.GuestGone, events.GuestParked),
    }
)
"""The events of a call that goes well: one of them can tell the others."""

_LEVELS: Final[dict[type[Event], str]] = {
    events.BaseCondemned: "warning",
    events.BaseFailed: "warning",
    events.CatalogRefused: "error",
    events.CleanupFailed: "error",
    events.CleanupLate: "warning",
    events.DefectFound: "error",
    events.NodeLost: "warning",
    events.StartFailed: "warning",
    events.WarningRaised: "warning",
}
_SEVERITIES: Final = {"warning": "warning", "error": "error", "critical": "error"}

_encoder = msgspec.json.Encoder(enc_hook=repr)


class LinesDropped(Event, frozen=True, kw_only=True, tag="log.dropped"):
    """The log's reader was too slow: `lines` lines were not written."""

    lines: int


class LibraryLogged(Event, frozen=True, kw_only=True, tag="library.logged"):
    """A library wrote to Python's own logging."""

    logger: str
    severity: str
    message: str
    traceback: str = ""


class EventLog:
    """An `Emit` that writes a line for each event to a file descriptor, those of 5 ms together.

    It never waits: what a slow reader does not take is held up to a MiB, and further lines are dropped, counted and
    told. Session ids and URLs are hashed with `key`; without one they can be compared only within this process.
    Kinds in `quiet` leave no line, but for a guest that ended by itself. Made by `event_log`.
    """

    def __init__(
        self,
        descriptor: int,
        *,
        readable: bool,
        quiet: frozenset[type[Event]] = frozenset(),
        key: bytes | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._descriptor = descriptor
        self._is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._format = _readable if readable else _json
        self._quiet = quiet
        self._key = key or os.urandom(16)
        self._clock = clock
        self._second, self._second_text = -1, ""
        self._millisecond, self._now_text = -1, ""
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._dropped = 0
        self._loop: asyncio.AbstractEventLoop | None = None  # the one that will flush
        self._lock = threading.Lock()  # libraries log from their threads

    def sink(self, kind: type[Event]) -> Emit | None:
        """What is done with events of a kind."""
        if kind not in self._quiet:
            return self
        return self._tell_own_end if kind is events.GuestGone else None

    def _tell_own_end(self, gone: Event) -> None:
        assert isinstance(gone, events.GuestGone)
        if gone.exit:
            self(gone)

    def __call__(self, event: Event) -> None:
        """Write the event soon; never waits, never raises."""
        line = self._line(event)
        with self._lock:
            if self._pending_bytes + len(line) > _PENDING_BYTES_MAX:
                self._dropped += 1
                return
            self._pending.append(line)
            self._pending_bytes += len(line)
        if self._loop is None or self._loop.is_closed():
            try:
                self._loop = asyncio.get_running_loop()
            except RuntimeError:
                self.flush()
            else:
                self._loop.call_later(_TOGETHER_S, self._tick)

    def flush(self, *, within_s: float = 0.0) -> None:
        """Write what the reader takes, waiting for it at most `within_s` seconds."""
        deadline_s = time.monotonic() + within_s
        with self._lock:
            pending, self._pending = b"".join(self._pending), []
            written = self._write(pending, deadline_s)
            if written == len(pending) and self._dropped:
                told, self._dropped = self._line(LinesDropped(lines=self._dropped)), 0
                pending, written = told, self._write(told, deadline_s)
            if rest := pending[written:]:
                self._pending.insert(0, rest)
            self._pending_bytes = sum(map(len, self._pending))

    def _tick(self) -> None:
        loop, self._loop = self._loop, None
        self.flush()
        if self._pending and loop is not None:
            self._loop = loop
            loop.call_later(_RETRY_S, self._tick)

    def _write(self, data: bytes, deadline_s: float) -> int:
        """Write without waiting beyond the deadline; how many bytes are dealt with."""
        view, at = memoryview(data), 0
        # A pipe that polls as writable takes PIPE_BUF bytes without blocking. Making it non-blocking instead would
        # change it for every process that shares it.
        slice_bytes = len(data) if self._is_file else select.PIPE_BUF
        try:
            while at < len(data) and self._poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
                at += os.write(self._descriptor, view[at : at + slice_bytes])
        except OSError:
            return len(data)  # the reader is gone for good, and there is nobody to tell
        return at

    def _line(self, event: Event) -> bytes:
        try:
            level, discreet = _way_of(type(event))
            shown = event if discreet else self._discreet(event)
            return self._format(self._now(), level or _severity_of(event), shown)
        except Exception:  # noqa: BLE001  # an event that cannot be written must not harm whoever emits it
            defect = events.DefectFound(message="an event cannot be written", traceback=traceback.format_exc())
            return self._format(self._now(), "error", defect)

    def _now(self) -> str:
        now_s = self._clock()
        if (millisecond := int(now_s * 1000)) != self._millisecond:
            if (second := int(now_s)) != self._second:
                self._second, self._second_text = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._millisecond, self._now_text = millisecond, f"{self._second_text}.{millisecond % 1000:03d}Z"
        return self._now_text

    def _discreet(self, event: Event) -> Event:
        """The event with its session id or URL hashed, and without what a guest wrote unless it ended by itself."""
        if isinstance(event, events.GuestGone) and event.console and not event.exit:
            return msgspec.structs.replace(event, console="")
        names = _HASHED.intersection(event.__struct_fields__)
        values = {name: value for name in names if (value := getattr(event, name)) is not None}
        if not values:
            return event
        hashed = {name: self.hashed(str(value)) for name, value in values.items()}
        return msgspec.structs.replace(event, **hashed)

    def hashed(self, text: str) -> str:
        """What the log shows in place of a session's id or a URL."""
        return "#" + hashlib.blake2b(text.encode("utf-8", "surrogateescape"), key=self._key, digest_size=6).hexdigest()


@contextlib.contextmanager
def event_log(
    descriptor: int,
    *,
    readable: bool | None = None,
    quiet: frozenset[type[Event]] = frozenset(),
    key: bytes | None = None,
    clock: Callable[[], float] = time.time,
) -> Generator[EventLog]:
    """Write events to `descriptor` for the length of the block: readable on a terminal, JSON elsewhere.

    At the end the last lines have a second to be read.
    """
    readable = os.isatty(descriptor) if readable is None else readable
    log = EventLog(descriptor, readable=readable, quiet=quiet, key=key, clock=clock)
    try:
        yield log
    finally:
        log.flush(within_s=_LAST_WORDS_S)


@contextlib.contextmanager
def library_logs_to(emit: Emit, *, level: int = logging.WARNING) -> Generator[None]:
    """Make what libraries log, from `level` on, events like everything else, for the length of the block."""
    root, handler = logging.getLogger(), _Records(emit)
    before, root.handlers = (root.handlers, root.level), [handler]
    root.setLevel(level)
    try:
        yield
    finally:
        root.handlers, level_before = before
        root.setLevel(level_before)


@cache
def _way_of(kind: type[Event]) -> tuple[str, bool]:
    """How much a kind of event matters (empty: as each says), and whether it may be written as it is."""
    discreet = kind is not events.GuestGone and _HASHED.isdisjoint(kind.__struct_fields__)
    return "" if kind is LibraryLogged else _LEVELS.get(kind, "info"), discreet


def _severity_of(event: Event) -> str:
    """A library's line matters as much as the library says."""
    return _SEVERITIES.get(getattr(event, "severity", ""), "info")


class _Records(logging.Handler):
    """Turns records of Python's logging into events."""

    def __init__(self, emit: Emit) -> None:
        super().__init__()
        self._emit = emit

    def emit(self, record: logging.LogRecord) -> None:
        """Emit the record as an event; never raises."""
        try:
            message = record.getMessage()
        except Exception:  # noqa: BLE001  # a library that formats its own line wrongly
            message = f"{record.msg} {record.args!r}"
        trace = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""
        severity = record.levelname.lower()
        self._emit(LibraryLogged(logger=record.name, severity=severity, message=message, traceback=trace))


def _json(now: str, level: str, event: Event) -> bytes:
    return b"%b%b\n" % (_opening(now, level), _encoder.encode(event)[1:])


@lru_cache(maxsize=8)
def _opening(now: str, level: str) -> bytes:
    """How every line of one millisecond begins."""
    return f'{{"time":"{now}","level":"{level}",'.encode()


def _readable(now: str, level: str, event: Event) -> bytes:
    """`12:34:56.789 guest.claimed workload=thumbnail …`; long texts with line breaks go below, indented."""
    fields = msgspec.json.decode(_encoder.encode(event))
    words = [now[11:-1], *([level.upper()] if level != "info" else []), fields.pop("event")]
    below = []
    for name, value in fields.items():
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        if "\n" in text:
            below += [f"    {_plain(line)}" for line in text.splitlines()]
        else:
            words.append(f"{name}={text if text.isprintable() and ' ' not in text and text else _quoted(text)}")
    return "\n".join([" ".join(words), *below, ""]).encode("utf-8", "replace")


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode()


def _plain(line: str) -> str:
    """A line that cannot steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in line)
