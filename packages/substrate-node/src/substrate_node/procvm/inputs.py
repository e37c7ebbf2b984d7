"""What a warm base of a process guest is made of, as one digest: whatever differs here must not share a base."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import file_digest, sha256

import msgspec

_SKIPPED = {"__pycache__", ".git"}
"""Directories that follow from the rest, or that no program reads."""

_Seen = tuple[int, int, int]
"""Inode, size in bytes and time of the last change in nanoseconds: while they stay, so does what is in a file."""


def own_output() -> frozenset[tuple[int, int]]:
    """Device and inode of this process's standard output and errors, as far as they are open.

    A file that it writes while it serves is nobody's input: each line would ask for a new base, which tells of itself.
    """
    own = set()
    for stream in (1, 2):
        with suppress(OSError):
            status = os.fstat(stream)
            own.add((status.st_dev, status.st_ino))
    return frozenset(own)


class Inputs:
    """Digests of workloads' inputs. What is in each file is read once, and again when the file has changed.

    What this process itself writes to (see `own_output`) is passed over.

    Its methods read files and may take long: use it away from the loop, in one thread at a time.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[_Seen, str]] = {}
        self._own: frozenset[tuple[int, int]] = frozenset()

    def key(
        self, tree: str | None, *, interpreter: str, argv: Sequence[str], env: Mapping[str, str], memory_mib: int
    ) -> str:
        """The digest, in hex, of the files below `tree`, the interpreter, and how it is started. Raises `OSError`."""
        self._own = own_output()
        members = {
            "tree": [] if tree is None else list(self._entries(tree, "")),
            "interpreter": (interpreter, self._content(interpreter, os.stat(interpreter))),  # noqa: PTH116
            "path": tree,
            "argv": list(argv),
            "env": sorted(env.items()),
            "memory_mib": memory_mib,
        }
        return sha256(msgspec.json.encode(members)).hexdigest()

    def _entries(self, root: str, below: str) -> Iterator[tuple[str, str, str]]:
        """Name, kind and content of everything in a directory, in an order that is always the same."""
        directory = os.path.join(root, below)  # noqa: PTH118  # thousands of Paths would be most of the work
        with os.scandir(directory) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            name = f"{below}{entry.name}"
            if entry.is_symlink():
                yield name, "link", os.readlink(entry.path)  # noqa: PTH115
            elif entry.is_dir():
                if entry.name not in _SKIPPED:
                    yield name, "directory", ""
                    yield from self._entries(root, f"{name}/")
            elif entry.is_file():
                status = entry.stat()
                if (status.st_dev, status.st_ino) in self._own:
                    continue
                kind = "program" if status.st_mode & stat.S_IXUSR else "file"
                yield name, kind, self._content(entry.path, status)

    def _content(self, path: str, status: os.stat_result) -> str:
        seen = (status.st_ino, status.st_size, status.st_mtime_ns)
        known = self._known.get(path)
        if known is None or known[0] != seen:
            with open(path, "rb") as file:  # noqa: PTH123
                known = self._known[path] = seen, file_digest(file, "sha256").hexdigest()
        return known[1]
