"""Makes process guests."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from substrate_node.offloop import off_loop
from substrate_node.processes.cgroups import ControlGroups, NoControlGroups
from substrate_node.procvm import record
from substrate_node.procvm.clone import Clone
from substrate_node.procvm.group import GuestGroup
from substrate_node.procvm.guest import ProcessGuest
from substrate_node.procvm.inputs import Inputs
from substrate_node.procvm.interpreter import Interpreters
from substrate_node.procvm.probe import (
    MEMORY_BOUND,
    NOT_OF_ZYGOTES,
    WARM_START,
    WARM_START_RESTS_ON,
    IsolationReport,
    reported,
)
from substrate_node.procvm.record import RunDirectory
from substrate_node.procvm.zygote import Zygote
from substrate_node.vmm import Base, BaseGone, Guest, Inbound, NotCapturable, Orphan, Vmm, VmmError, boot_id_of
from substrate_seam.invocation import Isolation
from substrate_seam.workload import Workload, WorkloadSpec

GUEST_USERS = range(1_879_100_000, 2_147_400_000)
"""Outer users of root's guests: past what containers and services are given, and told apart by guest."""
NOBODY = 65_534
WRITABLE_MIB_MIN = 16
_TRIAL_ENDS_WITHIN_S, _TRIAL_MIB = 30.0, 256
SHIM = ["-m", "substrate_guest"]
"""How the command of a workload goes on after its interpreter if the process can be cloned."""
_OWN_READY_PATH = "/shim/ready"
_CHILDREN_TOLD = Path("/proc/thread-self/children")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class ProcessVmm:
    """A `Vmm` whose guests are processes in namespaces of their own. It is not a security boundary.

    `run` is where each guest gets a directory. `guest_argv` starts the launcher, which gets its plan as standard input;
    `python` is what that word means in a workload's command, unless the workload names another interpreter. Every
    guest gets `env` besides its workload's. Where control groups can be made below `cgroup_root`, or where they are
    mounted, each guest has one.
    Make it on the thread of the loop that runs it: the kernel takes the end of that thread for the end of the daemon.
    """

    isolation = Isolation.PROCESS
    contact_cap_s = None  # a connection waits in the listening socket until the guest accepts

    def __init__(
        self,
        run: Path,
        *,
        guest_argv: tuple[str, ...],
        python: str = sys.executable,
        env: Mapping[str, str] | None = None,
        cgroup_root: Path | None = None,
    ) -> None:
        self._run = run
        self._launcher = guest_argv
        self._python = python
        self._env = dict(env or {})
        self._cgroup_root = cgroup_root
        self._groups: ControlGroups | None = None
        self._interpreters = Interpreters()
        self._guests: dict[str, ProcessGuest | Clone] = {}
        self._zygotes: dict[str, Zygote] = {}
        self._bases: dict[str, Base] = {}  # the newest of each input key
        self._inputs = Inputs()
        self._reading = asyncio.Lock()
        self._report: IsolationReport | None = None
        self._probing = asyncio.Lock()

    async def sweep(self) -> tuple[Orphan, ...]:
        """Remove what an earlier daemon left; call it once, holding the lock of the state root, before any boot."""
        return await record.sweep(self._run)

    async def aclose(self) -> None:
        """End what bases there still are; for the end of a daemon that has discarded its guests. Raises `OSError`."""
        for base_id in list(self._zygotes):
            await self._discard_zygote(base_id)
        if self._groups is not None:
            self._groups.close()

    async def probe(self) -> IsolationReport:
        """Find out, once, what keeps guests from this host: one guest tries everything, others insist on it.

        Raises `VmmError` if no guest can be started at all.
        """
        async with self._probing:
            if self._report is None:
                no_groups = await off_loop(self._ready_groups)
                outcomes = {**await self._trial("probe-1", None), MEMORY_BOUND: no_groups}
                await self._trial("probe-2", reported(outcomes))
                self._report = reported({**outcomes, WARM_START: await self._warm_trial(reported(outcomes))})
        return self._report

    def _ready_groups(self) -> str:
        """Have control groups for guests, or say why not. What an earlier daemon of this state root left goes."""
        name = "fc-invoke-" + sha256(str(self._run.resolve()).encode()).hexdigest()[:12]
        try:
            self._groups = ControlGroups.ready(name, root=self._cgroup_root)
            self._groups.sweep()
        except NoControlGroups as why:
            return str(why)
        except OSError as error:
            self._groups = None
            return f"{error.filename}: {error.strerror}"
        return ""

    def refusal(self, workload: Workload) -> str | None:
        """See `Vmm.refusal`; looks at the host's files, without waiting."""
        spec = workload.spec
        if spec.rootfs_path is not None:
            return (
                "a workload with a rootfs needs a microVM: "
                "a host with /dev/kvm, and Firecracker and a guest kernel installed on it"
            )
        if not self.isolation.satisfies(spec.isolation):
            return (
                f"it wants isolation {spec.isolation}, a process guest has {self.isolation}: "
                "use a rootfs on a host with /dev/kvm and Firecracker"
            )
        if spec.python is not None and not os.access(spec.python, os.X_OK):
            return f"its python {spec.python} is not a program on this host"
        if spec.path is not None and not Path(spec.path).is_dir():
            return f"its path {spec.path} is not a directory on this host"
        if spec.path is not None and self._run.resolve().is_relative_to(Path(spec.path).resolve()):
            return f"its path {spec.path} holds the state of this daemon, which no guest may see: name one without it"
        return None

    async def input_key(self, workload: Workload) -> str | None:
        """See `Vmm.input_key`: there is a warm start for what our shim serves, where this host can clone processes.

        A workload with a ready path of its own has none: that path answers only once requests are served.
        """
        spec = workload.spec
        served_by_shim = list(spec.command[1:3]) == SHIM and spec.guest == "substrate"
        if not served_by_shim or spec.ready_path != _OWN_READY_PATH or WARM_START not in (await self.probe()).applied:
            return None
        python, argv = self._command(workload)
        async with self._reading:
            try:
                return await off_loop(
                    self._inputs.key,
                    spec.path,
                    interpreter=python,
                    argv=argv,
                    env={**self._env, **spec.env},
                    memory_mib=spec.memory_mib,
                )
            except OSError:  # something is gone, and a boot will say what
                return None

    async def boot(self, workload: Workload, guest_id: str, inbound: Inbound, *, to_capture: bool = False) -> Guest:
        """See `Vmm.boot`. A measure that the probe promised and that fails now is a `VmmError`."""
        refusal = self.refusal(workload)
        if refusal is not None:
            raise VmmError(f"boot: {refusal}")
        report = await self.probe()
        spec = workload.spec
        python, argv = self._command(workload)
        made_of = await self.input_key(workload) if to_capture else None
        seen = (await self._interpreters.get(python)).places
        plan = self._plan(
            guest_id,
            argv,
            python=python,
            visible=(*seen, spec.path) if spec.path else seen,
            measures=_of_launcher(report) - (NOT_OF_ZYGOTES if to_capture else {WARM_START}),
            env={**self._env, **spec.env},
            cwd=spec.path,
            writable_mib=max(spec.memory_mib // 2, WRITABLE_MIB_MIN),
            zygote=to_capture,
        )
        guest = self._begin(guest_id, plan, inbound, self._group(guest_id, spec), to_capture=to_capture)
        guest.made_of = made_of
        await guest.isolated()
        return guest

    async def capture(self, workload: Workload, guest: Guest, base_id: str) -> Base:
        """See `Vmm.capture`: the guest's process becomes one that is cloned, or says why it can't be."""
        source, key = self._guests.get(guest.guest_id), await self.input_key(workload)
        if source is not guest or not isinstance(source, ProcessGuest) or key is None:
            raise VmmError(f"capture: guest {guest.guest_id} is none that could become a base")
        if source.made_of != key:
            raise VmmError(
                f"capture: what {workload.name!r} is made of changed while guest {guest.guest_id} was primed"
            )
        try:
            launch, wire = await source.captured()
        except NotCapturable as refusal:
            raise NotCapturable(f"{workload.name!r} can't be captured and starts cold: {refusal}") from refusal
        zygote = self._zygotes[base_id] = Zygote(launch, wire, RunDirectory(self._run, base_id))
        zygote.record()
        base = self._bases[key] = Base(base_id=base_id, input_key=key)
        return base

    async def adopt(self, workload: Workload) -> Base | None:
        """See `Vmm.adopt`: bases end with their daemon, so it is one of this daemon's, if any."""
        return self._bases.get(await self.input_key(workload) or "")

    async def restore(self, workload: Workload, base: Base, guest_id: str, inbound: Inbound) -> Guest:
        """See `Vmm.restore`. What the clone can't do for its isolation is the last that its console says."""
        zygote = self._zygotes.get(base.base_id)
        if zygote is None or zygote.wire.lost:
            raise BaseGone(f"restore: the process behind base {base.base_id} of {workload.name!r} has ended")
        group = self._group(self._new(guest_id), workload.spec)
        try:
            clone = self._guests[guest_id] = Clone(guest_id, zygote, inbound, group=group)
        except OSError as error:
            raise VmmError(f"restore: guest {guest_id} can't have its sockets: {error}") from error
        await clone.begin(boot_id_of(guest_id))
        return clone

    async def discard(self, guest_id: str) -> None:
        """See `Vmm.discard`."""
        guest = self._guests.get(guest_id)
        if guest is not None:
            await guest.destroy()
            self._guests.pop(guest_id, None)

    async def discard_base(self, base: Base) -> None:
        """See `Vmm.discard_base`."""
        if self._bases.get(base.input_key) == base:
            del self._bases[base.input_key]
        await self._discard_zygote(base.base_id)

    async def _discard_zygote(self, base_id: str) -> None:
        zygote = self._zygotes.get(base_id)
        if zygote is not None:
            await zygote.retire()
            self._zygotes.pop(base_id, None)

    def _command(self, workload: Workload) -> tuple[str, list[str]]:
        """The interpreter of a workload, and the whole command."""
        spec = workload.spec
        python = spec.python or self._python
        return python, [python if spec.command[0] == "python" else spec.command[0], *spec.command[1:]]

    async def _trial(self, guest_id: str, report: IsolationReport | None, *, zygote: bool = False) -> dict[str, str]:
        """Run an empty program in a guest; returns why each measure was not applied."""
        python = await self._interpreters.get(self._python)
        measures = None if report is None else _of_launcher(report)
        plan = self._plan(
            guest_id,
            [python.executable, "-I", "-c", "pass"],
            python=python.executable,
            visible=python.places,
            measures=measures if measures is None or not zygote else measures - NOT_OF_ZYGOTES | {WARM_START},
            env={},
            cwd=None,
            writable_mib=WRITABLE_MIB_MIN,
            zygote=zygote,
        )
        group = GuestGroup(self._groups, guest_id, memory_mib=_TRIAL_MIB, cpus=1)
        guest = self._begin(guest_id, plan, {}, group, to_capture=zygote)
        try:
            async with asyncio.timeout(_TRIAL_ENDS_WITHIN_S):
                outcomes = await guest.isolated()
                ended = await asyncio.shield(guest.exited)
        except TimeoutError:
            raise VmmError(f"boot: a trial guest did not end within {_TRIAL_ENDS_WITHIN_S:.0f} s") from None
        finally:
            await self.discard(guest_id)
        if ended.words != "exit status 0":
            raise VmmError(
                f"boot: {self._python} does not run in a guest: {ended.words}. Root's guests are another user: every "
                f"user must be able to read it. {ended.console}"
            )
        return outcomes

    async def _warm_trial(self, report: IsolationReport) -> str:
        """Why a process can't be cloned here; nothing if it can."""
        missing = WARM_START_RESTS_ON - report.applied
        if missing:
            return f"it rests on {', '.join(sorted(missing))}"
        # A captured process may have none, and the clones that a lost zygote did not tell of are found there.
        if not os.access(_CHILDREN_TOLD, os.R_OK):
            return "this kernel does not tell of the children of a process: it is built without CONFIG_PROC_CHILDREN"
        try:
            await self._trial("probe-3", report, zygote=True)
        except VmmError as error:
            return str(error)
        return ""

    def _group(self, guest_id: str, spec: WorkloadSpec) -> GuestGroup:
        return GuestGroup(self._groups, guest_id, memory_mib=spec.memory_mib, cpus=spec.vcpus)

    def _begin(
        self, guest_id: str, plan: Mapping[str, object], inbound: Inbound, group: GuestGroup, *, to_capture: bool
    ) -> ProcessGuest:
        directory = RunDirectory(self._run, self._new(guest_id))
        try:
            guest = ProcessGuest(guest_id, self._launcher, plan, directory, inbound, group=group, to_capture=to_capture)
        except OSError as error:
            raise VmmError(f"boot: cannot start a process for guest {guest_id}: {error}") from error
        self._guests[guest_id] = guest
        return guest

    def _new(self, guest_id: str) -> str:
        """The id, if it can name another guest. Raises `VmmError`."""
        if not _ID.fullmatch(guest_id):
            raise VmmError(f"boot: {guest_id!r} can't name a guest; accepted are 63 letters, digits, '.', '_', '-'")
        if guest_id in self._guests:
            raise VmmError(f"boot: there is a guest {guest_id} already")
        return guest_id

    def _plan(
        self,
        guest_id: str,
        argv: list[str],
        *,
        python: str,
        visible: tuple[str, ...],
        measures: AbstractSet[str] | None,
        env: Mapping[str, str],
        cwd: str | None,
        writable_mib: int,
        zygote: bool,
    ) -> dict[str, object]:
        base = {
            "PATH": f"{Path(python).parent}:/usr/local/bin:/usr/bin:/bin",
            "TMPDIR": "/tmp",  # noqa: S108  # the guest's own
            "LANG": "C.UTF-8",
        }
        return {
            "argv": argv,
            "env": {**base, **env},
            "cwd": cwd,
            "hostname": guest_id,
            "boot_id": boot_id_of(guest_id),
            "measures": None if measures is None else sorted(measures),
            "user": _outer_user(guest_id),
            "visible": list(visible),
            "base": str(RunDirectory(self._run, guest_id).path),
            "writable_mib": writable_mib,
            "zygote": zygote,
        }


def _of_launcher(report: IsolationReport) -> AbstractSet[str]:
    """The measures that the launcher sees to; control groups are the node's."""
    return report.applied - {MEMORY_BOUND}


def _outer_user(guest_id: str) -> int:
    """The user that a guest of root becomes: its own, if this daemon's user namespace knows so many."""
    first_inner, _, count = map(int, Path("/proc/self/uid_map").read_text().split()[:3])
    if first_inner + count > GUEST_USERS.stop:
        return GUEST_USERS[int.from_bytes(guest_id.encode()) % len(GUEST_USERS)]
    return NOBODY


if TYPE_CHECKING:
    _fits_vmm: type[Vmm] = ProcessVmm
    _fits_guest: type[Guest] = ProcessGuest
    _fits_clone: type[Guest] = Clone
