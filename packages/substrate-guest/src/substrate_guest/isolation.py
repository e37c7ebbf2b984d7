"""Puts itself into namespaces with a file tree of its own and no privileges, and runs a command there.

The node starts it with `argv()`. It adds to every cold start, so it imports little. The process that is started
unshares and goes; its twin, a child of the node, becomes the first process of the guest: it isolates itself, starts the
command, reaps orphans and ends when the command does.

Descriptors: 0 is a file with the plan, 1 and 2 the console, 3 and 4 the guest's listening and dialling sockets, 5 a
SEQPACKET socket to the node, and 6 one for a command that is to be cloned. On 5, fields are parted by tabs: `isolated`
and a line per measure with why it was not applied; `failed` with what and why; `up` and the command's pid once it runs;
`ended` with its wait status, its pid and the KiB that it took, or 0. After `isolated` the node says `go`; if it is gone
instead, nothing is run.
"""

from __future__ import annotations

import marshal
import os
import resource
import sys

from substrate_guest import filetree
from substrate_guest.cloning import Mould
from substrate_guest.confinement import (
    INNER_ID,
    PROCESSES_MAX,
    PROCESSES_OF_CLONES_MAX,
    be_opaque,
    become,
    bring_loopback_up,
    drop_capabilities,
    enter_user_namespace,
    forbid_nested_namespaces,
    gain_nothing,
    limit_resources,
    name_host,
    volunteer_to_the_oom_killer,
)
from substrate_guest.filetree import HOME, Identity
from substrate_guest.seccomp import Filter, guests_filter, zygotes_filter
from substrate_guest.syscalls import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUTS,
    CLONE_PARENT,
    call,
    fork,
)

TYPE_CHECKING = False  # importing `typing` would take as long as all that is done here
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

LISTEN_FD, DIAL_FD, REPORT_FD, CAPTURE_FD = 3, 4, 5, 6

NAMESPACES = (
    ("cgroup-namespace", CLONE_NEWCGROUP),
    ("uts-namespace", CLONE_NEWUTS),
    ("ipc-namespace", CLONE_NEWIPC),
    ("pid-namespace", CLONE_NEWPID),
    ("network-namespace", CLONE_NEWNET),
    ("mount-namespace", CLONE_NEWNS),
)
SIGKILL, SIGPIPE, SIGXFSZ = 9, 13, 25  # `signal` is slow to import
CAP_SYS_ADMIN = 21
PR_SET_PDEATHSIG = 1


def argv(python: str = sys.executable) -> tuple[str, ...]:
    """The command that starts this module under `python`; the node appends nothing to it and sends a plan.

    No `-m`, and a stand-in for the package: importing it, or the site packages, would double the time.
    """
    directory = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120  # pathlib is slow to import
    package = f"package = type(sys)('substrate_guest'); package.__path__ = [{directory!r}]"
    program = f"import sys; {package}; sys.modules['substrate_guest'] = package; from substrate_guest import isolation"
    return (python, "-I", "-S", "-c", f"{program}; isolation.main()")


class Plan:
    """What the node wants: a marshalled dict of these members.

    `measures` names those that must be applied; None means to try each and tell what came of it. `user` is the outer
    user and group that a guest of root becomes. `visible` are the files and directories that the guest sees besides
    the system's, `base` is any directory to build its file tree on, `writable_mib` bounds what it may write. Without a
    `cwd`, the command starts in the guest's home. A `zygote` may make namespaces for its clones, and what it leaves
    running goes on when it has ended.
    """

    def __init__(self, members: dict[str, object]) -> None:
        self.argv: list[str] = members["argv"]  # type: ignore[assignment]  # the node wrote it a moment ago
        self.env: dict[str, str] = members["env"]  # type: ignore[assignment]
        self.cwd: str | None = members["cwd"]  # type: ignore[assignment]
        self.hostname: str = members["hostname"]  # type: ignore[assignment]
        self.boot_id: str = members["boot_id"]  # type: ignore[assignment]
        self.measures: list[str] | None = members["measures"]  # type: ignore[assignment]
        self.user: int = members["user"]  # type: ignore[assignment]
        self.visible: list[str] = members["visible"]  # type: ignore[assignment]
        self.base: str = members["base"]  # type: ignore[assignment]
        self.writable_mib: int = members["writable_mib"]  # type: ignore[assignment]
        self.zygote: bool = members["zygote"]  # type: ignore[assignment]


