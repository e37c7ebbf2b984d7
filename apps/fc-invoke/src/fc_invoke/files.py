"""A developer's files: what they were when last looked at, and whether one has changed since."""

from __future__ import annotations

import os
from collections.abc import Iterator

from substrate_node.procvm.inputs import own_output

PASSED_OVER = {"__pycache__", "node_modules"}
"""Folders in which nobody writes by hand; those whose name begins with a dot are passed over too."""

Sight = dict[str, tuple[int, int, int]]
"""Inode, size in bytes and nanoseconds of the last change of each file, by path."""


def seen(directory: str) -> Sight:
    """Every file below a directory as it is now, but for those of virtual environments. Blocks; never raises.

    What this process itself says into a file there is no change (see `own_output`).
    """
    return dict(_files(directory, own_output()))


def _files(directory: str, passed_over: frozenset[tuple[int, int]]) -> Iterator[tuple[str, tuple[int, int, int]]]:
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
                    yield from _files(entry.path, passed_over)
                continue
            status = entry.stat()
        except OSError:
            continue
        if (status.st_dev, status.st_ino) not in passed_over:
            yield entry.path, (status.st_ino, status.st_size, status.st_mtime_ns)
