"""The node's place on disk: one daemon at a time, readable by nobody else, its parts known by name."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from msgspec import Struct


class StateRootUnusable(Exception):
    """The state root can't be used; the message says why and what to do."""


class StateRoot(Struct, frozen=True, kw_only=True):
    """A locked state root: `run/<guest>/`, `bases/` and `images/` lie below `path`."""

    path: Path
    boot_id: str

    @property
    def run(self) -> Path:
        """One directory for each guest."""
        return self.path / "run"

    @property
    def bases(self) -> Path:
        """Captured bases, by content."""
        return self.path / "bases"

    @property
    def images(self) -> Path:
        """Root file systems made of images, by content."""
        return self.path / "images" / "sha256"


def default_state_root(name: str, environ: Mapping[str, str]) -> Path:
    """Where a daemon of this name keeps its state: `/var/lib` as root, else the user's own state directory."""
    if os.geteuid() == 0:
        return Path("/var/lib") / name
    home = environ.get("XDG_STATE_HOME") or str(Path(environ.get("HOME") or "/tmp") / ".local" / "state")  # noqa: S108  # a user without a home
    return Path(home) / name


@contextmanager
def locked_state_root(path: Path, *, boot_id: str, setting: str) -> Iterator[StateRoot]:
    """Own the state root for the length of the block. `boot_id` is written down in it; `setting` names it in errors.

    Raises `StateRootUnusable`: another daemon runs there, or others could read or change what is in it.
    """
    with ExitStack() as undo:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            refuse_shared(path, setting)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            undo.callback(os.close, lock)  # which unlocks; the file stays, or two daemons could lock two of one name
            _take(lock, path, setting)
            (path / "boot-id").write_text(f"{boot_id}\n")
            for part in (path / "run", path / "bases", path / "images" / "sha256"):
                part.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StateRootUnusable(f"{setting}: {path} can't be used: {error.strerror}. Choose another.") from error
        yield StateRoot(path=path, boot_id=boot_id)


def abandoned(parent: Path, prefix: str) -> list[Path]:
    """Our own state roots in `parent` by the beginning of their names, once locked; who locks one learns if it is used.

    One that no daemon has written its pid in yet may be about to be used.
    """
    found = []
    for path in sorted(parent.glob(f"{prefix}*")):
        try:
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            lock = (path / "lock").lstat()
        except OSError:
            continue
        if stat.S_ISREG(lock.st_mode) and lock.st_size:
            found.append(path)
    return found


def refuse_shared(path: Path, setting: str) -> None:
    """Raise `StateRootUnusable` if a directory is another user's or open to others."""
    found = path.stat()
    if found.st_uid != os.geteuid():
        raise StateRootUnusable(f"{setting}: {path} belongs to uid {found.st_uid}, not to us. Choose another.")
    if stat.S_IMODE(found.st_mode) & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise StateRootUnusable(f"{setting}: {path} is open to others (mode {mode:o}). Run `chmod 700 {path}`.")


def _take(lock: int, path: Path, setting: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 32, 0).decode("ascii", "replace").strip() or "unknown"
        raise StateRootUnusable(
            f"{setting}: another daemon (pid {holder}) runs on {path}. Stop it, or choose another state root."
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
