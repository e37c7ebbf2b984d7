"""The node put together on this machine: its state root, its monitors, its size; leftovers of an earlier daemon go."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Literal, Protocol, TextIO

from msgspec import Struct, structs

from substrate_node.fcvm import DEFAULT_BOOT_ARGS, FirecrackerVmm, MicroVmRules, outfitted, sweep_orphans
from substrate_node.images import ImageStore
from substrate_node.memory import default_memory_mib
from substrate_node.node import LocalNode, NodeIdentity, NodeTimes
from substrate_node.offloop import off_loop
from substrate_node.procvm import IsolationReport, ProcessVmm, record
from substrate_node.ready import IdentityMint
from substrate_node.state import StateRoot, StateRootUnusable, abandoned, default_state_root, locked_state_root
from substrate_node.vmm import Orphan, Vmm
from substrate_seam.events import Emit, OrphanRemoved, WarningRaised
from substrate_seam.story import Story


class NodeSettings(Protocol):
    """What this machine is to its cluster. Without `memory_mib`: what it has, less a reserve.

    Without `state_root`: the usual place of a daemon of its name. MicroVMs need `firecracker_bin` and `kernel_image`;
    `harness_init` is the init of guests on the Go shim, ours have their own.
    """

    @property
    def node_id(self) -> str: ...  # noqa: D102
    @property
    def arch(self) -> str: ...  # noqa: D102
    @property
    def pod_uid(self) -> str | None: ...  # noqa: D102
    @property
    def state_root(self) -> Path | None: ...  # noqa: D102
    @property
    def memory_mib(self) -> int | None: ...  # noqa: D102
    @property
    def boot_within_s(self) -> float: ...  # noqa: D102
    @property
    def audit_journal(self) -> Path | None: ...  # noqa: D102
    @property
    def firecracker_bin(self) -> Path: ...  # noqa: D102
    @property
    def kernel_image(self) -> Path: ...  # noqa: D102
    @property
    def kernel_initrd(self) -> Path | None: ...  # noqa: D102
    @property
    def kernel_boot_args(self) -> str | None: ...  # noqa: D102
    @property
    def harness_init(self) -> str: ...  # noqa: D102
    @property
    def jailer(self) -> Literal["auto", "on", "off"]: ...  # noqa: D102
    @property
    def guest_oom_score_adj(self) -> int: ...  # noqa: D102


class HostedNode(Struct, frozen=True, kw_only=True):
    """A node that runs, the monitors it has, and the entries of its audit journal (None: none is kept).

    `isolation` says what keeps process guests from this host.
    """

    node: LocalNode
    vmms: tuple[Vmm, ...]
    isolation: IsolationReport
    journal: JournalFile | None

    async def drain(self, within_s: float) -> None:
        """Take no new calls; return when those that run have ended, which `within_s` seconds from now they must."""
        await self.node.drain(within_s=within_s)
        await self.node.idle()


class JournalFile:
    """The audit journal in a file: one `id attempt` a line, written before the guest may act."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def record(self, invocation_id: str, attempt: int) -> None:
        """Keep an entry. Raises `OSError`."""
        self._file.write(f"{invocation_id} {attempt}\n")
        self._file.flush()

    def entries(self) -> list[str]:
        """Every entry so far, oldest first."""
        return Path(self._file.name).read_text().splitlines()


