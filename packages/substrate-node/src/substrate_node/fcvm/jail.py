"""A jail for each guest: Firecracker's own jailer gives it a root, a user, namespaces and bounds of its own."""

from __future__ import annotations

import ctypes
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from substrate_node.fcvm.cell import API_SOCKET, LOG, MARK, Cell, remove_cell, started_in

USERS = range(1_879_100_000, 2_147_400_000)
"""Each guest is a user of its own, past what containers and services are given."""
OVERHEAD_MIB = 64
"""What a machine may use beside the guest's memory; Firecracker itself needs about 5 MiB."""
_TASKS_BESIDE_VCPUS = 16
_MS_RDONLY, _MS_REMOUNT, _MS_BIND = 1, 32, 4096
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


class NoJail(Exception):
    """Guests can't be jailed on this host; the message says why and what would help."""


class Cgroups(Struct, frozen=True, kw_only=True):
    """Where each guest gets a control group of its own: `<root>/<parent>/<guest>`."""

    root: Path
    parent: str

    def remove(self, guest_id: str) -> None:
        """Remove the guest's; one that is still busy, for the kernel may be slow, is left for the next sweep."""
        with suppress(OSError):
            (self.root / self.parent / guest_id).rmdir()

    def remove_all(self) -> None:
        """Remove every guest's that nothing is in."""
        with suppress(FileNotFoundError):
            for group in (self.root / self.parent).iterdir():
                if group.is_dir():
                    self.remove(group.name)


class Jail(Struct, frozen=True, kw_only=True):
    """How guests of this node are jailed. `network` is a namespace with nothing in it (a path that opens it)."""

    jailer: Path
    cgroups: Cgroups | None
    network: str | None


class JailedCell:
    """A cell in which the jailer starts Firecracker."""

    own_pids = True  # made by us: behind the jailer's `--new-pid-ns` no exit status would be heard

    def __init__(
        self,
        run: Path,
        guest_id: str,
        firecracker: Path,
        jail: Jail,
        *,
        vcpus: int,
        memory_mib: int,
        oom_score_adj: int,
    ) -> None:
        self.directory = run / guest_id
        self.root = self.directory / firecracker.name / guest_id / "root"
        self._guest_id = guest_id
        self._firecracker = firecracker
        self._jail = jail
        self._vcpus = vcpus
        self._memory_mib = memory_mib
        self._oom_score_adj = oom_score_adj
        self._user = user_of(guest_id)
        self._mounts: list[Path] = []

    def build(self) -> None:
        """See `Cell.build`."""
        (self.directory / MARK).touch(mode=0o600)
        self.root.mkdir(mode=0o700, parents=True)
        self.hand_over(self.root)

    def lend(self, source: Path, name: str) -> None:
        """See `Cell.lend`: by a link, which never changes whose the file is, or from elsewhere by a mount."""
        source, target = source.resolve(), self.root / name
        if not readable_by_all(source):
            raise PermissionError(unreadable(source))
        try:
            target.hardlink_to(source)
        except OSError:  # another file system, or one where nothing more may be linked
            target.touch()
            _mount(source, target, _MS_BIND)
            self._mounts.append(target)
            _mount(source, target, _MS_REMOUNT | _MS_BIND | _MS_RDONLY)

    def hand_over(self, path: Path) -> None:
        """See `Cell.hand_over`."""
        os.chown(path, self._user, self._user, follow_symlinks=False)

    def argv(self) -> tuple[str, ...]:
        """See `Cell.argv`."""
        user, jail = str(self._user), self._jail
        jailer = [str(jail.jailer), "--id", self._guest_id, "--exec-file", str(self._firecracker)]
        jailer += ["--uid", user, "--gid", user, "--chroot-base-dir", str(self.directory)]
        jailer += ["--resource-limit", f"fsize={(self._memory_mib + OVERHEAD_MIB) * 2**20}"]
        if jail.network is not None:
            jailer += ["--netns", jail.network]
        if jail.cgroups is not None:
            jailer += ["--cgroup-version", "2", "--parent-cgroup", jail.cgroups.parent]
            for file, value in self._bounds(jail.cgroups).items():
                jailer += ["--cgroup", f"{file}={value}"]
        firecracker = ["--api-sock", API_SOCKET, "--log-path", LOG, "--level", "Warning"]
        return started_in(self.directory, [*jailer, "--", *firecracker], oom_score_adj=self._oom_score_adj)

    def remove(self) -> None:
        """See `Cell.remove`."""
        while self._mounts:
            unmount(self._mounts[-1])
            self._mounts.pop()
        if self._jail.cgroups is not None:
            self._jail.cgroups.remove(self._guest_id)
        remove_cell(self.directory)

    def _bounds(self, cgroups: Cgroups) -> dict[str, int]:
        bounds = {
            "memory.max": (self._memory_mib + OVERHEAD_MIB) * 2**20,
            "pids.max": self._vcpus + _TASKS_BESIDE_VCPUS,
        }
        if (cgroups.root / cgroups.parent / "memory.swap.max").exists():
            bounds["memory.swap.max"] = 0
        return bounds


def readable_by_all(file: Path) -> bool:
    """Whether any user may read a file that it can reach, as a jail's user must. Raises `OSError`."""
    return bool(file.stat().st_mode & stat.S_IROTH)


def unreadable(file: Path) -> str:
    """What to say of one that they can't."""
    return f"the jailed Firecracker can't read {file}: run `chmod o+r {file}`"


def user_of(guest_id: str) -> int:
    """The user that a guest's process is."""
    return USERS[int.from_bytes(guest_id.encode()) % len(USERS)]


def users_exist() -> bool:
    """Whether this user namespace has the users that guests are to be."""
    lines = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return any(int(first) <= USERS.start and int(first) + int(count) >= USERS.stop for first, _, count in lines)


def usable_cgroups(root: Path | None, parent: str) -> Cgroups:
    """Ready a control group in which guests get theirs. Raises `NoJail` where memory and tasks can't be bounded."""
    root = root or unified_cgroups()
    if root is None:
        raise NoJail("guests can't have control groups of their own: version 2 of them is not mounted")
    cgroups = Cgroups(root=root, parent=parent)
    try:
        (root / parent).mkdir(exist_ok=True)
        for group in (root, root / parent):
            (group / "cgroup.subtree_control").write_text("+memory +pids")
    except OSError as error:
        raise NoJail(
            f"guests can't have control groups of their own below {root} ({error.strerror}): what they use counts as "
            "this daemon's. Delegate the controllers memory and pids there"
        ) from error
    return cgroups


def unified_cgroups() -> Path | None:
    """Where control groups of version 2 are mounted."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, directory, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(directory)
    return None


def mounts_below(directory: Path) -> list[Path]:
    """What is mounted below a directory, the newest first."""
    below = f"{directory.resolve()}/"
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    decoded = [point.encode().decode("unicode_escape").encode("latin-1").decode() for point in points]
    return [Path(point) for point in reversed(decoded) if point.startswith(below)]


def unmount(target: Path) -> None:
    """Take a mount away, whoever still uses it. Raises `OSError`: what is below must not be removed then."""
    if _libc.umount2(os.fsencode(target), _MNT_DETACH) != 0:
        raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())}: umount {target}")


def _mount(source: Path, target: Path, flags: int) -> None:
    if _libc.mount(os.fsencode(source), os.fsencode(target), None, ctypes.c_ulong(flags), None) != 0:
        raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())}: mount {source} at {target}")


if TYPE_CHECKING:
    _fits: type[Cell] = JailedCell
