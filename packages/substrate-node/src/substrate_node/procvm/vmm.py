"""Makes process guests."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from substrate_node.procvm import record
from substrate_node.procvm.guest import ProcessGuest
from substrate_node.procvm.interpreter import Interpreters
from substrate_node.procvm.probe import IsolationReport, reported
from substrate_node.procvm.record import RunDirectory
from substrate_node.vmm import Base, Guest, Inbound, Orphan, Vmm, VmmError
from substrate_seam.invocation import Isolation
from substrate_seam.workload import Workload

GUEST_USERS = range(1_879_100_000, 2_147_400_000)
"""Outer users of root's guests: past what containers and services are given, and told apart by guest."""
NOBODY = 65_534
WRITABLE_MIB_MIN = 16
_TRIAL_ENDS_WITHIN_S = 30.0
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class ProcessVmm:
    """A `Vmm` whose guests are processes in namespaces of their own. It is not a security boundary.

    `run` is where each guest gets a directory. `guest_argv` starts the launcher, which gets its plan as standard input;
    `python` is what that word means in a workload's command, unless the workload names another interpreter. Every
    guest gets `env` besides its workload's.
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
    ) -> None:
        self._run = run
        self._launcher = guest_argv
        self._python = python
        self._env = dict(env or {})
        self._interpreters = Interpreters()
        self._guests: dict[str, ProcessGuest] = {}
        self._report: IsolationReport | None = None
        self._probing = asyncio.Lock()

    async def sweep(self) -> tuple[Orphan, ...]:
        """Remove what an earlier daemon left; call it once, holding the lock of the state root, before any boot."""
        return await record.sweep(self._run)

    async def probe(self) -> IsolationReport:
        """Find out, once, what keeps guests from this host: one guest tries everything, a second one insists on it.

        Raises `VmmError` if no guest can be started at all.
        """
        async with self._probing:
            if self._report is None:
                report = reported(await self._trial("probe-1", None))
                await self._trial("probe-2", report)
                self._report = report
        return self._report

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

    def input_key(self, workload: Workload) -> str | None:
        """See `Vmm.input_key`: there is no warm start."""
        return None

    async def boot(self, workload: Workload, guest_id: str, inbound: Inbound) -> Guest:
        """See `Vmm.boot`. A measure that the probe promised and that fails now is a `VmmError`."""
        refusal = self.refusal(workload)
        if refusal is not None:
            raise VmmError(f"boot: {refusal}")
        report = await self.probe()
        spec = workload.spec
        python = spec.python or self._python
        seen = (await self._interpreters.get(python)).places
        plan = self._plan(
            guest_id,
            [python if spec.command[0] == "python" else spec.command[0], *spec.command[1:]],
            python=python,
            visible=(*seen, spec.path) if spec.path else seen,
            report=report,
            env={**self._env, **spec.env},
            cwd=spec.path,
            writable_mib=max(spec.memory_mib // 2, WRITABLE_MIB_MIN),
        )
        guest = self._begin(guest_id, plan, inbound)
        await guest.isolated()
        return guest

    async def capture(self, workload: Workload, guest: Guest, base_id: str) -> Base:
        """See `Vmm.capture`: not possible."""
        raise VmmError(f"capture: process guests have no warm start, so {workload.name!r} can't have base {base_id}")

    async def adopt(self, workload: Workload) -> Base | None:
        """See `Vmm.adopt`: there is none."""
        return None

    async def restore(self, workload: Workload, base: Base, guest_id: str, inbound: Inbound) -> Guest:
        """See `Vmm.restore`: not possible."""
        raise VmmError(
            f"restore: process guests have no warm start, so {workload.name!r} can't use base {base.base_id}"
        )

    async def discard(self, guest_id: str) -> None:
        """See `Vmm.discard`."""
        guest = self._guests.get(guest_id)
        if guest is not None:
            await guest.destroy()
            self._guests.pop(guest_id, None)

    async def discard_base(self, base: Base) -> None:
        """See `Vmm.discard_base`: there is none."""

    async def _trial(self, guest_id: str, report: IsolationReport | None) -> dict[str, str]:
        """Run an empty program in a guest; returns why each measure was not applied."""
        python = await self._interpreters.get(self._python)
        plan = self._plan(
            guest_id,
            [python.executable, "-I", "-c", "pass"],
            python=python.executable,
            visible=python.places,
            report=report,
            env={},
            cwd=None,
            writable_mib=WRITABLE_MIB_MIN,
        )
        guest = self._begin(guest_id, plan, {})
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

    def _begin(self, guest_id: str, plan: Mapping[str, object], inbound: Inbound) -> ProcessGuest:
        if guest_id in self._guests:
            raise VmmError(f"boot: there is a guest {guest_id} already")
        directory = RunDirectory(self._run, guest_id)
        try:
            guest = self._guests[guest_id] = ProcessGuest(guest_id, self._launcher, plan, directory, inbound)
        except OSError as error:
            raise VmmError(f"boot: cannot start a process for guest {guest_id}: {error}") from error
        return guest

    def _plan(
        self,
        guest_id: str,
        argv: list[str],
        *,
        python: str,
        visible: tuple[str, ...],
        report: IsolationReport | None,
        env: Mapping[str, str],
        cwd: str | None,
        writable_mib: int,
    ) -> dict[str, object]:
        if not _ID.fullmatch(guest_id):
            raise VmmError(f"boot: {guest_id!r} can't name a guest; accepted are 63 letters, digits, '.', '_', '-'")
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
            "measures": None if report is None else sorted(report.applied),
            "user": _outer_user(guest_id),
            "visible": list(visible),
            "base": str(RunDirectory(self._run, guest_id).path),
            "writable_mib": writable_mib,
        }


def _outer_user(guest_id: str) -> int:
    """The user that a guest of root becomes: its own, if this daemon's user namespace knows so many."""
    first_inner, _, count = map(int, Path("/proc/self/uid_map").read_text().split()[:3])
    if first_inner + count > GUEST_USERS.stop:
        return GUEST_USERS[int.from_bytes(guest_id.encode()) % len(GUEST_USERS)]
    return NOBODY


if TYPE_CHECKING:
    _fits_vmm: type[Vmm] = ProcessVmm
    _fits_guest: type[Guest] = ProcessGuest
