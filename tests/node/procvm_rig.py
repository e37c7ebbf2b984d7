"""The monitor of process guests on this very host, for tests; it must leave nothing there."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from substrate_guest import isolation
from substrate_node.procvm import ProcessVmm
from substrate_seam.workload import Workload, WorkloadSpec

GUESTS = Path(__file__).parent / "guests"


class ProcessRig:
    """A monitor whose guests live in `run`, with what one must know to assert that nothing of them is left."""

    end_of_exit_3 = "exit status 3"

    def __init__(self, run: Path, *, python: str = sys.executable) -> None:
        run.mkdir(mode=0o700, parents=True)
        self.run = run
        self.vmm = ProcessVmm(run, guest_argv=isolation.argv(python), python=python)
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
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # a thread may end meanwhile
            found += (task / "children").read_text().split()
    return found


@asynccontextmanager
async def process_rig(run: Path, *, python: str = sys.executable) -> AsyncIterator[ProcessRig]:
    """A rig that has probed the host, and in the end has no guest."""
    rig = ProcessRig(run, python=python)
    await rig.vmm.probe()
    yield rig
    assert not rig.left()