class NotIsolated(Exception):
    """A measure that must be applied could not be."""


class Measures:
    """The measures to apply, and for each tried one why it was not applied; an empty reason means that it was."""

    def __init__(self, required: list[str] | None) -> None:
        self.outcomes: dict[str, str] = {}
        self._required = required

    def wants(self, name: str) -> bool:
        """Whether `name` is to be applied, or tried."""
        return self._required is None or name in self._required

    def has(self, name: str) -> bool:
        """Whether `name` was applied."""
        return self.outcomes.get(name) == ""

    def apply(self, name: str, action: Callable[..., object], *arguments: object) -> None:
        """Do `action` for the measure `name` if it is wanted; raises `NotIsolated` if it fails and is required."""
        if not self.wants(name):
            return
        try:
            action(*arguments)
        except OSError as error:
            self.outcomes[name] = f"{error.filename or 'it'}: {error.strerror}"
            if self._required is not None:
                raise NotIsolated(f"{name}\t{self.outcomes[name]}") from error
        else:
            self.outcomes[name] = ""

    def complete(self) -> None:
        """Raise `NotIsolated` if a required measure was not even tried, because what it rests on is missing."""
        for name in self._required or ():
            if name not in self.outcomes:
                raise NotIsolated(f"{name}\twhat it rests on is missing")


def main() -> NoReturn:
    """Become a guest according to the plan on descriptor 0."""
    with open(0, "rb", closefd=False) as file:
        plan = Plan(marshal.load(file))  # noqa: S302  # from the node, which started this process
    os.closerange((CAPTURE_FD if plan.zygote else REPORT_FD) + 1, 1 << 20)
    for descriptor in (LISTEN_FD, DIAL_FD, REPORT_FD, CAPTURE_FD)[: 4 if plan.zygote else 3]:
        os.set_inheritable(descriptor, descriptor != REPORT_FD)
    measures = Measures(plan.measures)
    try:
        administers = may_administer()
        enter_namespaces(plan, measures, administers=administers)
        clone_and_leave()
        isolate(plan, measures, administers=administers)
        measures.complete()
        report("isolated\t" + "\n".join(f"{name}\t{why}" for name, why in measures.outcomes.items()))
        if os.read(REPORT_FD, 16) == b"go":
            run(plan, HOME if measures.has("private-files") else "/tmp")  # noqa: S108  # the host's, for want of its own
    except NotIsolated as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or 'isolation'}\t{error.strerror}")
    os._exit(1)


def report(message: str) -> None:
    """Tell the node; raises `OSError` when it is gone."""
    os.write(REPORT_FD, message.encode(errors="replace"))


def fail(message: str) -> NoReturn:
    """End, and say why if there still is somebody to hear it."""
    try:
        report(f"failed\t{message}")
    finally:
        os._exit(1)


def enter_namespaces(plan: Plan, measures: Measures, *, administers: bool) -> None:
    """Leave what is shared with the host, as far as that takes effect before the guest's first process is made.

    An administrator of the host makes the namespaces as such, so that nobody in the guest has a say in them; anybody
    else needs a user namespace to make the others.
    """
    measures.apply("first-to-die", volunteer_to_the_oom_killer)
    if not administers:
        if os.geteuid() == 0:
            measures.apply("unprivileged-user", become, plan.user)
        elif measures.wants("unprivileged-user"):
            measures.outcomes["unprivileged-user"] = ""  # an ordinary user's guest is that user's: it was never root
        measures.apply("user-namespace", enter_user_namespace)
    for name, flag in NAMESPACES:
        measures.apply(name, call, "unshare", flag)


