"""What a node says about itself, and what it is told about its size."""

from __future__ import annotations

from msgspec import Struct

from substrate_seam.invocation import Isolation


class WorkloadReport(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One workload on one node: slots, waiters, and what would make its next start fast.

    Of the `busy` calls, `serving` have their guest; the others' are being started. `parked` guests are ready for calls
    to come, `making` more are being made so. `service_ms` is the measured time a slot is held, None before the first
    call has ended.
    """

    name: str
    concurrency: int
    busy: int = 0
    serving: int = 0
    waiting: int = 0
    parked: int = 0
    making: int = 0
    isolation: Isolation | None = None
    base: str | None = None
    service_ms: float | None = None


class NodeReport(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A photograph of one node. `workloads` is keyed by digest; None retracts one that the node has dropped.

    A report with `full` set replaces everything known of the node; the others carry only what changed. `boot_id`
    changes with every start of the daemon: whatever was known of an earlier one is void.
    """

    node_id: str
    boot_id: str
    size_mib: int
    free_mib: int
    isolation: Isolation
    arch: str
    full: bool = False
    pod_uid: str | None = None
    workloads: dict[str, WorkloadReport | None] = {}
    features: tuple[str, ...] = ()
    limits_generation: int = 0
    draining: bool = False
    drain_within_s: float | None = None


class NodeLimits(Struct, frozen=True, kw_only=True):
    """The size a node may use. A `generation` lower than the one in force is ignored: reports echo the latter."""

    generation: int
    memory_mib: int
