"""Under what conditions a run was made: without them its numbers mean nothing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from msgspec import Struct

LIBRARIES = ("uvicorn", "uvloop", "httptools", "starlette", "msgspec")
QUIET_LOAD = 0.5
"""A load average per core from which on a run says loudly that it is worth little."""


class Conditions(Struct, frozen=True):
    """The machine, what ran on it, and how busy it was when the run began."""

    began: str
    processor: str
    cores: int
    memory_mib: int
    kernel: str
    distribution: str
    versions: dict[str, str]
    load_average: float

    @property
    def quiet(self) -> bool:
        return self.load_average < QUIET_LOAD * self.cores


def conditions() -> Conditions:
    """Those of this moment."""
    return Conditions(
        began=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        processor=_first(r"model name\s*: (.+)", Path("/proc/cpuinfo")) or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_mib=int(_first(r"MemTotal: +([0-9]+)", Path("/proc/meminfo")) or 0) // 1024,
        kernel=platform.release(),
        distribution=_first(r'PRETTY_NAME="(.+)"', Path("/etc/os-release")) or "unknown",
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in LIBRARIES},
            **{name: told for name, argv in _PROGRAMS.items() if (told := said_by(argv))},
        },
        load_average=round(os.getloadavg()[0], 2),
    )


_PROGRAMS = {
    "nginx": ("nginx", "-v"),
    "bubblewrap": ("bwrap", "--version"),
    "system python": ("/usr/bin/python3", "--version"),
}


def said_by(argv: tuple[str, ...]) -> str | None:
    """The version in a program's own words; None if it is not here."""
    if shutil.which(argv[0]) is None:
        return None
    told = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    found = re.search(r"[0-9]+(?:\.[0-9]+)+", told.stdout + told.stderr)
    return found[0] if found else None


def warn_if_loaded(now: Conditions) -> None:
    """Say loudly that ratios of a busy machine are not to be quoted."""
    if not now.quiet:
        print(
            f"\n!!! This machine is busy: a load average of {now.load_average} on {now.cores} cores. What follows shows"
            "\n!!! that the benchmark works, and little else. Run it again when the machine is quiet.\n",
            file=sys.stderr,
        )


def as_text(now: Conditions) -> str:
    """The conditions in a paragraph."""
    versions = ", ".join(f"{name} {number}" for name, number in now.versions.items())
    return (
        f"{now.began}: {now.processor}, {now.cores} cores, {now.memory_mib:,} MiB; Linux {now.kernel}, "
        f"{now.distribution}; load average {now.load_average}; {versions}.\n"
    )


def _first(pattern: str, file: Path) -> str | None:
    try:
        found = re.search(pattern, file.read_text())
    except OSError:
        return None
    return found[1] if found else None
