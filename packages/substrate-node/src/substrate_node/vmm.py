"""What the node asks of a virtual machine monitor: make guests, and say when they end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Protocol, TypeVar

from msgspec import Struct

from substrate_seam.invocation import Isolation
from substrate_seam.workload import Workload

EGRESS_PORT = 1025
DATA_PORT = 1027
CONTROL_PORT = 1028
JOURNAL_PORT = 1029
SAID_CHARACTERS_MAX = 4096
"""So much of a console goes into an error: a traceback of a few dozen frames."""

P = TypeVar("P", bound=asyncio.Protocol)

Inbound = Mapping[int, Callable[[], asyncio.Protocol]]
"""Who answers when a guest dials out: a protocol for each vsock port of the host. Other ports are refused."""


class VmmError(Exception):
    """A verb of the monitor failed; the message says which, why, and what the guest's console said last.

    Whatever the verb had begun is undone by `discard`.
    """


class NotCapturable(VmmError):
    """The workload is of a kind that no base can be made of; the message says what it holds against that.

    Trying again is of no use.
    """


class BaseGone(VmmError):
    """Nothing will ever be restored from the base again."""


class Exit(Struct, frozen=True):
    """How a guest ended: in words (`exit status 3`, `killed by SIGKILL`), and the last lines of its console.

    `peak_mib` is what its largest process took at once, those counted that had ended; None where that is not told.
    """

    words: str
    console: str = ""
    peak_mib: float | None = None

    @property
    def told(self) -> str:
        """Both as callers and operators are told: a console of several lines begins on a line of its own."""
        said = self.console.strip()
        if len(said) > SAID_CHARACTERS_MAX:
            tail = said[-SAID_CHARACTERS_MAX:]
            said = "…" + (tail.partition("\n")[2] or tail)
        if not said:
            return self.words
        return f"{self.words} after saying:{chr(10) if chr(10) in said else ' '}{said}"


class Sample(Struct, frozen=True):
    """What a guest has used so far; None where the host does not tell."""

    cpu_ms: float | None
    peak_mib: float | None


class Orphan(Struct, frozen=True):
    """What an earlier daemon left and is gone now; `pid` is set if its process still ran."""

    guest_id: str
    pid: int | None


class Guest(Protocol):
    """A running guest. Whoever holds it owns it, and hands it to `Vmm.discard` in the end."""

    @property
    def guest_id(self) -> str:
        """The id its owner chose."""
        ...

    @property
    def exited(self) -> asyncio.Future[Exit]:
        """Done as soon as the guest has ended, however it did. Never cancelled by its owner."""
        ...

    @property
    def gone(self) -> asyncio.Future[Exit] | asyncio.Future[None]:
        """Done when no process of it is left either, which may be a moment later. Never cancelled by its owner."""
        ...

    async def dial(self, protocol: Callable[[], P]) -> P:
        """Connect to the guest's hybrid vsock socket; the protocol then writes `CONNECT <port>` itself.

        Raises `OSError` when nobody listens: no byte has reached the guest then.
        """
        ...

    @property
    def console(self) -> str:
        """The end of what it has written to its console so far."""
        ...

    def sample(self) -> Sample:
        """Read what the guest has used, without waiting; best effort."""
        ...

    def kill(self) -> None:
        """End a running guest, without waiting: `gone` tells when that is done. Killing a dead guest succeeds."""
        ...


class Base(Struct, frozen=True, kw_only=True):
    """A captured warm guest that new guests are restored from.

    `base_id` is unique to the capture, `input_key` to what it was made of; `directory` holds its files, if any.
    """

    base_id: str
    input_key: str
    directory: Path | None = None


def boot_id_of(guest_id: str) -> str:
    """The boot id of a guest: made of its id, which no other guest has, so that all who tell it say the same."""
    digits = sha256(b"boot id of " + guest_id.encode()).hexdigest()
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-8{digits[17:20]}-{digits[20:32]}"


class Vmm(Protocol):
    """Makes guests of one kind. Ids are chosen by the caller, so that every undo can be named in advance."""

    @property
    def isolation(self) -> Isolation:
        """How well its guests are kept from the host."""
        ...

    @property
    def contact_cap_s(self) -> float | None:
        """How long one first attempt to reach a guest may hang before another is made.

        None when a connection waits patiently until the guest serves, so that one attempt is enough.
        """
        ...

    def refusal(self, workload: Workload) -> str | None:
        """Why this monitor can't run the workload on this host, and what would help; None if it can."""
        ...

    async def input_key(self, workload: Workload) -> str | None:
        """What a base of this workload is made of, as a digest of contents; None if it has no warm start."""
        ...

    async def boot(self, workload: Workload, guest_id: str, inbound: Inbound, *, to_capture: bool = False) -> Guest:
        """Start a guest cold. It runs when this returns, but need not serve yet. Raises `VmmError`.

        One that is started `to_capture` need not serve requests at all.
        """
        ...

    async def capture(self, workload: Workload, guest: Guest, base_id: str) -> Base:
        """Make a base of a ready guest that was started to be captured.

        The guest is used up: it must be discarded whatever comes of this. The base is published whole or not at all.
        Raises `VmmError`, and `NotCapturable` where every other guest of the workload would fail too.
        """
        ...

    async def adopt(self, workload: Workload) -> Base | None:
        """The base that an earlier daemon left and that still matches the workload, if there is one."""
        ...

    async def restore(self, workload: Workload, base: Base, guest_id: str, inbound: Inbound) -> Guest:
        """Start a guest from a base. It does not know yet that it is a clone. Raises `VmmError`, and `BaseGone`."""
        ...

    async def discard(self, guest_id: str) -> None:
        """Leave nothing of a guest: process, sockets, mounts, files. Discarding what never was succeeds."""
        ...

    async def discard_base(self, base: Base) -> None:
        """Leave nothing of a base. Guests restored from it live on."""
        ...
