"""The control group of one guest, on a host where guests have some."""

from __future__ import annotations

from msgspec.structs import replace

from substrate_node.offloop import off_loop
from substrate_node.processes.cgroups import ControlGroups
from substrate_node.vmm import Sample

_ROOM_MIN = 16


class GuestGroup:
    """The group of a guest in `groups`; without those, its methods do nothing. They raise `OSError`."""

    def __init__(self, groups: ControlGroups | None, guest_id: str, *, memory_mib: int, cpus: int) -> None:
        self._groups = groups
        self._guest_id = guest_id
        self._memory_mib = memory_mib
        self._cpus = cpus
        self._room = 0  # for so many clones

    @property
    def peak_mib(self) -> float | None:
        """See `ControlGroups.peak_mib`. Raises nothing."""
        return self._groups.peak_mib(self._guest_id) if self._groups is not None else None

    def sampled(self, sample: Sample, *, cloned: bool = False) -> Sample:
        """A sample with the peak of the whole group, where the kernel keeps one.

        What a clone has from its base counts as the base's: of one that is `cloned`, what was read is the least.
        """
        peak_mib = self.peak_mib
        if peak_mib is None or (cloned and sample.peak_mib is not None and sample.peak_mib > peak_mib):
            return sample
        return replace(sample, peak_mib=peak_mib)

    async def enter(self, pid: int) -> None:
        """Make it and have the guest's first process in it. Away from the loop: the kernel takes its time."""
        if self._groups is not None:
            await off_loop(self._groups.hold, self._guest_id, memory_mib=self._memory_mib, cpus=self._cpus)
            await off_loop(self._groups.enter, self._guest_id, pid)

    async def make_room(self, clones: int) -> None:
        """See that so many clones can be alive; asks the kernel seldom, for many more at a time."""
        if self._groups is not None and clones > self._room:
            self._room = max(_ROOM_MIN, 2 * clones)
            await off_loop(self._groups.make_room, self._guest_id, memory_mib=self._memory_mib, clones=self._room)

    async def remove(self) -> None:
        """Leave nothing of it, once the guest is dead. Removing what is not there succeeds."""
        if self._groups is not None:
            await off_loop(self._groups.remove, self._guest_id)
