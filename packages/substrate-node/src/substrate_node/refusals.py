"""What a call hears that gets no guest here. Nothing of it ran."""

from __future__ import annotations

from substrate_node.starter import Hosted, StartFailure
from substrate_seam.errors import GuestUnavailable, Reason
from substrate_seam.invocation import Isolation, Start


def draining(node_id: str) -> GuestUnavailable:
    """The node takes no new calls."""
    return GuestUnavailable(
        Reason.DRAINING,
        f"node {node_id!r} is draining and takes no new calls",
        hint="Retry; another node, or this one after its restart, will take it.",
        retry_after_s=1.0,
    )


def too_little_isolation(hosted: Hosted, node_id: str, least: Isolation | None) -> GuestUnavailable:
    """Its guest would be kept from the host less well than it demands."""
    return GuestUnavailable(
        Reason.INCOMPATIBLE,
        f"guests of {hosted.workload.name!r} on node {node_id!r} have isolation {hosted.vmm.isolation}, "
        f"and {least} was required",
        hint="Run the workload as a microVM, or ask for less with `fc-require-isolation`.",
    )


def too_big(hosted: Hosted, node_id: str, size_mib: int) -> GuestUnavailable:
    """Its guest would not fit this node even if it were empty."""
    spec = hosted.workload.spec
    return GuestUnavailable(
        Reason.MEMORY,
        f"a guest of {spec.name!r} needs {spec.memory_mib} MiB, and node {node_id!r} has {size_mib} MiB in all",
        hint="Give the node more memory, or lower `memMib` of the workload.",
    )


def slot_too_late(hosted: Hosted, within_s: float, *, starved: bool, retry_after_s: float) -> GuestUnavailable:
    """It waited in the queue for as long as it was given: for memory if it was `starved`, else for a slot."""
    spec = hosted.workload.spec
    what = f"the {spec.memory_mib} MiB of a guest of" if starved else "a slot of"
    return GuestUnavailable(
        Reason.MEMORY if starved else Reason.QUEUE_TIMEOUT,
        f"{what} {spec.name!r} did not come free within {within_s:.1f} s",
        hint=f"Retry in {retry_after_s:.0f} s.",
        retry_after_s=retry_after_s,
    )


def guest_too_late(name: str, within_s: float) -> GuestUnavailable:
    """It had a slot, and its guest took too long."""
    return GuestUnavailable(
        Reason.NOT_READY,
        f"no guest of {name!r} was ready within {within_s:.1f} s",
        hint=f"Raise `startTimeout` of {name!r} if it starts that slowly.",
    )


def no_start_at_hand(name: str, least: Start | None) -> GuestUnavailable:
    """It insists on a start that is as fast as `least`, and there is none."""
    return GuestUnavailable(
        Reason.INCOMPATIBLE,
        f"no {least} start of {name!r} is at hand",
        hint="Ask again without `fc-require-start`, or give the workload `warmBase` or a `pool`.",
    )


def no_start_succeeded(name: str, failure: StartFailure, *, only_restored: bool) -> GuestUnavailable:
    """Every way to start a guest failed, the last with `failure`."""
    return GuestUnavailable(
        Reason.RESTORE_FAILED if only_restored else Reason.BOOT_FAILED,
        f"no guest of {name!r} could be started: {failure}",
    )