@asynccontextmanager
async def hosted_node(
    settings: NodeSettings,
    *,
    daemon: str,
    prefix: str,
    guest_argv: tuple[str, ...],
    emit: Emit,
    story: Callable[[str], Story | None] = lambda _: None,
    patient: bool = False,
) -> AsyncIterator[HostedNode]:
    """Be a node for the length of the block, in a daemon of that name whose settings begin with `prefix`.

    `guest_argv` starts a process guest (see `ProcessVmm`), `story` is for agents (see `LocalNode`). MicroVMs are made
    where Firecracker and KVM are at hand. A `patient` node gives a restore as long as a boot. Raises
    `StateRootUnusable`, `VmmError` if no guest can be started at all or not as it was asked for, and `OSError` for a
    journal it can't write.
    """
    boot_id = os.urandom(16).hex()
    place = settings.state_root or default_state_root(daemon, os.environ)
    async with AsyncExitStack() as held:
        files = held.enter_context(ExitStack())
        root = files.enter_context(locked_state_root(place, boot_id=boot_id, setting=f"{prefix}STATE_ROOT"))
        await off_loop(ImageStore(root.images).sweep)
        journal = _open_journal(settings.audit_journal, files)
        microvms = await _firecracker_vmm(
            microvm_rules(settings, daemon, audited=journal is not None), root, held, emit=emit
        )
        processes = await _process_vmm(root, guest_argv, audited=journal is not None, emit=emit)
        vmms: tuple[Vmm, ...] = (processes,) if microvms is None else (microvms, processes)
        identity = NodeIdentity(node_id=settings.node_id, boot_id=boot_id, arch=settings.arch, pod_uid=settings.pod_uid)
        held.push_async_callback(processes.aclose)
        times = NodeTimes(boot_within_s=settings.boot_within_s)
        if patient:
            times = structs.replace(times, restore_within_s=times.boot_within_s)
        async with LocalNode(
            identity,
            vmms=vmms,
            memory_mib=default_memory_mib() if settings.memory_mib is None else settings.memory_mib,
            mint=IdentityMint(wall_ns=time.time_ns, entropy=os.urandom),
            emit=emit,
            times=times,
            record=journal.record if journal is not None else None,
            story=story,
            clock=time.monotonic,  # uvloop's clock stands still for a millisecond
        ) as node:
            isolation = await processes.probe()
            yield HostedNode(node=node, vmms=vmms, isolation=isolation, journal=journal)


async def clear_abandoned(parent: Path, prefix: str, *, emit: Emit) -> None:
    """Remove what killed daemons of ours left in `parent`, guests and all: state roots of that prefix in no use.

    What cannot be removed stays, for the next to try.
    """
    for path in abandoned(parent, prefix):
        with suppress(StateRootUnusable, OSError), locked_state_root(path, boot_id="", setting="") as root:
            _tell_orphans(await sweep_orphans(root.run, None), emit)
            _tell_orphans(await record.sweep(root.run), emit)
            await off_loop(shutil.rmtree, root.path)


def _open_journal(path: Path | None, files: ExitStack) -> JournalFile | None:
    return JournalFile(files.enter_context(path.open("a"))) if path is not None else None


def microvm_rules(settings: NodeSettings, daemon: str, *, audited: bool) -> MicroVmRules:
    """How the settings of a daemon of that name want microVMs to be made."""
    return MicroVmRules(
        firecracker=settings.firecracker_bin,
        kernel=settings.kernel_image,
        initrd=settings.kernel_initrd,
        boot_args=settings.kernel_boot_args or DEFAULT_BOOT_ARGS,
        foreign_init=settings.harness_init,
        audited=audited,
        jail=settings.jailer,
        cgroup_parent=daemon,
        oom_score_adj=settings.guest_oom_score_adj,
    )


async def _firecracker_vmm(
    rules: MicroVmRules, root: StateRoot, held: AsyncExitStack, *, emit: Emit
) -> FirecrackerVmm | None:
    """The monitor of microVMs, where there can be one. What an earlier daemon left of them goes in any case."""
    if not rules.possible():
        _tell_orphans(await sweep_orphans(root.run, None), emit)
        return None
    outfit = await held.enter_async_context(outfitted(rules))
    vmm = FirecrackerVmm(outfit, run=root.run, bases=root.bases)
    _tell_orphans(await vmm.sweep(), emit)
    for message in (*outfit.warnings, *await vmm.sweep_bases(now_s=time.time())):
        emit(WarningRaised(message=message))
    return vmm


def _tell_orphans(orphans: Iterable[Orphan], emit: Emit) -> None:
    for orphan in orphans:
        emit(OrphanRemoved(guest=orphan.guest_id, pid=orphan.pid))


async def _process_vmm(root: StateRoot, guest_argv: tuple[str, ...], *, audited: bool, emit: Emit) -> ProcessVmm:
    vmm = ProcessVmm(root.run, guest_argv=guest_argv, env={"SUBSTRATE_AUDIT": "1"} if audited else {})
    _tell_orphans(await vmm.sweep(), emit)
    for measure in (await vmm.probe()).missing:
        emit(WarningRaised(message=f"process guests lack {measure.name}: {measure.why_not}", hint=measure.hint))
    return vmm
