"""Where one Firecracker process lives: its directory, what it may see there, and how it is started in it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

MARK = "microvm"
"""A file by which a directory is known to be of a microVM, whose processes are found by their working directory."""
API_SOCKET, LOG, VSOCK = "api.sock", "log", "v.sock"
_FIRECRACKER = ("--api-sock", API_SOCKET, "--log-path", LOG, "--level", "Warning")
_DESCRIPTORS_MAX = 2048
"""Firecracker readies a table of so many when it starts; a larger one makes every restore slower."""
_START = f"""\
cd "$1" || exit 1
[ "$2" = 0 ] || echo "$2" >/proc/self/oom_score_adj
ulimit -c 0
ulimit -n {_DESCRIPTORS_MAX}
shift 2
exec "$@"
"""
"""A shell does what must be done in the new process and before its program: 1 ms, and the process stays the same."""


class Cell(Protocol):
    """The place of one guest. Everything of it lies below `directory`; Firecracker calls `root` its own directory."""

    directory: Path
    root: Path
    own_pids: bool
    """Whether the process gets a pid namespace of its own."""

    def build(self) -> None:
        """Furnish the directory, which is there. Raises `OSError`."""
        ...

    def lend(self, source: Path, name: str) -> None:
        """Let the process read a file of the host as `name`, and never write it. Raises `OSError`."""
        ...

    def hand_over(self, path: Path) -> None:
        """Let the process use a file that was made for it below `root`. Raises `OSError`."""
        ...

    def argv(self) -> tuple[str, ...]:
        """What to start."""
        ...

    def remove(self) -> None:
        """Leave nothing of it, once no process is left; removing what is not there succeeds. May block."""
        ...


class PlainCell:
    """A directory of the daemon's, with the daemon's rights: files of the host are linked into it by name."""

    own_pids = False

    def __init__(self, run: Path, guest_id: str, firecracker: Path, *, oom_score_adj: int) -> None:
        self.directory = self.root = run / guest_id
        self._guest_id = guest_id
        self._firecracker = firecracker
        self._oom_score_adj = oom_score_adj

    def build(self) -> None:
        """See `Cell.build`."""
        (self.directory / MARK).touch(mode=0o600)

    def lend(self, source: Path, name: str) -> None:
        """See `Cell.lend`."""
        (self.root / name).symlink_to(source.absolute())

    def hand_over(self, path: Path) -> None:
        """See `Cell.hand_over`: they are one user."""

    def argv(self) -> tuple[str, ...]:
        """See `Cell.argv`."""
        firecracker = (str(self._firecracker), "--id", self._guest_id, *_FIRECRACKER)
        return started_in(self.root, firecracker, oom_score_adj=self._oom_score_adj)

    def remove(self) -> None:
        """See `Cell.remove`."""
        remove_cell(self.directory)


def started_in(directory: Path, argv: Sequence[str], *, oom_score_adj: int) -> tuple[str, ...]:
    """A command that becomes `argv`, in `directory`, with the limits of a guest's process. It needs no environment."""
    return ("/bin/sh", "-c", _START, "sh", str(directory), str(oom_score_adj), *argv)


def remove_cell(directory: Path) -> None:
    """Remove the directory of a guest and all below it, if it is there, its mark last. Raises `OSError`."""
    with suppress(FileNotFoundError):
        for entry in directory.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != MARK:
                entry.unlink(missing_ok=True)
        shutil.rmtree(directory)


if TYPE_CHECKING:
    _fits: type[Cell] = PlainCell
