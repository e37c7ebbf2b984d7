"""The file tree of a process guest: the host's programs to read, a few devices, and bounded memory to write."""

from __future__ import annotations

import os

from substrate_guest.syscalls import (
    AT_RECURSIVE,
    MNT_DETACH,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    call,
    mount,
    set_attributes,
    write,
)

TYPE_CHECKING = False  # importing `typing` would take as long as all that is done here
if TYPE_CHECKING:
    from collections.abc import Collection

HOME = "/home/guest"
SHOWN = MS_RDONLY | MS_NOSUID | MS_NODEV
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store")
SETTINGS = (
    *("alternatives", "ca-certificates", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "mime.types"),
    *("os-release", "pki", "protocols", "services", "ssl"),
)
"""What the guest sees of the host's `/etc`."""
DEVICES = ("null", "zero", "full", "random", "urandom")
WRITABLE = ("/tmp", "/var/tmp", "/dev/shm", "/run", HOME)  # noqa: S108  # the guest's own, on a file system of its own
STAGE, NOTHING = "/mnt/stage", "/mnt/nothing"
"""Where that file system is put together, and what covers it afterwards."""
IDENTITY = "/etc/guest"
"""What tells one guest from another, behind the usual names of these files."""
BOOT_ID = "/proc/sys/kernel/random/boot_id"
LINKS_MAX = 40


class Identity:
    """What a guest's own files say it is."""

    def __init__(self, hostname: str, boot_id: str) -> None:
        self.hostname = hostname
        self.boot_id = boot_id


