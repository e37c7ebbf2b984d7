"""The monitor of microVMs over the double of Firecracker, on this very host; it must leave nothing there."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from fakes import program
from node.procvm_rig import GUESTS, children
from substrate_node.fcvm import FirecrackerVmm, MicroVmRules, Outfit, outfitted
from substrate_seam.invocation import Isolation
from substrate_seam.workload import Workload, WorkloadSpec

MEMORY_MIB = 16
TOLD = Path(__file__).parents[2] / "conformance" / "guests"


class Double:
    """The doubles of Firecracker and its jailer as programs below `root`, and the plan of what they do."""

    def __init__(self, root: Path, **config: Any) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self.config = root / "double.json"
        self.journal = root / "journal"
        self.cgroups = root / "cgroup"
        self.firecracker, self.jailer = root / "firecracker", root / "jailer"
        self.plan: dict[str, Any] = {"journal": str(self.journal), "cgroup_root": str(self.cgroups), **config}
        self.set()
        for double in (self.firecracker, self.jailer):
            argv = [sys.executable, "-I", "-S", str(program.__file__), double.name, "--double", str(self.config)]
            double.write_text(f'#!/bin/sh\nexec {" ".join(argv)} "$@"\n')
            double.chmod(0o755)

    def set(self, *faults: dict[str, Any], **config: Any) -> None:
        """Let these things go wrong from now on, and nothing else; change what else is given."""
        self.plan |= config
        for used in self.root.glob("double.json.used-*"):
            used.unlink()
        self.config.write_text(json.dumps(self.plan | {"faults": faults}))

    def requests(self) -> list[dict[str, Any]]:
        """Every request so far, in the order they were answered, with its answer."""
        return [json.loads(line) for line in self.journal.read_text().splitlines()] if self.journal.exists() else []

    def calls(self) -> list[str]:
        """What was asked, in order: method and path."""
        return [f"{request['method']} {request['path']}" for request in self.requests()]

    def rootfs(self, name: str = "rootfs.ext4", **program: Any) -> Path:
        """A root file system whose guest is the obedient one, or another program."""
        path = self.root / name
        program = {"argv": [sys.executable, "obedient.py"], "cwd": str(GUESTS), "env": {}} | program
        return _written(path, json.dumps(program))

    def told(self, name: str = "told.ext4") -> Path:
        """A root file system whose guest does what its requests say, and notes in the journal that it acts."""
        argv = [sys.executable, "-m", "substrate_guest", "serve", "told:app"]
        return self.rootfs(name, argv=argv, cwd=str(TOLD), env={"SUBSTRATE_AUDIT": "1"})

    def rules(self, *, jail: Literal["on", "off"] = "off", **members: Any) -> MicroVmRules:
        """How microVMs are made of the doubles."""
        kernel = _written(self.root / "vmlinux", "a kernel")
        (self.cgroups / "cgroup.subtree_control").parent.mkdir(exist_ok=True)
        return MicroVmRules(
            firecracker=self.firecracker,
            kernel=kernel,
            jail=jail,
            cgroup_root=self.cgroups,
            kvm=Path(os.devnull),
            **members,
        )


def _written(path: Path, text: str) -> Path:
    """A file with this text; one that has it already stays the same file."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


class MicroVmRig:
    """A monitor of microVMs with its state in `root`."""

    def __init__(self, root: Path, outfit: Outfit, double: Double) -> None:
        self.run, self.bases = root / "run", root / "bases"
        for directory in (self.run, self.bases):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.double = double
        self.outfit = outfit
        self.vmm = FirecrackerVmm(outfit, run=self.run, bases=self.bases)
        self.workload = self.of(double.rootfs())
        self.refused = Workload.of(WorkloadSpec(name="process", command=("python", "x.py")))
        self.end_of_exit_3 = "exit status 0 (the guest rebooted or shut down)"
        self._others = children()

    def of(self, rootfs: Path, **members: Any) -> Workload:
        """A workload with a root file system."""
        members = {"name": "obedient", "memory_mib": MEMORY_MIB, "vcpus": 1, "warm_base": True} | members
        return Workload.of(WorkloadSpec(rootfs_path=str(rootfs), **members))

    def left(self) -> Collection[str]:
        """Directories of guests, bases, control groups, and children of this process that it had not before."""
        groups = [path.name for path in self.double.cgroups.glob("*/*") if path.is_dir()]
        directories = [path.name for path in (*self.run.iterdir(), *self.bases.iterdir())]
        return [*directories, *groups, *(children() - self._others)]


@asynccontextmanager
async def microvm_rig(
    root: Path, *, jail: Literal["on", "off"] = "off", double: Double | None = None
) -> AsyncIterator[MicroVmRig]:
    """A rig that in the end has no guest, base or child more than before."""
    double = double or Double(root / "bin")
    async with outfitted(double.rules(jail=jail)) as outfit:
        assert outfit.warnings == ()
        rig = MicroVmRig(root, outfit, double)
        assert rig.vmm.isolation is (Isolation.MICROVM_JAILED if jail == "on" else Isolation.MICROVM)
        yield rig
        assert not (left := rig.left()), f"left behind: {left}"
