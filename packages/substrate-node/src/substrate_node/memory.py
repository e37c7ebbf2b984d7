"""How much memory this machine, or the container we are in, has for guests."""

from __future__ import annotations

from pathlib import Path

_MIB = 1024 * 1024
_RESERVE_MIB_MIN = 512
_CGROUP_FILES = ("memory.max", "memory.limit_in_bytes")  # version 2, version 1


def default_memory_mib(*, root: Path = Path("/")) -> int:
    """MiB for guests: the least of the machine's memory and our cgroup limits, less a reserve of 10 %, 512 MiB or more.

    `root` is where `/proc` and `/sys` are looked up. Never less than 0.
    """
    limits_mib = [_machine_mib(root), *_cgroup_limits_mib(root)]
    whole_mib = min(limits_mib)
    return max(0, whole_mib - max(_RESERVE_MIB_MIN, whole_mib // 10))


def _machine_mib(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) // 1024
    return 0


def _cgroup_limits_mib(root: Path) -> list[int]:
    """The limits of our cgroup and of all above it, in either version; one without a limit tells a huge number."""
    limits = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        mount = controllers or "unified"
        for top in (root / "sys/fs/cgroup", root / "sys/fs/cgroup" / mount):
            below = top / path.lstrip("/")
            for directory in (below, *below.parents):
                if not directory.is_relative_to(top):
                    break
                limits += [int(text) // _MIB for name in _CGROUP_FILES if (text := _text(directory / name)).isdigit()]
    return limits


def _lines(path: Path) -> list[str]:
    return _text(path).splitlines()


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
