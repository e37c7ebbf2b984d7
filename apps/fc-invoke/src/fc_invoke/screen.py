"""What a developer sees of the calls of a workload: a line for each, what its guest printed, and what went wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TextIO

from substrate_seam import events
from substrate_seam.events import Event
from substrate_service.address import Address
from substrate_service.logs import LibraryLogged

_SAYING = " after saying:"

WELCOME = """\
{target} of {path}: each call runs in a process guest of its own (no security boundary)

  curl -d '{{}}' http://{public}/invoke/{name}
  curl http://{public}/http/{name}/           any method and path

Why a call did what it did: fc-invoke explain ID{at}. Save a file, and the next call runs it. Ctrl-C stops.
"""


class Screen:
    """An `Emit` that tells a developer what matters to one, on `out`."""

    def __init__(self, target: str, out: TextIO = sys.stdout) -> None:
        self._target = target
        self._out = out
        self._trouble = ""

    def welcome(self, name: str, path: Path, addresses: list[Address]) -> None:
        """Say how to call it."""
        public, admin = map(str, addresses)
        at = "" if admin == "127.0.0.1:8081" else f" --admin-url http://{admin}"
        self._say(WELCOME.format(target=self._target, path=path, public=public, name=name, at=at))

    def __call__(self, event: Event) -> None:
        """Tell what a developer wants to know of; most events are none of it."""
        match event:
            case events.InvocationEnded():
                self._tell_call(event)
            case events.CallRefused():
                self._say(_line(event.status, event.reason, 0.0, event.invocation_id))
                self._say(f"    {event.message}")
            case events.GuestGone() if event.console:
                self._say(_indented(event.console, "  | "))
            case events.BaseBuilt():
                self._trouble = ""
                self._say(f"ready: calls start warm from the files as they are now (primed in {event.build_ms:.0f} ms)")
            case events.BaseFailed():
                self._tell_trouble(event.message)
            case events.WarningRaised() if event.message:
                self._say(f"note: {event.message}")
            case events.DefectFound() | events.CleanupFailed() | LibraryLogged():
                self._say(f"note: {event.message}")
            case _:
                pass

    def _tell_call(self, ended: events.InvocationEnded) -> None:
        outcome = ended.start or "" if ended.reason is None else f"{ended.reason}, ran: {ended.ran}"
        if ended.client_left:
            outcome = "caller left"
        self._say(_line(ended.status, outcome, ended.total_ms, ended.invocation_id))
        if ended.reason is not None:
            self._tell_trouble(ended.message)

    def _tell_trouble(self, message: str) -> None:
        """Show what is wrong once, however often it is met."""
        before, saying, said = message.partition(_SAYING)
        trouble = said.strip() if saying else before
        if not (self._trouble and trouble.endswith(self._trouble)):
            self._trouble = trouble
            self._say(_indented(f"{self._target} does not start:\n{trouble}" if saying else trouble, "  ! "))

    def _say(self, text: str) -> None:
        print(text, file=self._out, flush=True)


def _line(status: int, outcome: str, total_ms: float, invocation_id: str) -> str:
    return f"{status:>3}  {outcome:<12} {total_ms:>9.1f} ms  {invocation_id}"


def _indented(text: str, margin: str) -> str:
    return "\n".join(margin + line for line in text.splitlines())
