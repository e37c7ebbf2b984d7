"""What keeps process guests from the host here, found out by starting some."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

MEASURES = {
    "user-namespace": "a user that is nobody outside the guest",
    "mount-namespace": "mounts of its own",
    "private-files": "a file tree with nothing of the host but programs, read-only, and bounded space to write",
    "pid-namespace": "sees no process of the host, and ends as a whole",
    "own-proc": "a /proc of its own",
    "network-namespace": "no network but its own loopback",
    "ipc-namespace": "no shared memory or message queues of the host",
    "uts-namespace": "a host name of its own",
    "cgroup-namespace": "sees no control groups of the host",
    "own-boot-id": "a boot id of its own",
    "unprivileged-user": "not root outside",
    "no-nested-namespaces": "cannot make namespaces to gain capabilities in",
    "no-capabilities": "no capabilities, and none to get",
    "no-new-privileges": "no gain from set-user-id programs",
    "system-call-filter": "none of the kernel's darker corners: keys, BPF, io_uring, devices of the host's network",
    "resource-limits": "bounded descriptors and processes, no core dumps",
    "control-group": "memory, processes and CPU that are bounded, with all that it starts",
    "first-to-die": "the kernel kills it before the daemon when memory runs out",
    "dies-with-daemon": "ends when the daemon does, however that ends",
    "warm-start": "may be the clone of a primed process, in namespaces of its own, instead of a start from nothing",
}
"""Every measure by name, and what it gives the guest."""

WARM_START, MEMORY_BOUND = "warm-start", "control-group"
NOT_OF_ZYGOTES = frozenset({WARM_START, "own-boot-id", "no-nested-namespaces"})
"""What a process that is cloned does without, and its clones have."""
WARM_START_RESTS_ON = frozenset(
    {
        *("user-namespace", "mount-namespace", "private-files", "pid-namespace", "own-proc", "own-boot-id"),
        *("network-namespace", "ipc-namespace", "uts-namespace", "no-nested-namespaces", "no-capabilities"),
        *("no-new-privileges", "system-call-filter", "resource-limits", "dies-with-daemon"),
    }
)
"""What each clone has: without one of these, what a clone is could not be said in one word."""

HINTS = {
    "user-namespace": "allow them: sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_"
    "userns=0 and user.max_user_namespaces above 0, or run the daemon as root",
    "own-proc": "in a container, run it with an unmasked /proc (Docker: --security-opt systempaths=unconfined)",
    "private-files": "needs Linux 5.12 or later",
    "no-nested-namespaces": "needs own-proc",
    "own-boot-id": "needs own-proc",
    "control-group": "it takes control groups of version 2 with memory and pids (a host of version 1 boots with "
    "systemd.unified_cgroup_hierarchy=1), and root or a group that is delegated to the daemon's user; until then a "
    "guest may take what memory there is",
}
"""What helps most often when a measure can't be applied."""


class Measure(Struct, frozen=True):
    """One measure; `why_not` is empty if it is applied, and a `hint` may say what would help if it is not."""

    name: str
    gives: str
    why_not: str = ""
    hint: str = ""

    @property
    def applied(self) -> bool:
        """Whether every guest gets it."""
        return not self.why_not

    def __str__(self) -> str:
        if self.applied:
            return f"yes  {self.name}: {self.gives}"
        hint = f"; {self.hint}" if self.hint else ""
        return f"NO   {self.name}: {self.gives} ({self.why_not}{hint})"


class IsolationReport(Struct, frozen=True):
    """What keeps process guests from this host. An applied measure holds for each guest, or the guest isn't started."""

    measures: tuple[Measure, ...]

    @property
    def applied(self) -> frozenset[str]:
        """The names of the measures that hold."""
        return frozenset(measure.name for measure in self.measures if measure.applied)

    @property
    def missing(self) -> tuple[Measure, ...]:
        """The measures that this host does not allow."""
        return tuple(measure for measure in self.measures if not measure.applied)

    @property
    def facts(self) -> list[dict[str, object]]:
        """The same for programs: a row for each measure."""
        return [
            {"measure": each.name, "gives": each.gives, "applied": each.applied, "why_not": each.why_not}
            | ({"hint": each.hint} if each.hint else {})
            for each in self.measures
        ]

    def __str__(self) -> str:
        return "\n".join(["What keeps process guests from this host:", *map(str, self.measures)])


def reported(outcomes: Mapping[str, str]) -> IsolationReport:
    """Say what a trial guest told: for each measure that it tried, why it was not applied."""
    untried = "what it rests on is missing"
    return IsolationReport(
        tuple(
            Measure(name, gives, why_not, HINTS.get(name, "") if why_not else "")
            for name, gives in MEASURES.items()
            for why_not in [outcomes.get(name, untried)]
        )
    )
