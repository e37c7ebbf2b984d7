"""Real microVMs for tests: Firecracker, a guest kernel and KVM of this machine, and a guest made for the contract."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

from fakes.images import folder, layer
from node.fcvm import machine_guest
from node.images.rig import built
from node.procvm_rig import children
from real_parts import is_present
from substrate_guest import tree
from substrate_guest.launcher import launcher
from substrate_node.fcvm import FirecrackerVmm, MicroVmRules, outfitted
from substrate_node.ready import Contact, NotReady
from substrate_node.vmm import Base, Guest, Inbound
from substrate_seam.workload import Workload, WorkloadSpec

MEMORY_MIB = 256
BOOTS_WITHIN_S = 900.0  # an emulated machine is slow


def rules() -> MicroVmRules:
    """What the environment names; a test that was asked for and can't have it fails, and says what is missing."""
    named = {name: os.environ.get(name) for name in ("FC_INVOKE_FIRECRACKER_BIN", "FC_INVOKE_KERNEL_IMAGE")}
    missing = [f"{name} names no file" for name, path in named.items() if not path or not Path(path).is_file()]
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        missing.append("/dev/kvm can't be used: run as a user of it, on a host or in an emulated machine that has it")
    if missing:
        pytest.fail(f"real microVMs can't be had here: {'; '.join(missing)}", pytrace=False)
    firecracker, kernel = (Path(str(path)).absolute() for path in named.values())
    return MicroVmRules(firecracker=firecracker, kernel=kernel)


def guest_rootfs(where: Path) -> Path:
    """A root file system whose first process is `machine_guest`."""
    extra = where / "extra"
    extra.mkdir()
    tree.guest_tree(extra)
    shutil.copy(Path(str(machine_guest.__file__)), extra / "site" / "machine_guest.py")
    command = [
        part.replace("from substrate_guest import init; init.main()", "import machine_guest; machine_guest.main()")
        for part in tree.command()
    ]
    assert command != tree.command()
    (extra / "init").write_bytes(launcher(command))
    folders = ("dev", "proc", "sys", "run", "tmp", "etc")
    rootfs = built(where, layer(*map(folder, folders)), extra=extra).rootfs
    rootfs.chmod(0o644)
    return rootfs


class PatientVmm:
    """The monitor, for tests that talk to a guest as soon as it runs: these wait until it serves."""

    def __init__(self, vmm: FirecrackerVmm) -> None:
        self._vmm = vmm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vmm, name)

    async def boot(self, workload: Workload, guest_id: str, inbound: Inbound, *, to_capture: bool = False) -> Guest:
        """Start a guest cold, and wait."""
        guest = await self._vmm.boot(workload, guest_id, inbound, to_capture=to_capture)
        return await self._serving(guest, workload)

    async def restore(self, workload: Workload, base: Base, guest_id: str, inbound: Inbound) -> Guest:
        """Start a clone, and wait."""
        return await self._serving(await self._vmm.restore(workload, base, guest_id, inbound), workload)

    async def _serving(self, guest: Guest, workload: Workload) -> Guest:
        contact = Contact(guest)
        try:
            await contact.wait_primed(workload)
        except NotReady as error:
            pytest.fail(f"{error}{contact.words}")
        return guest


class RealRig:
    """A monitor of real microVMs with its state in `root`."""

    end_of_exit_3 = "exit status 0 (the guest rebooted or shut down)"

    def __init__(self, root: Path, vmm: FirecrackerVmm, rootfs: Path) -> None:
        self.run, self.bases = root / "run", root / "bases"
        self.plain_vmm = vmm
        self.vmm = PatientVmm(vmm)
        spec = {"name": "real", "rootfs_path": str(rootfs), "memory_mib": MEMORY_MIB, "vcpus": 1, "warm_base": True}
        self.workload = Workload.of(WorkloadSpec(**spec))
        self.refused = Workload.of(WorkloadSpec(name="process", command=("python", "x.py")))
        self._others = children()

    def left(self) -> Collection[str]:
        """Directories of guests, bases, and children of this process that it had not before."""
        directories = [path.name for path in (*self.run.iterdir(), *self.bases.iterdir())]
        return [*directories, *(children() - self._others)]


@asynccontextmanager
async def real_rig(root: Path, rootfs: Path, *, jail: Literal["on", "off"]) -> AsyncIterator[RealRig]:
    """A rig that in the end has no guest, base or child more than before."""
    for part in ("run", "bases"):
        (root / part).mkdir(mode=0o700, parents=True)
    plain = rules()
    asked = MicroVmRules(firecracker=plain.firecracker, kernel=plain.kernel, jail=jail)
    async with outfitted(asked) as outfit:
        rig = RealRig(root, FirecrackerVmm(outfit, run=root / "run", bases=root / "bases"), rootfs)
        yield rig
        assert not (left := rig.left()), f"left behind: {left}"


def jails() -> list[Literal["on", "off"]]:
    """Both ways to run a guest where this user may use both."""
    return ["off", "on"] if is_present("root") else ["off"]
