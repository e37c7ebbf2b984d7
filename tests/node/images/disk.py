"""What others find in a file system that we made: e2fsck, debugfs and the kernel."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_KINDS = {
    "regular": stat.S_IFREG,
    "directory": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "character special": stat.S_IFCHR,
    "block special": stat.S_IFBLK,
    "FIFO": stat.S_IFIFO,
}


class Found(NamedTuple):
    """One name as debugfs, or the kernel, shows it."""

    inode: int
    mode: int
    uid: int
    gid: int
    size: int
    links: int
    mtime_ns: int


def checked(path: Path) -> Path:
    """The file system, with which e2fsck has no quarrel."""
    done = subprocess.run(
        ["e2fsck", "-fn", str(path)], capture_output=True, text=True, timeout=120, check=False, env=_plain_words()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def debugfs(path: Path, command: str) -> str:
    """What debugfs answers to one command."""
    done = subprocess.run(
        ["debugfs", "-R", command, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=_plain_words(),
        errors="surrogateescape",
    )
    complaints = done.stderr.splitlines()[1:]  # the first line is the version
    assert not complaints, complaints
    return done.stdout


def stat_of(path: Path, name: str) -> Found:
    """The inode of a name, as `debugfs stat` shows it."""
    told = debugfs(path, f'stat "{name}"')

    def number(label: str) -> int:
        found, *_ = re.findall(rf"\b{label}:\s+(-?\d+)", told)
        return int(found)

    (kind,) = re.findall(r"Type: (.*?)\s+Mode:", told)
    (mode,) = re.findall(r"Mode:\s+(\d+)", told)
    (seconds, extra), *_ = re.findall(r"^ mtime: 0x([0-9a-f]+):([0-9a-f]+)", told, re.MULTILINE)
    signed = int.from_bytes(bytes.fromhex(seconds), "big", signed=True)
    mtime_ns = (signed + ((int(extra, 16) & 3) << 32)) * 10**9 + (int(extra, 16) >> 2)
    size = 0 if "special" in kind or kind == "FIFO" else number("Size")
    return Found(
        number("Inode"),
        _KINDS[kind] | int(mode, 8),
        number("User") % 2**32,
        number("Group") % 2**32,
        size,
        number("Links"),
        mtime_ns,
    )


def attributes_of(path: Path, name: str) -> dict[str, bytes]:
    """The extended attributes of a name, as debugfs reads them."""
    names = re.findall(r"^  (\S+) \(\d+\)", debugfs(path, f'ea_list "{name}"'), re.MULTILINE)
    found = {}
    for attribute in names:
        with tempfile.NamedTemporaryFile() as value:
            debugfs(path, f'ea_get -f {value.name} "{name}" {attribute}')
            found[attribute] = Path(value.name).read_bytes()
    return found


def content_of(path: Path, name: str) -> bytes:
    """The bytes of a file, as debugfs reads them."""
    with tempfile.NamedTemporaryFile() as copy:
        debugfs(path, f'dump "{name}" {copy.name}')
        return Path(copy.name).read_bytes()


def names_in(path: Path, name: str) -> set[str]:
    """What a directory holds, but for itself and its parent."""
    lines = debugfs(path, f'ls -p "{name}"').splitlines()
    return {line.split("/")[5] for line in lines if line.startswith("/")} - {".", ".."}


@contextmanager
def mounted(path: Path, where: Path) -> Iterator[Path]:
    """The file system, mounted by the kernel."""
    where.mkdir()
    subprocess.run(["mount", "-o", "loop,ro", str(path), str(where)], timeout=60, check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], timeout=60, check=True)


def seen_by_kernel(path: Path) -> Found:
    """What `lstat` shows."""
    found = path.lstat()
    size = found.st_size if not stat.S_ISDIR(found.st_mode) else 0
    return Found(found.st_ino, found.st_mode, found.st_uid, found.st_gid, size, found.st_nlink, found.st_mtime_ns)


def _plain_words() -> dict[str, str]:
    return os.environ | {"LC_ALL": "C", "TZ": "UTC", "DEBUGFS_PAGER": "cat", "PAGER": "cat"}