def isolate(plan: Plan, measures: Measures, *, administers: bool) -> None:
    """Make the guest's first process what the command shall inherit."""
    if measures.has("uts-namespace"):
        name_host(plan.hostname)
    if measures.has("network-namespace"):
        bring_loopback_up()
    if measures.has("mount-namespace"):
        measures.apply("private-files", enter_private_files, plan, measures, administers)
    own_user = administers or measures.has("user-namespace")
    processes_max = PROCESSES_OF_CLONES_MAX if plan.zygote else PROCESSES_MAX
    measures.apply("resource-limits", limit_resources, processes_max if own_user else None)
    if administers:
        measures.apply("unprivileged-user", become, plan.user)
        measures.apply("user-namespace", enter_user_namespace)
    if plan.zygote:
        measures.apply("warm-start", try_to_clone, plan)
    elif measures.has("user-namespace"):
        measures.apply("no-nested-namespaces", forbid_nested_namespaces)
    measures.apply("no-capabilities", drop_capabilities)
    measures.apply("no-new-privileges", gain_nothing)
    measures.apply("system-call-filter", filter_system_calls, plan.zygote)
    measures.apply("dies-with-daemon", call, "prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)  # a change of user resets it


def run(plan: Plan, home: str) -> NoReturn:
    """Start the command, reap whatever ends, and end when the command does."""
    os.chdir(plan.cwd or home)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.environ["PATH"] = plan.env["PATH"]
    sockets = {"SUBSTRATE_LISTEN_FD": str(LISTEN_FD), "SUBSTRATE_DIAL_FD": str(DIAL_FD)}
    if plan.zygote:
        sockets |= {"SUBSTRATE_CAPTURE_FD": str(CAPTURE_FD), "SUBSTRATE_WRITABLE_MIB": str(plan.writable_mib)}
    env = {"HOME": home, **plan.env, **sockets}
    command = os.posix_spawnp(plan.argv[0], plan.argv, env, setsigmask=[], setsigdef=[SIGPIPE, SIGXFSZ])
    report(f"up\t{command}")
    os.closerange(0, REPORT_FD)
    os.closerange(REPORT_FD + 1, CAPTURE_FD + 1)
    be_opaque()  # the command has the same user, and no business in here
    own_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ended, status, used = os.wait3(0)
    while ended != command or plan.zygote:
        if plan.zygote:  # its clones are children of this process, and the node knows them by their pids
            report(_end(ended, status, used, own_kib))
        ended, status, used = os.wait3(0)
    report(_end(ended, status, used, own_kib))
    os._exit(max(os.waitstatus_to_exitcode(status), 1) if status else 0)


def _end(pid: int, status: int, used: resource.struct_rusage, own_kib: int) -> str:
    """What is told of a child's end; of memory nothing if it may be what it had as a copy of this process."""
    return f"ended\t{status}\t{pid}\t{used.ru_maxrss if used.ru_maxrss > own_kib else 0}"


# Measures.


def filter_system_calls(zygote: bool) -> None:  # noqa: FBT001  # via `apply`
    """Refuse what the workloads of a guest have no use for, and what the kernel does not keep apart by namespaces."""
    Filter(zygotes_filter() if zygote else guests_filter()).install()


def enter_private_files(plan: Plan, measures: Measures, administers: bool) -> None:  # noqa: FBT001  # via `apply`
    """Build the guest's file tree, make it the root, and let go of the host's."""
    owner = plan.user if administers and measures.wants("unprivileged-user") else os.geteuid()
    filetree.build(plan.base, INNER_ID if measures.wants("user-namespace") else owner)
    filetree.furnish(plan.base, Identity(plan.hostname, plan.boot_id), plan.writable_mib, owner=owner)
    filetree.show(plan.base, plan.visible)  # after what is writable: some of it may lie below /tmp
    if measures.has("pid-namespace"):  # before the root is changed: the kernel wants to see another proc beside it
        measures.apply("own-proc", filetree.show_processes, plan.base)
    if measures.has("own-proc") and not plan.zygote:
        measures.apply("own-boot-id", filetree.stand_in_for_boot_id, plan.base)
    filetree.enter(plan.base)


def try_to_clone(plan: Plan) -> None:
    """See whether a process like this one can be cloned; raises `OSError` with what a clone could not do."""
    Mould(plan.writable_mib).attempt()


def may_administer() -> bool:
    """Whether this process may make namespaces without a user namespace around them."""
    with open("/proc/self/status", "rb") as file:  # noqa: PTH123
        effective = next(line for line in file if line.startswith(b"CapEff:"))
    return bool(int(effective.split()[1], 16) >> CAP_SYS_ADMIN & 1)


def clone_and_leave() -> None:
    """Return in a twin that is the node's child and, with a pid namespace, its first process; this one exits."""
    twin, _ = fork(CLONE_PARENT)
    if twin:
        report(f"pid\t{twin}")
        os._exit(0)
