"""A developer's files: what they were when last looked at, and whether one has changed since."""

from __future__ import annotations

import os
from collections.abc import Iterator

PASSED_OVER = {"__pycache__", "node_modules"}
"""Folders in which nobody writes by hand; those whose name begins with a dot are passed over too."""

Sight = dict[str, tuple[int, int, int]]
"""Inode, size in bytes and nanoseconds of the last change of each file, by path."""


def seen(directory: str) -> Sight:
    """Every file below a directory as it is now, but for those of virtual environments. Blocks; never raises."""
    return dict(_files(directory))


def _files(directory: str) -> Iterator[tuple[str, tuple[int, int, int]]]:
    try:
        with os.scandir(directory) as found:
            entries = list(found)
    except OSError:
        return
    if any(entry.name == "pyvenv.cfg" for entry in entries):
        return
    for entry in entries:
        try:
            if entry.is_dir(follow_symlinks=False):
                if entry.name not in PASSED_OVER and not entry.name.startswith("."):
                    yield from _files(entry.path)
                continue
            status = entry.stat()
        except OSError:
            continue
        yield entry.path, (status.st_ino, status.st_size, status.st_mtime_ns)
