"""Control groups of version 2, one for each guest: what it and all that it starts may use together."""

from __future__ import annotations

import select
from contextlib import suppress
from pathlib import Path

from substrate_node.processes.procfs import read

NEEDED = {"memory", "pids"}
WISHED = {"cpu"}
OVERHEAD_MIB = 16
"""What a guest may use beside the memory of its workload: its first process is ours. And a clone, until it is held."""
TASKS_MAX = 2048
_PERIOD_US = 100_000
_ENDS_WITHIN_S = 5.0


class NoControlGroups(Exception):
    """Guests can't have control groups of their own here; the message says why and what would help."""


class ControlGroups:
    """The groups of one daemon's guests, below `parent`, which is nobody else's. Its methods raise `OSError`."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent

    @classmethod
    def ready(cls, name: str, *, root: Path | None = None) -> ControlGroups:
        """Ready a group called `name` below `root`, or where groups are mounted. Raises `NoControlGroups`."""
        root = root or mounted()
        if root is None:
            raise NoControlGroups("control groups of version 2 are not mounted")
        try:
            offered = set((root / "cgroup.controllers").read_text().split())
            if not offered >= NEEDED:
                raise NoControlGroups(f"{root} does not offer {' and '.join(sorted(NEEDED - offered))}")
            for group in (root, root / name):
                group.mkdir(exist_ok=True)
                wanted = " ".join(f"+{controller}" for controller in sorted((NEEDED | WISHED) & offered))
                (group / "cgroup.subtree_control").write_text(wanted)
        except OSError as error:
            raise NoControlGroups(f"{error.filename}: {error.strerror}") from error
        return cls(root / name)

    def hold(self, guest_id: str, *, memory_mib: int, cpus: int) -> None:
        """Make the group of a guest, with nobody in it."""
        group = self._parent / guest_id
        group.mkdir()
        bounds = {
            "memory.max": (memory_mib + OVERHEAD_MIB) * 2**20,
            "memory.swap.max": 0,
            "memory.oom.group": 1,
            "pids.max": TASKS_MAX,
            "cpu.max": f"{cpus * _PERIOD_US} {_PERIOD_US}",
        }
        for file, bound in bounds.items():
            if (group / file).exists() or file in ("memory.max", "pids.max"):
                (group / file).write_text(str(bound))

    def make_room(self, guest_id: str, *, memory_mib: int, clones: int) -> None:
        """Let a guest that is cloned use what so many living clones take of it.

        What a clone makes and copies before it is in its own group counts as that of the process it is a copy of for
        as long as the clone lives: 3 MiB and more.
        """
        bound_mib = memory_mib + OVERHEAD_MIB * (1 + clones)
        (self._parent / guest_id / "memory.max").write_text(str(bound_mib * 2**20))

    def enter(self, guest_id: str, pid: int) -> None:
        """Have a process in the group of a guest, and whatever it will start. May take many milliseconds."""
        (self._parent / guest_id / "cgroup.procs").write_text(str(pid))

    def peak_mib(self, guest_id: str) -> float | None:
        """The most memory that a guest has had at once, with the files it has read; None before Linux 5.19.

        Raises nothing.
        """
        with suppress(OSError, ValueError):
            return int(read(f"{self._parent}/{guest_id}/memory.peak")) / 2**20
        return None

    def remove(self, guest_id: str) -> None:
        """Leave nothing of a group, nor of what runs in it; one that is not there is left already.

        Blocks until what was killed has ended, which may take seconds.
        """
        group = self._parent / guest_id
        kill = group / "cgroup.kill"  # Linux 5.14 or later
        try:
            if kill.exists():
                kill.write_text("1")
                _wait_until_empty(group)
            group.rmdir()
        except OSError:
            if group.exists():
                raise

    def sweep(self) -> None:
        """Leave nothing of what an earlier daemon left."""
        for group in [entry.name for entry in self._parent.iterdir() if entry.is_dir()]:
            self.remove(group)

    def close(self) -> None:
        """Leave nothing of the parent either, once its guests are gone."""
        with suppress(FileNotFoundError):
            self._parent.rmdir()


def _wait_until_empty(group: Path) -> None:
    """Return when nothing runs in a group, or nothing changes there any more: what is killed takes its time to end."""
    with (group / "cgroup.events").open() as events:
        changes = select.poll()
        changes.register(events, select.POLLPRI)
        while "populated 1" in events.read() and changes.poll(_ENDS_WITHIN_S * 1000):
            events.seek(0)


def mounted() -> Path | None:
    """Where control groups of version 2 are mounted."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return next((Path(place) for _, place, kind, *_ in mounts if kind == "cgroup2"), None)
