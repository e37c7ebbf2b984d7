"""What a daemon is at, at one moment: the answer of `GET /v1/live`, which the page and `fc-invoke top` draw.

Counts of calls are of the last `window_s` seconds; everything else is as it is now.
"""

from __future__ import annotations

from msgspec import Struct

from substrate_seam.invocation import Isolation


class Guests(Struct, frozen=True, kw_only=True):
    """Guests by what they are at; `making` are those being made ready for the pool."""

    starting: int = 0
    serving: int = 0
    parked: int = 0
    making: int = 0


class Traffic(Struct, frozen=True, kw_only=True):
    """Calls that ended, how their guests were started, and how long they took; None where there were none."""

    ended: int = 0
    failed: int = 0
    starts: dict[str, int] = {}
    p50_ms: float | None = None
    p99_ms: float | None = None


class Second(Struct, frozen=True, kw_only=True):
    """The calls that ended in one second."""

    ended: int = 0
    failed: int = 0
    p50_ms: float | None = None


class NodeNow(Struct, frozen=True, kw_only=True):
    """One node. `lost` says why it can't be heard, and then nothing else is known of it."""

    node: str
    lost: str = ""
    isolation: Isolation | None = None
    arch: str = ""
    size_mib: int = 0
    free_mib: int = 0
    draining: bool = False
    waiting: int = 0
    guests: Guests = Guests()


class WorkloadNow(Struct, frozen=True, kw_only=True):
    """One workload on all nodes together; its isolation is the weakest of any of them."""

    workload: str
    isolation: Isolation | None = None
    slots: int = 0
    busy: int = 0
    waiting: int = 0
    guests: Guests = Guests()
    warm_on: int = 0
    traffic: Traffic = Traffic()


class Failure(Struct, frozen=True, kw_only=True):
    """A call that went wrong. `reason` is empty when the guest itself answered with that status."""

    at_ms: int
    invocation_id: str
    workload: str
    status: int
    reason: str = ""
    ran: str = ""
    message: str = ""


class Trouble(Struct, frozen=True, kw_only=True):
    """Something an operator should know that is no call: a warning, a base that can't be built, a defect."""

    at_ms: int
    message: str
    hint: str = ""


class Snapshot(Struct, frozen=True, kw_only=True):
    """One daemon at one moment.

    `at_ms` is milliseconds since the epoch. `reasons` say why it takes no calls; `doors` what is open or weak by
    configuration. `seconds` are the last `window_s`, the present one last. `workloads` are the busiest;
    `workloads_left_off` counts the others. `turned_away` counts, by reason, requests that became no call.
    """

    daemon: str
    version: str
    at_ms: int
    up_s: float
    reasons: list[str]
    doors: list[str]
    window_s: int
    slots: int
    busy: int
    waiting: int
    guests: Guests
    traffic: Traffic
    seconds: list[Second]
    turned_away: dict[str, int]
    nodes: list[NodeNow]
    workloads: list[WorkloadNow]
    workloads_left_off: int
    failures: list[Failure]
    troubles: list[Trouble]
