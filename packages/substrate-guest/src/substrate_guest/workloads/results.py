"""Which files a snippet left behind, read without being led anywhere else."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from substrate_guest.workloads.snippet import DEPTH_MAX, FILE_BYTES_MAX, FILES_BYTES_MAX, FILES_MAX

ENTRIES_MAX = 10_000


class Results:
    """The regular files below a directory that are new or differ from what was there; `truncated` if some are missing.

    Links and special files are left out, whatever they point to. Files above the bounds are left out and counted as
    truncated.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.truncated = False
        self._bytes = 0
        self._entries = 0

    def collect(self, directory: Path, given: Mapping[str, bytes]) -> None:
        """Read what is new below `directory`, where the files `given` (path to content) were put."""
        # Every step goes through the descriptor of its directory, so that swapping a name for a link leads nowhere.
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            for path, content in self._read(descriptor, "", DEPTH_MAX):
                if given.get(path) != content:
                    self._keep(path, content)
        finally:
            os.close(descriptor)

    def _keep(self, path: str, content: bytes) -> None:
        if len(self.files) >= FILES_MAX or self._bytes + len(content) > FILES_BYTES_MAX:
            self.truncated = True
            return
        self.files[path] = content
        self._bytes += len(content)

    def _read(self, directory: int, prefix: str, depth: int) -> Iterator[tuple[str, bytes]]:
        with os.scandir(directory) as scan:
            entries = list(islice(scan, ENTRIES_MAX - self._entries + 1))
        self._entries += len(entries)
        if self._entries > ENTRIES_MAX or depth == 0:
            self.truncated = self.truncated or bool(entries)
            return
        for entry in sorted(entries, key=lambda entry: entry.name):
            try:
                yield from self._read_entry(directory, entry, prefix, depth)
            except (OSError, UnicodeEncodeError):  # gone, or unreadable by choice, or a name that JSON cannot carry
                self.truncated = True

    def _read_entry(
        self, directory: int, entry: os.DirEntry[str], prefix: str, depth: int
    ) -> Iterator[tuple[str, bytes]]:
        path = prefix + entry.name
        path.encode()
        if entry.is_dir(follow_symlinks=False):
            inner = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
            try:
                yield from self._read(inner, f"{path}/", depth - 1)
            finally:
                os.close(inner)
        elif entry.is_file(follow_symlinks=False):
            content = _content(directory, entry.name)
            if content is None:
                self.truncated = True
            else:
                yield path, content


def _content(directory: int, name: str) -> bytes | None:
    """The content of a regular file, or `None` when it is too big or not a regular file any more."""
    # Without O_NONBLOCK, opening a pipe that has taken the file's place would wait for its writer.
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    with open(descriptor, "rb") as file:  # noqa: PTH123  # by descriptor
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        content = file.read(FILE_BYTES_MAX + 1)
        return content if len(content) <= FILE_BYTES_MAX else None
