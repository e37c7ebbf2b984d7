"""The monitor of process guests on this very host, for tests; it must leave nothing there."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Self

from node.vmm_contract import NOBODY, until_ready
from substrate_guest import isolation
from substrate_node.procvm import IsolationReport, ProcessVmm
from substrate_node.procvm.interpreter import Interpreter
from substrate_node.vmm import Base, Guest, Inbound
from substrate_seam.workload import Workload, WorkloadSpec

GUESTS = Path(__file__).parent / "guests"

_KNOWN: dict[str, tuple[IsolationReport, dict[str, Interpreter]]] = {}


class ProcessRig:
    """A monitor whose guests live in `run`, with what one must know to assert that nothing of them is left."""

    end_of_exit_3 = "exit status 3"

    def __init__(self, run: Path, *, python: str = sys.executable) -> None:
        run.mkdir(mode=0o700, parents=True)
        self.run = run
        self.python = python
        self.vmm = ProcessVmm(run, guest_argv=isolation.argv(python), python=python)
        self.workload = workload()
        self.refused = Workload.of(WorkloadSpec(name="vm", rootfs_path="/images/vm.ext4"))
        self._others = children()

    @classmethod
    @asynccontextmanager
    async def ready(cls, run: Path, *, python: str = sys.executable) -> AsyncIterator[Self]:
        """A rig that has probed the host; in the end it has no guest, and then nothing at all."""
        rig = cls(run, python=python)
        await rig.know_the_host()
        await rig.begin()
        yield rig
        assert not (left := rig.left()), f"left behind: {left}"
        await rig.end()
        assert not (left := ProcessRig.left(rig)), f"left behind: {left}"

    async def begin(self) -> None:
        """Have what guests are made of."""

    async def end(self) -> None:
        """Be without it again."""

    async def know_the_host(self) -> None:
        """Have the monitor probe it, which takes three guests; once for all monitors with this interpreter."""
        if self.python in _KNOWN:
            self.vmm._ready_groups()
            self.vmm._report, self.vmm._interpreters._known = _KNOWN[self.python]
        _KNOWN[self.python] = await self.vmm.probe(), self.vmm._interpreters._known

    def left(self) -> Collection[str]:
        """Directories and control groups of guests, and children of this process that it had not before."""
        return [*(path.name for path in self.run.iterdir()), *self.groups(), *(children() - self._others)]

    def groups(self) -> dict[str, Path]:
        """The control groups of guests, where this host gives them some, by guest."""
        parent = self.vmm._groups._parent if self.vmm._groups is not None else None
        return {group.name: group for group in parent.iterdir() if group.is_dir()} if parent is not None else {}


WARM = ("python", "-m", "substrate_guest", "serve", "warm:app")


class WarmRig(ProcessRig):
    """The same, with a workload that can be cloned."""

    def __init__(self, run: Path, *, python: str = sys.executable) -> None:
        super().__init__(run, python=python)
        self.workload = warm_workload()

    async def captured(self, base_id: str, **members: object) -> Base:
        """A base of the workload, or of one with other members."""
        workload = warm_workload(**members)
        source = await self.vmm.boot(workload, f"source-of-{base_id}", NOBODY, to_capture=True)
        try:
            await until_ready(source)
            return await self.vmm.capture(workload, source, base_id)
        finally:
            await self.vmm.discard(source.guest_id)


class CloneRig(WarmRig):
    """The same, with a monitor that restores a clone whenever it is to boot a guest: what it promises, clones keep."""

    def __init__(self, run: Path, *, python: str = sys.executable) -> None:
        super().__init__(run, python=python)
        self.vmm = _CloningVmm(run, guest_argv=isolation.argv(python), python=python)
        self._base: Base | None = None

    async def begin(self) -> None:
        """Have a base to restore from."""
        self._base = self.vmm.base = await self.captured("base")
        self._zygote = children() - self._others
        self._others |= self._zygote

    async def end(self) -> None:
        """Be without it again."""
        if self._base is not None:
            await self.vmm.discard_base(self._base)
            self._others -= self._zygote

    def left(self) -> Collection[str]:
        """What there is beside that base and the process that keeps it; a clone is no child of ours and has no file."""
        return [*(left for left in super().left() if left not in {"base", "source-of-base"}), *self.vmm._guests]


class _CloningVmm(ProcessVmm):
    base: Base

    async def boot(self, workload: Workload, guest_id: str, inbound: Inbound, *, to_capture: bool = False) -> Guest:
        if to_capture:
            return await super().boot(workload, guest_id, inbound, to_capture=True)
        return await self.restore(workload, self.base, guest_id, inbound)


def warm_workload(**members: object) -> Workload:
    """A workload that does what the obedient guest does, and has a warm start."""
    return workload(**{"name": "warm", "command": WARM, "warm_base": True, **members})


def workload(**members: object) -> Workload:
    """A workload that starts the obedient guest, with other members."""
    return Workload.of(
        WorkloadSpec(**{"name": "obedient", "command": ("python", "obedient.py"), "path": str(GUESTS), **members})
    )


def children() -> set[str]:
    """The children of this process: pid and command line."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # a thread may end meanwhile, or the child
            for pid in (task / "children").read_text().split():
                found.add(f"{pid}: {Path('/proc', pid, 'cmdline').read_text().replace(chr(0), ' ')}")
    return found


process_rig, warm_rig, clone_rig = ProcessRig.ready, WarmRig.ready, CloneRig.ready
