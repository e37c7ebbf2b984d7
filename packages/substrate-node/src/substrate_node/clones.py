"""Whether the clones of a workload are different guests, as each of them tells."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
from msgspec import Struct

from substrate_node.node import LocalNode
from substrate_node.ready import Contact, NotReady
from substrate_node.starter import StartFailure
from substrate_seam.workload import Workload

AT_ONCE = 8
SKEW_MS_MAX = 10.0
"""So far the wall clock of a clone may be from the host's."""
_FACTS_WITHIN_S = 10.0


class Fingerprint(Struct, frozen=True):
    """What a guest of ours says it draws, and is; see `substrate_guest.fingerprint`."""

    random: int
    uuid1: str
    uuid4: str
    urandom: str
    openssl: str | None
    """None where there is no OpenSSL."""
    temporary: str
    hostname: str
    boot_id: str
    epoch_ns: int


FACTS = tuple(name for name in Fingerprint.__struct_fields__ if name != "epoch_ns")


class CannotVerify(Exception):
    """There was nothing to compare; the message says why."""


class ClonesReport(Struct, frozen=True, kw_only=True):
    """What came of comparing clones: for each fact how many of them shared theirs with another, and the worst clock."""

    clones: int
    shared: dict[str, int]
    skew_ms_max: float

    @property
    def good(self) -> bool:
        """Whether they are different guests that know the time."""
        return not any(self.shared.values()) and self.skew_ms_max <= SKEW_MS_MAX

    def __str__(self) -> str:
        lines = [f"{self.clones} clones"]
        for fact, count in self.shared.items():
            lines.append(
                f"{'NO ' if count else 'yes'}  {fact}: " + (f"{count} share theirs" if count else "all differ")
            )
        late = self.skew_ms_max > SKEW_MS_MAX
        lines.append(f"{'NO ' if late else 'yes'}  wall clock: within {self.skew_ms_max:.1f} ms of the host's")
        return "\n".join(lines)


async def verify_clones(
    node: LocalNode, workload: Workload, *, clones: int, wall_ns: Callable[[], int]
) -> ClonesReport:
    """Restore so many clones of a workload and compare what they say of themselves, and their clocks with `wall_ns`.

    Some are alive at once, as many as the node has memory for. Raises `GuestUnavailable` if the node can't run the
    workload, and `CannotVerify`.
    """
    await node.ensure(workload)
    told: list[tuple[Fingerprint, float]] = []
    left = iter(range(clones))

    async def compare_some() -> None:
        for _ in left:
            told.append(await _told(node, workload, wall_ns))  # noqa: PERF401  # several tasks take turns at it

    try:
        async with asyncio.TaskGroup() as at_once:
            for _ in range(min(AT_ONCE, clones)):
                at_once.create_task(compare_some())
    except* (StartFailure, NotReady, OSError, TimeoutError, msgspec.MsgspecError) as failures:
        raise CannotVerify(f"a clone of {workload.name!r} could not be asked: {failures.exceptions[0]}") from failures
    shared = {fact: _shared([getattr(fingerprint, fact) for fingerprint, _ in told]) for fact in FACTS}
    return ClonesReport(clones=len(told), shared=shared, skew_ms_max=max((skew for _, skew in told), default=0.0))


def _shared(values: list[object]) -> int:
    """How many values are one that was there before."""
    known = [value for value in values if value is not None]
    return len(known) - len(set(known))


async def _told(node: LocalNode, workload: Workload, wall_ns: Callable[[], int]) -> tuple[Fingerprint, float]:
    """What one clone says, and how far its clock is from ours at least, in milliseconds."""
    async with node.restored(workload.digest) as guest, asyncio.timeout(_FACTS_WITHIN_S):
        before_ns = wall_ns()
        body = await Contact(guest).told("/shim/fingerprint")
        after_ns = wall_ns()
    fingerprint = msgspec.json.decode(body, type=Fingerprint)
    off_ns = max(before_ns - fingerprint.epoch_ns, fingerprint.epoch_ns - after_ns, 0)
    return fingerprint, off_ns / 1e6
