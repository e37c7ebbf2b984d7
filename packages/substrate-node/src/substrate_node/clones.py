"""Whether the clones of a workload are different guests, as each of them tells."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
from msgspec import Struct

from substrate_node.node import LocalNode
from substrate_node.ready import Contact, NotReady
from substrate_node.starter import StartFailure
from substrate_seam.errors import GuestUnavailable
from substrate_seam.workload import Workload

AT_ONCE = 8
CLOCK_MS_MAX = 10.0
"""So far the wall clock of a clone may be from the host's."""
_FACTS_WITHIN_S = 30.0


class Fingerprint(Struct, frozen=True, kw_only=True):
    """What a guest of ours says it draws, and is; see `substrate_guest.fingerprint`. None: it has none."""

    random: int
    uuid1: str
    uuid4: str
    urandom: str
    openssl: str | None = None
    temporary: str
    hostname: str
    machine_id: str | None = None
    boot_id: str
    epoch_ns: int


FACTS = {
    "random": "random.getrandbits",
    "uuid1": "uuid.uuid1",
    "uuid4": "uuid.uuid4",
    "urandom": "os.urandom",
    "openssl": "OpenSSL's random bytes",
    "temporary": "names of temporary files",
    "hostname": "host name",
    "machine_id": "/etc/machine-id",
    "boot_id": "boot id",
}
"""What must differ, and how people call it."""


class CannotVerify(Exception):
    """There was nothing to compare; the message says why."""


class ClonesReport(Struct, frozen=True, kw_only=True):
    """What came of comparing clones.

    For each fact how many of them have one that another told before (None: no clone has the fact at all), the clock
    that is farthest from the host's, and how far it may be.
    """

    clones: int
    shared: dict[str, int | None]
    clock_ms: float
    clock_ms_max: float

    @property
    def good(self) -> bool:
        """Whether they are different guests that know the time."""
        return not any(self.shared.values()) and self.clock_ms <= self.clock_ms_max

    def __str__(self) -> str:
        rows = [(not count, FACTS[fact], self._words(count)) for fact, count in self.shared.items()]
        clock = f"at most {self.clock_ms:.1f} ms from the host's; {self.clock_ms_max:g} ms are accepted"
        rows.append((self.clock_ms <= self.clock_ms_max, "wall clock", clock))
        width = max(len(name) for _, name, _ in rows)
        return "\n".join(f"{'yes' if well else 'NO '}  {name:<{width}}  {words}" for well, name, words in rows)

    def _words(self, shared: int | None) -> str:
        if shared is None:
            return "no clone has one"
        return f"{shared} of {self.clones} have one that another has too" if shared else f"all {self.clones} differ"


async def verify_clones(
    node: LocalNode,
    workload: Workload,
    *,
    clones: int,
    wall_ns: Callable[[], int],
    clock_ms_max: float = CLOCK_MS_MAX,
    progress: Callable[[int], None] = lambda _: None,
) -> ClonesReport:
    """Restore so many clones of a workload and compare what they say of themselves, and their clocks with `wall_ns`.

    The table need not want warm starts of it. Some are alive at once, as many as the node has memory for; `progress`
    hears how many have told. Raises `CannotVerify`.
    """
    if workload.spec.guest != "substrate":
        raise CannotVerify(f"{workload.name!r} has a guest that tells nothing of itself: only those of our shim do")
    workload = Workload.of(msgspec.structs.replace(workload.spec, warm_base=True, pool=0))
    told: list[tuple[Fingerprint, float]] = []
    failures: list[Exception] = []
    left = iter(range(clones))

    async def compare_some() -> None:
        for _ in left:
            if failures:
                return
            try:
                told.append(await _told(node, workload, wall_ns))
            except (StartFailure, NotReady, OSError, msgspec.MsgspecError) as error:  # and `TimeoutError`
                failures.append(error)
            progress(len(told))

    try:
        await node.ensure(workload)
    except GuestUnavailable as refusal:
        raise CannotVerify(f"{refusal.message} {refusal.hint}".strip()) from refusal
    async with asyncio.TaskGroup() as at_once:
        for _ in range(min(AT_ONCE, clones)):
            at_once.create_task(compare_some())
    if failures:
        why = str(failures[0]) or f"no answer came within {_FACTS_WITHIN_S:.0f} s"
        raise CannotVerify(f"no clone of {workload.name!r} can be asked: {why}") from failures[0]
    return ClonesReport(
        clones=len(told),
        shared={fact: _shared([getattr(fingerprint, fact) for fingerprint, _ in told]) for fact in FACTS},
        clock_ms=max((off_ms for _, off_ms in told), default=0.0),
        clock_ms_max=clock_ms_max,
    )


def _shared(values: list[object]) -> int | None:
    """How many values are one that was there before; None where there is no value."""
    known = [value for value in values if value is not None]
    return len(known) - len(set(known)) if known else None


async def _told(node: LocalNode, workload: Workload, wall_ns: Callable[[], int]) -> tuple[Fingerprint, float]:
    """What one clone says, and how far its clock is from ours at least, in milliseconds."""
    async with node.restored(workload.digest) as guest, asyncio.timeout(_FACTS_WITHIN_S):
        before_ns = wall_ns()
        body = await Contact(guest).told("/shim/fingerprint")
        after_ns = wall_ns()
    fingerprint = msgspec.json.decode(body, type=Fingerprint)
    off_ns = max(before_ns - fingerprint.epoch_ns, fingerprint.epoch_ns - after_ns, 0)
    return fingerprint, off_ns / 1e6
