"""What every microVM of this node has in common: the programs, the kernel, the processor, the jail."""

from __future__ import annotations

import asyncio
import hashlib
import os
import platform
import re
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Literal

from msgspec import Struct

from substrate_node.fcvm.bundle import Fingerprint, Inputs, Manifest
from substrate_node.fcvm.jail import Jail, NoJail, usable_cgroups, users_exist
from substrate_node.fcvm.release import Release
from substrate_node.processes.namespaces import empty_network
from substrate_node.vmm import VmmError
from substrate_seam.workload import WorkloadSpec

DEFAULT_BOOT_ARGS = "console=ttyS0 quiet reboot=k panic=1 pci=off i8042.noaux i8042.nomux i8042.dumbkbd"
"""Each character on the console costs the guest two exits to the host: a quiet kernel starts much sooner."""
OUR_INIT = "/.substrate/init"
"""The first process of an image that was made by this project, unless its workload names another."""
KVM = Path("/dev/kvm")
_ANSWERS_WITHIN_S = 10.0
_CPU_FIELDS = ("vendor_id", "cpu family", "model", "model name", "stepping", "CPU implementer", "CPU part")


class MicroVmRules(Struct, frozen=True, kw_only=True):
    """How microVMs are to be made here; `kvm` is what must be usable for them.

    `foreign_init` is the first process of guests on the Go shim; `audited` has ours write a journal before they act.
    `jailer` None: the program beside `firecracker`. `cgroup_root` None: where version 2 of control groups is mounted.
    `jail` is `on` (or nothing runs), `off`, or `auto`: on wherever it is possible.
    """

    firecracker: Path
    kernel: Path
    initrd: Path | None = None
    boot_args: str = DEFAULT_BOOT_ARGS
    foreign_init: str = "/usr/local/bin/fc-shim-init"
    audited: bool = False
    jail: Literal["auto", "on", "off"] = "auto"
    jailer: Path | None = None
    cgroup_root: Path | None = None
    cgroup_parent: str = "fc-invoke"
    oom_score_adj: int = 1000
    kvm: Path = KVM

    @property
    def jailer_program(self) -> Path:
        """Where the jailer is."""
        return self.jailer or self.firecracker.with_name("jailer")

    def possible(self) -> bool:
        """Whether this machine could have microVMs at all."""
        return os.access(self.firecracker, os.X_OK) and os.access(self.kvm, os.R_OK | os.W_OK)


class Outfit(Struct, frozen=True, kw_only=True):
    """The rules, and what was found out about this machine, once. `warnings` tell of protection that is missing."""

    rules: MicroVmRules
    release: Release
    snapshot_format: str
    cpu: str
    host_kernel: str
    jail: Jail | None
    warnings: tuple[str, ...]

    @property
    def moves_clocks(self) -> bool:
        """Whether a restored machine's clock can be moved on by the time that passed since it was captured."""
        kernel = tuple(map(int, re.findall(r"\d+", self.host_kernel)[:2]))
        return self.release.knows("clock_realtime") and platform.machine() == "x86_64" and kernel >= (5, 16)

    def inputs(self, spec: WorkloadSpec) -> Inputs:
        """What a base of a workload is made of. Raises `OSError` when a file of it can't be read."""
        rules = self.rules
        assert spec.rootfs_path is not None
        return Inputs(
            firecracker=str(self.release),
            snapshot_format=self.snapshot_format,
            cpu=self.cpu,
            arch=platform.machine(),
            host_kernel=self.host_kernel,
            kernel=Fingerprint.of(rules.kernel),
            initrd=Fingerprint.of(rules.initrd) if rules.initrd is not None else None,
            boot_args=self.boot_args(spec),
            rootfs=Fingerprint.of(Path(spec.rootfs_path)),
            vcpus=spec.vcpus,
            memory_mib=spec.memory_mib,
        )

    def boot_args(self, spec: WorkloadSpec) -> str:
        """The guest kernel's command line; Firecracker adds the root device."""
        ours = spec.guest == "substrate"
        audit = " SUBSTRATE_AUDIT=1" if ours and self.rules.audited else ""  # in the environment of the first process
        return (
            f"{self.rules.boot_args}{audit} init={spec.harness_init or (OUR_INIT if ours else self.rules.foreign_init)}"
        )

    def objection(self, manifest: Manifest) -> str | None:
        """Why no workload here can ever use a base again; None if one may."""
        was = manifest.inputs
        release = Release.parse(was.firecracker)
        if release.objection() is not None:
            return f"{release.objection()}"
        files = {manifest.kernel_path: was.kernel, manifest.initrd_path: was.initrd, manifest.rootfs_path: was.rootfs}
        for path, fingerprint in files.items():
            if path is not None and _fingerprint(path) != fingerprint:
                return f"{path} of workload {manifest.workload!r} is another file now, or gone"
        here = {
            "firecracker": str(self.release),
            "snapshot_format": self.snapshot_format,
            "cpu": self.cpu,
            "host_kernel": self.host_kernel,
        }
        then = {field: getattr(was, field) for field in here}
        return next((f"it was made with {then[f]}, here is {here[f]}" for f in here if then[f] != here[f]), None)


