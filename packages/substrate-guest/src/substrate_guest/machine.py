"""A machine of our own, made ready for a workload: its file systems, its loopback, its console."""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from substrate_guest.confinement import bring_loopback_up
from substrate_guest.syscalls import MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY, call, mount

MS_REMOUNT = 0x20
OURS = "/run/substrate"
"""Where files are kept that stand in for read-only ones."""
CONSOLE = "/dev/console"
RESTART = 0x0123_4567
MOUNTS = (
    ("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
    ("sys", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
    ("dev", "/dev", "devtmpfs", MS_NOSUID | MS_NOEXEC, "mode=755"),
    ("pts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "mode=620,ptmxmode=666"),
    ("shm", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=1777,size=25%"),  # noqa: S108  # the guest's own
    ("run", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=10%"),
    ("tmp", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=40%"),  # noqa: S108  # the guest's own
)
"""What is mounted, in this order; what may be written to is bounded by a part of the memory."""
LINKS = (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2"))


def set_up() -> None:
    """Mount what programs expect, let the machine talk to itself, and have a console. Raises `OSError`.

    The root is read-only from now on, whatever it was.
    """
    mount("none", "/", "", MS_REMOUNT | MS_BIND | MS_RDONLY)
    for source, target, kind, flags, options in MOUNTS:
        if target.startswith("/dev/"):
            with suppress(FileExistsError):
                os.mkdir(target, 0o755)  # noqa: PTH102  # pathlib is slow to import
        try:
            mount(source, target, kind, flags, options)
        except OSError as error:
            if error.errno != errno.EBUSY:  # which says that the kernel has mounted it there itself, as it may /dev
                raise
    for name, target in LINKS:
        with suppress(FileExistsError):
            os.symlink(target, f"/dev/{name}")  # noqa: PTH211
    os.mkdir(OURS, 0o755)  # noqa: PTH102
    bring_loopback_up()
    _have_console()


def stand_in(path: str, text: str) -> None:
    """Let `text` be read at `path` although nobody can write there; raises `OSError` when there is no such file."""
    kept = f"{OURS}/{path.rpartition('/')[2]}"
    known = os.path.exists(kept)  # noqa: PTH110
    os.stat(path)  # noqa: PTH116  # before anything is written: without it there is nothing to stand in for
    with open(kept, "w", encoding="ascii") as file:  # noqa: PTH123
        file.write(text)
    if not known:
        mount(kept, path, "", MS_BIND)


def restart() -> None:
    """End the machine: a monitor takes a restart for the end. Raises `OSError` where that is not ours to do."""
    os.sync()
    call("reboot", RESTART)


def _have_console() -> None:
    """Give each standard stream that the kernel could not open something to hold on to."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(CONSOLE, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
