"""Makes microVMs: boots them, captures warm ones as bases, and restores any number of clones from each."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import stat
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from substrate_node.fcvm import orphans
from substrate_node.fcvm.api import (
    BootSource,
    CreateSnapshot,
    Entropy,
    LoadSnapshot,
    MachineConfig,
    MemoryBackend,
    Pause,
    Request,
    RootDrive,
    Start,
    Vsock,
)
from substrate_node.fcvm.bundle import MEMORY, STATE, BadBase, Bundles, Inputs, Manifest, verify
from substrate_node.fcvm.cell import VSOCK, Cell, PlainCell
from substrate_node.fcvm.jail import JailedCell, readable_by_all, unreadable
from substrate_node.fcvm.launcher import MicroVm
from substrate_node.fcvm.outfit import Outfit
from substrate_node.fcvm.sparse import Sum
from substrate_node.offloop import off_loop
from substrate_node.vmm import Base, Guest, Inbound, Orphan, Vmm, VmmError
from substrate_seam.invocation import Isolation
from substrate_seam.workload import Workload, WorkloadSpec

KERNEL, INITRD, ROOTFS = "kernel", "initrd", "rootfs"
"""What lent files are called in every cell: a base records these names, wherever it is made and restored."""
GUEST_CID = 3
VCPUS_MAX = 32
_SPARE_DISK_MIB = 64
_ID = re.compile(r"[A-Za-z0-9-]{1,60}")


class FirecrackerVmm:
    """A `Vmm` whose guests are Firecracker's microVMs, each in a directory of `run`; its bases are in `bases`.

    Both are on one file system. Make it on the thread of the loop that runs it, and discard its guests within the block
    of its outfit.
    """

    contact_cap_s = 0.150  # the first connection after a restore may hang for ever (P-01)

    def __init__(self, outfit: Outfit, *, run: Path, bases: Path) -> None:
        self._outfit = outfit
        self._run = run
        self._bundles = Bundles(bases)
        self._guests: dict[str, MicroVm] = {}
        self.isolation = Isolation.MICROVM if outfit.jail is None else Isolation.MICROVM_JAILED

    async def sweep(self) -> tuple[Orphan, ...]:
        """Remove the guests that an earlier daemon left; once, holding the lock of the state root, before any boot."""
        return await orphans.sweep(self._run, self._outfit.jail.cgroups if self._outfit.jail is not None else None)

    async def sweep_bases(self, *, now_s: float) -> list[str]:
        """Remove the bases that nothing here can be restored from any more; returns why, for each that was whole.

        Call it when `sweep` may be called, with the time in seconds since 1970.
        """
        return await off_loop(partial(self._bundles.sweep, self._outfit.objection, now_s=now_s))

    def refusal(self, workload: Workload) -> str | None:
        """See `Vmm.refusal`; looks at the host's files, without waiting."""
        spec, rules = workload.spec, self._outfit.rules
        if spec.rootfs_path is None:
            return "a command runs in a process guest: a microVM needs a rootfs"
        if not self.isolation.satisfies(spec.isolation):
            return (
                f"it wants isolation {spec.isolation}, microVMs here have {self.isolation}: "
                "run the daemon as root, with Firecracker's jailer installed, to have them jailed"
            )
        if spec.vcpus > VCPUS_MAX:
            return f"it wants {spec.vcpus} vCPUs, a microVM has {VCPUS_MAX} at most"
        for file in filter(None, (rules.kernel, rules.initrd, Path(spec.rootfs_path))):
            if not os.access(file, os.R_OK):
                return f"{file} can't be read on this host: put it there, or name the right file"
            if self._outfit.jail is not None and not readable_by_all(file):
                return unreadable(file)
        return self._outfit.release.objection()

    async def input_key(self, workload: Workload) -> str | None:
        """See `Vmm.input_key`; reads a little of each file. None also when one can't be read."""
        inputs = self._inputs(workload.spec)
        return inputs.key if inputs is not None else None

    async def boot(self, workload: Workload, guest_id: str, inbound: Inbound, *, to_capture: bool = False) -> Guest:
        """See `Vmm.boot`; every guest can be captured."""
        spec, rules = workload.spec, self._outfit.rules
        refusal = self.refusal(workload)
        if refusal is not None:
            raise VmmError(f"boot: {refusal}")
        assert spec.rootfs_path is not None
        lent = {KERNEL: rules.kernel, ROOTFS: Path(spec.rootfs_path)}
        if rules.initrd is not None:
            lent[INITRD] = rules.initrd
        return await self._started(
            "boot",
            workload,
            guest_id,
            inbound,
            lent,
            MachineConfig(vcpu_count=spec.vcpus, mem_size_mib=spec.memory_mib),
            BootSource(
                kernel_image_path=KERNEL,
                boot_args=self._outfit.boot_args(spec),
                initrd_path=INITRD if rules.initrd is not None else None,
            ),
            RootDrive(path_on_host=ROOTFS),
            Vsock(guest_cid=GUEST_CID, uds_path=VSOCK),
            Entropy(),
            Start(),
        )

    async def capture(self, workload: Workload, guest: Guest, base_id: str) -> Base:
        """See `Vmm.capture`. Takes as long as writing and reading all of the guest's memory once."""
        machine, spec = self._guests.get(guest.guest_id), workload.spec
        inputs = self._inputs(spec)
        if machine is None or machine is not guest or inputs is None:
            raise VmmError(f"capture: guest {guest.guest_id} is no microVM of this monitor, or its files are gone")
        try:
            draft = await off_loop(self._draft, inputs.key, base_id, spec.memory_mib)
            await machine.ask(Pause(), CreateSnapshot(snapshot_path=STATE, mem_file_path=MEMORY))
            machine.kill()  # resumed, it would go on with the memory of its clones
            await asyncio.wait({machine.gone})
            describe = partial(self._manifest, spec, inputs, base_id)
            _check_snapshot(machine.root, spec.memory_mib)
            directory = await off_loop(self._publish, machine.root, draft, describe)
        except (VmmError, OSError) as error:
            raise VmmError(f"capture: {error}") from error
        return Base(base_id=base_id, input_key=inputs.key, directory=directory)

    async def adopt(self, workload: Workload) -> Base | None:
        """See `Vmm.adopt`. Reads the whole base, into the page cache too; one that is not what it was is removed.

        Raises `VmmError` with what is wrong with it.
        """
        inputs = self._inputs(workload.spec)
        directory = self._bundles.current(inputs.key) if inputs is not None else None
        if inputs is None or directory is None:
            return None
        try:
            await off_loop(verify, directory, inputs)
        except BadBase as why:
            await off_loop(self._bundles.discard, inputs.key, directory.name)
            raise VmmError(f"adopt: base {directory.name} is removed: {why}") from why
        return Base(base_id=directory.name, input_key=inputs.key, directory=directory)

    async def restore(self, workload: Workload, base: Base, guest_id: str, inbound: Inbound) -> Guest:
        """See `Vmm.restore`."""
        spec = workload.spec
        if base.directory is None or spec.rootfs_path is None:
            raise VmmError(f"restore: base {base.base_id} is none of a microVM")
        lent = {STATE: base.directory / STATE, MEMORY: base.directory / MEMORY, ROOTFS: Path(spec.rootfs_path)}
        load = LoadSnapshot(
            snapshot_path=STATE,
            mem_backend=MemoryBackend(backend_path=MEMORY),
            resume_vm=True,
            # Our guests are given the time. Others may know only the host's clock.
            clock_realtime=spec.guest == "go-shim" and self._outfit.moves_clocks,
        )
        return await self._started("restore", workload, guest_id, inbound, lent, load)

    async def discard(self, guest_id: str) -> None:
        """See `Vmm.discard`."""
        machine = self._guests.get(guest_id)
        if machine is not None:
            await machine.destroy()
            self._guests.pop(guest_id, None)

    async def discard_base(self, base: Base) -> None:
        """See `Vmm.discard_base`."""
        await off_loop(self._bundles.discard, base.input_key, base.base_id)

    async def _started(
        self,
        verb: str,
        workload: Workload,
        guest_id: str,
        inbound: Inbound,
        lent: Mapping[str, Path],
        *requests: Request,
    ) -> MicroVm:
        """Start a process for a guest and make requests of it, the last of which lets the guest run."""
        if not _ID.fullmatch(guest_id) or guest_id in self._guests:
            raise VmmError(f"{verb}: {guest_id!r} can't name a new guest; accepted are 60 letters, digits and '-'")
        cell = self._cell(workload.spec, guest_id)
        try:
            machine = MicroVm(guest_id, cell, self._outfit.release, lent=lent, inbound=inbound)
        except OSError as error:
            raise VmmError(f"{verb}: no process could be started for guest {guest_id}: {error}") from error
        self._guests[guest_id] = machine
        try:
            await machine.reach()
            await machine.ask(*requests)
        except VmmError as error:
            raise VmmError(f"{verb}: {error}") from error
        machine.hang_up()
        return machine

    def _cell(self, spec: WorkloadSpec, guest_id: str) -> Cell:
        rules, jail = self._outfit.rules, self._outfit.jail
        if jail is None:
            return PlainCell(self._run, guest_id, rules.firecracker, oom_score_adj=rules.oom_score_adj)
        return JailedCell(
            self._run,
            guest_id,
            rules.firecracker,
            jail,
            vcpus=spec.vcpus,
            memory_mib=spec.memory_mib,
            oom_score_adj=rules.oom_score_adj,
        )

    def _inputs(self, spec: WorkloadSpec) -> Inputs | None:
        try:
            return self._outfit.inputs(spec) if spec.rootfs_path is not None else None
        except OSError:
            return None

    def _draft(self, key: str, base_id: str, memory_mib: int) -> Path:
        free_mib = shutil.disk_usage(self._run).free // 2**20
        if free_mib < memory_mib + _SPARE_DISK_MIB:
            raise VmmError(f"a base of {memory_mib} MiB needs as much disk, and {free_mib} MiB are free at {self._run}")
        return self._bundles.draft(key, base_id)

    def _publish(self, source: Path, draft: Path, describe: partial[Manifest]) -> Path:
        for name in (STATE, MEMORY):
            (source / name).rename(draft / name)
        return self._bundles.publish(draft, describe)

    def _manifest(self, spec: WorkloadSpec, inputs: Inputs, base_id: str, state: Sum, memory: Sum) -> Manifest:
        rules = self._outfit.rules
        return Manifest(
            base_id=base_id,
            workload=spec.name,
            inputs=inputs,
            kernel_path=str(rules.kernel),
            initrd_path=str(rules.initrd) if rules.initrd is not None else None,
            rootfs_path=str(spec.rootfs_path),
            state=state,
            memory=memory,
        )


def _check_snapshot(root: Path, memory_mib: int) -> None:
    """See that the files are plain ones of their own: a Firecracker in a guest's power could leave links to others."""
    for name in (STATE, MEMORY):
        found = (root / name).lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise VmmError(f"Firecracker left no file of its own as {name}")
        if name == MEMORY and found.st_size != memory_mib * 2**20:
            raise VmmError(f"Firecracker left {found.st_size} bytes of a memory of {memory_mib} MiB")


if TYPE_CHECKING:
    _fits_vmm: type[Vmm] = FirecrackerVmm
    _fits_guest: type[Guest] = MicroVm
