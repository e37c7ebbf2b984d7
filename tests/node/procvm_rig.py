"""The monitor of process guests on this very host, for tests; it must leave nothing there."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

from substrate_guest import isolation
from substrate_node.procvm import ProcessVmm
from substrate_seam.workload import Workload, WorkloadSpec

GUESTS = Path(__file__).parent / "guests"


class ProcessRig:
    """A monitor whose guests live in `run`, with what one must know to assert that nothing of them is left."""

    def __init__(self, run: Path) -> None:
        run.mkdir(mode=0o700, parents=True)
        self.run = run
        self.vmm = ProcessVmm(run, guest_argv=isolation.argv(sys.executable))
        self.workload = workload()
        self.refused = Workload.of(WorkloadSpec(name="vm", rootfs_path="/images/vm.ext4"))

    def left(self) -> Collection[str]:
        """Directories of guests, and children of this process."""
        return [*(path.name for path in self.run.iterdir()), *children()]


def workload(**members: object) -> Workload:
    """A workload that starts the obedient guest, with other members."""
    return Workload.of(
        WorkloadSpec(**{"name": "obedient", "command": ("python", "obedient.py"), "path": str(GUESTS), **members})
    )


def children() -> list[str]:
    """The pids of the children of this process."""
    return [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


def descriptors() -> set[str]:
    """What this process has open, but for the directory that tells."""
    open_now = {str(path): path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    return {f"{path} {target}" for path, target in open_now.items()}


@asynccontextmanager
async def process_rig(run: Path) -> AsyncIterator[ProcessRig]:
    """A rig that has probed the host, and in the end has no guest, child or descriptor more than before."""
    rig = ProcessRig(run)
    await rig.vmm.probe()
    await rig.vmm._interpreters.get(sys.executable)
    before = descriptors()
    yield rig
    assert not rig.left()
    assert descriptors() <= before