@asynccontextmanager
async def outfitted(rules: MicroVmRules) -> AsyncIterator[Outfit]:
    """Find out about this machine, and keep what guests share for the length of the block.

    Raises `VmmError`: Firecracker, or the jail that was asked for, can't be had.
    """
    with ExitStack() as kept:
        release = await _release(rules.firecracker)
        warnings: list[str] = []
        yield Outfit(
            rules=rules,
            release=release,
            snapshot_format=(await answer(rules.firecracker, "--snapshot-version")).split()[0],
            cpu=_cpu(),
            host_kernel=platform.release(),
            jail=await _possible_jail(rules, release, kept, warnings),
            warnings=tuple(warnings),
        )


async def _possible_jail(rules: MicroVmRules, release: Release, kept: ExitStack, warnings: list[str]) -> Jail | None:
    if rules.jail == "off":
        return None
    try:
        return await _jail(rules, release, kept, warnings)
    except NoJail as why:
        if rules.jail == "on":
            raise VmmError(f"microVMs can't be jailed: {why}") from why
        warnings.append(f"microVMs are not jailed: {why}")
        return None


async def jail_objections(rules: MicroVmRules, release: Release | None) -> list[str]:
    """Everything that keeps microVMs of a release from being jailed here; changes nothing."""
    if os.geteuid() != 0:
        return ["only root can jail them"]
    objections = []
    jailer = rules.jailer_program
    wanted = f"Firecracker {release}" if release is not None else "Firecracker"
    if not os.access(jailer, os.X_OK):
        objections.append(f"there is no {jailer}: install the jailer of {wanted} there")
    elif release is not None:
        objections += await _other_release(jailer, release)
    if not users_exist():
        objections.append("this user namespace has too few users to give each guest its own")
    try:
        os.close(empty_network())
    except OSError as error:
        objections.append(f"no namespace can be made ({error}): run with CAP_SYS_ADMIN")
    return objections


async def _other_release(jailer: Path, release: Release) -> list[str]:
    try:
        said = await _release(jailer)
    except VmmError as error:
        return [str(error)]
    if said != release:
        return [f"the jailer is of release {said}, Firecracker of {release}: install one release of both"]
    return []


async def _jail(rules: MicroVmRules, release: Release, kept: ExitStack, warnings: list[str]) -> Jail:
    objections = await jail_objections(rules, release)
    if objections:
        raise NoJail("; ".join(objections))
    network = empty_network()
    kept.callback(os.close, network)
    cgroups = None
    try:
        cgroups = usable_cgroups(rules.cgroup_root, rules.cgroup_parent)
    except NoJail as why:
        warnings.append(str(why))
    return Jail(jailer=rules.jailer_program, cgroups=cgroups, network=f"/proc/{os.getpid()}/fd/{network}")


async def _release(program: Path) -> Release:
    try:
        return Release.parse(await answer(program, "--version"))
    except ValueError as error:
        raise VmmError(f"{program} --version: {error}. It is no program of Firecracker's") from error


async def answer(program: Path, *arguments: str) -> str:
    """What a program of Firecracker's says when asked. Raises `VmmError`."""
    try:
        process = await asyncio.create_subprocess_exec(
            program, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, env={}
        )
    except OSError as error:
        raise VmmError(f"{program} can't be run: {error.strerror}. Install Firecracker there") from error
    try:
        async with asyncio.timeout(_ANSWERS_WITHIN_S):
            said, _ = await process.communicate()
    except TimeoutError:
        raise VmmError(f"{program} {' '.join(arguments)} said nothing within {_ANSWERS_WITHIN_S:.0f} s") from None
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    if process.returncode != 0 or not said.strip():
        raise VmmError(f"{program} {' '.join(arguments)} ended with status {process.returncode}: it is no Firecracker")
    return said.decode(errors="replace")


def _cpu() -> str:
    """The processor of this machine: what it is called, and a digest of what it can do."""
    about: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        about[name.strip()] = value.strip()
    flags = hashlib.sha256((about.get("flags") or about.get("Features") or "").encode()).hexdigest()[:12]
    return ", ".join([*(about[field] for field in _CPU_FIELDS if field in about), f"flags {flags}"])


def _fingerprint(path: str) -> Fingerprint | None:
    try:
        return Fingerprint.of(Path(path))
    except OSError:
        return None
