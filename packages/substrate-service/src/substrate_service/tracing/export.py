"""Sending spans in the background: in batches, by a thread of its own, which nobody waits for but the daemon's end."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from substrate_service.tracing.spans import Span

QUEUE_MAX: Final = 8192
"""Spans that wait to be sent; what comes when so many do is dropped, counted and told."""
_BATCH_MAX: Final = 512
_DELAY_S: Final = 1.0
_SEND_WITHIN_S: Final = 10.0
_PAUSE_S_MIN, _PAUSE_S_MAX = 1.0, 30.0
FLUSH_WITHIN_S: Final = 5.0
"""What is still unsent when the daemon ends has so long."""


class NotSent(Exception):
    """A batch did not arrive; the message says why."""


class Line(Protocol):
    """A way to a collector."""

    def send(self, spans: list[Span], *, within_s: float) -> None:
        """Send a batch. Raises `NotSent`."""
        ...

    def close(self) -> None:
        """End it, and whatever is being sent."""
        ...


class Exporter:
    """Takes spans at once, from the event loop, and sends them in its own time.

    `open_line` is called in the thread. A collector that can't be reached is told of once, by `warn`, until it can.
    """

    def __init__(self, open_line: Callable[[], Line], *, warn: Callable[[str], None]) -> None:
        self._open_line = open_line
        self._warn = warn
        self._waiting: deque[Span] = deque()
        self._dropped = 0
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._close_by_s = float("inf")
        self._line: Line | None = None
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="send-traces", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def put(self, span: Span) -> None:
        """Send a span soon; never waits."""
        if len(self._waiting) >= QUEUE_MAX:
            self._dropped += 1
            return
        self._waiting.append(span)
        if len(self._waiting) >= _BATCH_MAX:
            self._wake.set()

    def close(self, *, within_s: float = FLUSH_WITHIN_S) -> None:
        """Send what waits, for at most so many seconds; what is left is dropped and told."""
        self._close_by_s = time.monotonic() + within_s
        self._closing.set()
        self._wake.set()
        self._thread.join(within_s)
        if self._line is not None:
            self._line.close()
        if lost := len(self._waiting) + self._dropped:
            self._warn(f"{lost} spans were not sent")

    def _run(self) -> None:
        try:
            self._line = line = self._open_line()
        except Exception as error:  # noqa: BLE001  # whatever it is, a daemon without traces goes on
            self._warn(f"traces are not sent: {error}")
            self._waiting = deque(maxlen=0)
            return
        pause_s = _DELAY_S
        while not (self._closing.is_set() and not self._waiting) and time.monotonic() < self._close_by_s:
            self._wake.wait(0.0 if self._closing.is_set() else pause_s)
            self._wake.clear()
            last = self._closing.is_set()
            sent = self._send_all(line)
            if last and not sent:
                return
            pause_s = _DELAY_S if sent else min(max(2 * pause_s, _PAUSE_S_MIN), _PAUSE_S_MAX)

    def _send_all(self, line: Line) -> bool:
        """Send what waits; false if it could not be."""
        while self._waiting and time.monotonic() < self._close_by_s:
            batch = [self._waiting[at] for at in range(min(len(self._waiting), _BATCH_MAX))]
            try:
                line.send(batch, within_s=min(_SEND_WITHIN_S, max(0.1, self._close_by_s - time.monotonic())))
            except NotSent as error:
                if not self._failing:
                    self._failing = True
                    self._warn(f"traces are not sent for now: {error}")
                return False
            self._failing = False
            for _ in batch:
                self._waiting.popleft()
        return True