def build(base: str, user: int) -> None:
    """Put the tree together at `base`, on a file system in memory; `user` is who the guest sees itself as."""
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    mount("root", base, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m,nr_inodes=4096")
    tree = Tree(base)
    for path in ("/dev", "/proc", STAGE, NOTHING, IDENTITY, *WRITABLE):
        tree.make_directory(path)
    _make_devices(base)
    tree.write("/etc/passwd", f"guest:x:{user}:{user}::{HOME}:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n")
    tree.write("/etc/group", f"guest:x:{user}:\nnogroup:x:65534:\n")
    tree.write("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n")
    for name in ("hostname", "hosts", "machine-id"):
        os.symlink(f"guest/{name}", f"{base}/etc/{name}")  # noqa: PTH211  # pathlib is slow to import


def show(base: str, visible: Collection[str]) -> None:
    """Let the guest see the host's programs and `visible`, read-only, and nothing else that it could not write to."""
    tree = Tree(base)
    for path in (*SYSTEM, *(f"/etc/{name}" for name in SETTINGS)):
        if os.path.lexists(path):
            tree.show(path)
    for path in visible:
        tree.show(path)
    set_attributes(base, SHOWN, 0)


def enter(base: str) -> None:
    """Make the tree the root, and let go of the host's."""
    os.chdir(base)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")


def furnish(
    base: str, identity: Identity, writable_mib: int, *, owner: int | None = None, keep: Collection[str] | None = None
) -> None:
    """Give the tree at `base` files of the guest's own: one file system behind all places that it may write.

    One bound of `writable_mib` MiB holds for them all, and they belong to `owner`, or to whoever makes them. With
    `keep`, what is there already is taken along: those of its paths that are mounts as such, all else as a copy.
    """
    stage = base + STAGE
    mount(
        "writable",
        stage,
        "tmpfs",
        MS_NOSUID | MS_NODEV,
        f"mode=755,size={writable_mib}m,nr_inodes={writable_mib * 256}",
    )
    for number, path in enumerate(WRITABLE):
        place = f"{stage}/{number}"
        os.mkdir(place)  # noqa: PTH102
        os.chmod(place, 0o700 if path == HOME else 0o1777)  # noqa: PTH101
        if owner is not None:
            os.chown(place, owner, owner)
        if keep is not None:
            _take_along(path, place, keep)
        mount(place, base + path, "", MS_BIND | MS_REC)
    os.mkdir(f"{stage}/identity")  # noqa: PTH102
    write(f"{stage}/identity/hostname", f"{identity.hostname}\n", os.O_CREAT)
    write(f"{stage}/identity/hosts", f"127.0.0.1 localhost {identity.hostname}\n::1 localhost\n", os.O_CREAT)
    write(f"{stage}/identity/machine-id", f"{os.urandom(16).hex()}\n", os.O_CREAT)
    write(f"{stage}/identity/boot_id", f"{identity.boot_id}\n", os.O_CREAT)
    _bind_read_only(f"{stage}/identity", base + IDENTITY)
    # Not unmounted: the kernel would have us wait until all its processors have heard of it. A guest can't uncover it.
    _bind_read_only(base + NOTHING, stage)


def show_processes(base: str) -> None:
    """Mount a `/proc` of the pid namespace. Raises `OSError`."""
    mount("proc", f"{base}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)


def stand_in_for_boot_id(base: str) -> None:
    """Show the guest a boot id of its own; from then on the kernel refuses another proc in this namespace and below."""
    _bind_read_only(f"{base}{IDENTITY}/boot_id", base + BOOT_ID)


def _bind_read_only(source: str, target: str) -> None:
    mount(source, target, "", MS_BIND)
    set_attributes(target, SHOWN, 0)


def _take_along(source: str, target: str, mounts: Collection[str]) -> None:
    """Have in directory `target` what is in `source`; sockets and pipes stay behind, nobody is at their other end."""
    for entry in os.scandir(source):
        copy = f"{target}/{entry.name}"
        if entry.path in mounts:
            if entry.is_dir(follow_symlinks=False):
                os.mkdir(copy)  # noqa: PTH102
            else:
                write(copy, "", os.O_CREAT)
            mount(entry.path, copy, "", MS_BIND | MS_REC)
        elif entry.is_symlink():
            os.symlink(os.readlink(entry.path), copy)  # noqa: PTH115, PTH211
        elif entry.is_dir():
            os.mkdir(copy)  # noqa: PTH102
            _take_along(entry.path, copy, mounts)
            os.chmod(copy, entry.stat().st_mode & 0o7777)  # noqa: PTH101
        elif entry.is_file():
            _copy(entry.path, copy, entry.stat().st_mode & 0o7777)


def _copy(source: str, target: str, mode: int) -> None:
    with open(source, "rb") as old, open(target, "xb") as new:  # noqa: PTH123
        left_bytes = os.fstat(old.fileno()).st_size
        while left_bytes > 0 and (copied := os.sendfile(new.fileno(), old.fileno(), None, left_bytes)):
            left_bytes -= copied
        os.fchmod(new.fileno(), mode)


class Tree:
    """The file tree that the guest will see, while it is being put together at `base`."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._shown: list[str] = []

    def show(self, path: str, links: int = 0) -> None:
        """Let the guest see `path` of the host, and the way there over any symbolic links."""
        way = ""
        names = path.strip("/").split("/")
        for number, name in enumerate(names):
            here = f"{way}/{name}"
            if os.path.islink(here) and links < LINKS_MAX:  # noqa: PTH114
                target = os.readlink(here)  # noqa: PTH115
                if not self._is_shown(here) and not os.path.lexists(self._base + here):
                    self.make_directory(way)
                    os.symlink(target, self._base + here)  # noqa: PTH211
                beyond = os.path.join(f"{way}/", target, *names[number + 1 :])  # noqa: PTH118
                self.show(os.path.normpath(beyond), links + 1)
                return
            way = here
        if not self._is_shown(way):
            self._bind(way)

    def _is_shown(self, path: str) -> bool:
        return any(path == shown or path.startswith(shown + "/") for shown in self._shown)

    def _bind(self, path: str) -> None:
        if os.path.isdir(path):  # noqa: PTH112
            self.make_directory(path)
        else:
            self.write(path, "")
        self._shown.append(path)
        mount(path, self._base + path, "", MS_BIND | MS_REC)
        set_attributes(self._base + path, SHOWN, AT_RECURSIVE)

    def make_directory(self, path: str) -> None:
        """Have a directory at `path` of the tree."""
        os.makedirs(self._base + path, exist_ok=True)  # noqa: PTH103

    def write(self, path: str, text: str) -> None:
        """Have a file at `path` of the tree."""
        self.make_directory(path.rpartition("/")[0])
        write(self._base + path, text, os.O_CREAT | os.O_EXCL)


def _make_devices(base: str) -> None:
    """The few devices that programs expect, and the links beside them."""
    mount("dev", f"{base}/dev", "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755,size=64k,nr_inodes=64")
    for name in DEVICES:
        write(f"{base}/dev/{name}", "", os.O_CREAT | os.O_EXCL)
        mount(f"/dev/{name}", f"{base}/dev/{name}", "", MS_BIND)
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(f"/proc/self/{target}", f"{base}/dev/{name}")  # noqa: PTH211
    os.mkdir(f"{base}/dev/shm")  # noqa: PTH102, S108
    set_attributes(f"{base}/dev", MS_RDONLY, 0)
