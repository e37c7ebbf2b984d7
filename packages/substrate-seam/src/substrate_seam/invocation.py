"""One invocation as it crosses the seam, and the reply that comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from enum import StrEnum

from msgspec import Struct

Headers = tuple[tuple[bytes, bytes], ...]
"""Header fields in order, names in lower case, values as received."""


class Isolation(StrEnum):
    """How well a guest is kept from its host; later members are stronger."""

    PROCESS = "process"
    MICROVM = "microvm"
    MICROVM_JAILED = "microvm-jailed"

    @property
    def strength(self) -> int:
        """Its place among the others; more is stronger."""
        return _STRENGTH[self]

    def satisfies(self, least: Isolation | None) -> bool:
        """Whether this isolation is at least as strong as `least`."""
        return least is None or self.strength >= least.strength


class Start(StrEnum):
    """How the guest of an invocation came to be; later members are faster."""

    COLD = "cold"
    WARM = "warm"
    POOL = "pool"

    def satisfies(self, least: Start | None) -> bool:
        """Whether this start is at least as fast as `least`."""
        return least is None or _SPEED[self] >= _SPEED[least]


_STRENGTH = {isolation: place for place, isolation in enumerate(Isolation)}
_SPEED = {start: place for place, start in enumerate(Start)}


class WorkloadRef(Struct, frozen=True):
    """The workload of an invocation: its name for people, its digest for nodes."""

    name: str
    digest: str


class Demands(Struct, frozen=True, omit_defaults=True):
    """What a caller insists on: rather an error than less."""

    isolation: Isolation | None = None
    start: Start | None = None


class GuestRequest(Struct, frozen=True):
    """The one HTTP request a guest gets. A value: bounded, complete, so it can be placed again elsewhere.

    `target` is the origin-form request target in ASCII; `headers` are those meant for the guest, without framing.
    """

    method: str
    target: str
    headers: Headers
    body: bytes


class Trace(Struct, frozen=True, omit_defaults=True):
    """W3C trace context of the caller, passed on as received."""

    parent: str
    state: str = ""


class Invocation(Struct, frozen=True, kw_only=True):
    """One call of one workload.

    `id` is 32 hex digits minted at ingress; `attempt` counts placements from 1. `start_within_s` bounds everything
    before the request is written to a guest (passing it means that nothing ran), `run_within_s` the exchange.
    Both are remaining seconds.
    """

    id: str
    attempt: int
    workload: WorkloadRef
    session: str | None
    caller: str
    demands: Demands
    request: GuestRequest
    start_within_s: float
    run_within_s: float
    trace: Trace | None = None


class Started(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How an invocation got its guest: milliseconds of each phase, and where it runs.

    `cpu_ms` and `peak_mib` are known this early only if the whole reply was there in the first read.
    """

    queue_ms: float
    claim_ms: float
    ready_ms: float
    start: Start
    node: str
    guest: str
    isolation: Isolation
    base: str | None = None
    cpu_ms: float | None = None
    peak_mib: float | None = None


class Receipt(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an invocation used. A number that could not be measured is None, never 0.

    `guest_ms` runs from the first byte of the request to the last of the reply.
    """

    guest_ms: float
    body_bytes: int
    cpu_ms: float | None = None
    peak_mib: float | None = None
    egress_bytes: int | None = None
    base: str | None = None


class Reply:
    """The answer of a guest that still lives: head now, body chunk by chunk, receipt when the body has ended.

    Reading `body` raises `GuestFailed` or `GuestTimeout` when the guest does not finish it; a body that ends without
    an error is whole.
    """

    __slots__ = ("body", "headers", "receipt", "started", "status")

    def __init__(self, *, started: Started, status: int, headers: Headers, body: AsyncIterator[bytes]) -> None:
        self.started = started
        self.status = status
        self.headers = headers
        self.body = body
        self.receipt: Receipt | None = None
