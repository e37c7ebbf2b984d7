"""The node's one account of memory: whatever runs, is parked or is being built holds a lease on it."""

from __future__ import annotations

from collections.abc import Callable


class Lease:
    """Some MiB of the node, until released. Releasing twice is releasing once."""

    __slots__ = ("_ledger", "mib")

    def __init__(self, ledger: Ledger, mib: int) -> None:
        self._ledger: Ledger | None = ledger
        self.mib = mib

    def release(self) -> None:
        """Give the memory back."""
        ledger, self._ledger = self._ledger, None
        if ledger is not None:
            ledger._return(self.mib)  # noqa: SLF001  # the two halves of one account


class Ledger:
    """Counts MiB against the node's size. Lowering the size takes nothing away: it stops new leases until it fits."""

    def __init__(self, size_mib: int, *, freed: Callable[[], None] = lambda: None) -> None:
        self.size_mib = size_mib
        self.committed_mib = 0
        self._freed = freed

    @property
    def free_mib(self) -> int:
        """What may still be leased."""
        return max(0, self.size_mib - self.committed_mib)

    def reserve(self, mib: int) -> Lease | None:
        """Lease `mib` MiB, or None if they are not free now."""
        if self.committed_mib + mib > self.size_mib:
            return None
        self.committed_mib += mib
        return Lease(self, mib)

    def resize(self, size_mib: int) -> None:
        """Set the node's size."""
        self.size_mib = size_mib
        self._freed()

    def _return(self, mib: int) -> None:
        self.committed_mib -= mib
        self._freed()
