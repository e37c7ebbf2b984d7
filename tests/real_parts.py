"""Which real parts of a machine the tests need, how much work they do, and an honest account of what was left out.

A plain run skips a test whose parts are absent and says so in its last lines. With `SUBSTRATE_TESTS=full` an absent
part is a failure, and simulations and fuzzers get their full budgets. Run as a program it prints the Debian packages
that would bring the absent parts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest

FULL = "full"
SEEDS_PLAIN, SEEDS_FULL = 300, 10_000
FUZZ_FACTOR = 25
"""So many times the examples of a plain run are tried in a full one."""
_NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000
"""CLONE_NEWUSER, NEWNS, NEWPID, NEWNET, NEWIPC and NEWUTS."""


class Part(NamedTuple):
    """Something of a real machine: whether it is here, what would help if not, and the Debian package that has it."""

    present: Callable[[], bool]
    cure: str
    package: str | None = None


def program(name: str, package: str) -> Part:
    """A program on the search path."""
    return Part(lambda: shutil.which(name) is not None, f"install the Debian package {package}", package)


def _namespaces_can_be_made() -> bool:
    """Try it in a process of its own, which may then be thrown away."""
    attempt = f"import ctypes; raise SystemExit(ctypes.CDLL(None).unshare({_NAMESPACES}) != 0)"
    return subprocess.run([sys.executable, "-c", attempt], timeout=30, check=False).returncode == 0


def _pidfds_work() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


SYSTEM_PYTHON = "/usr/bin/python3"
"""The distribution's interpreter, which every user may run; the one of the tests may lie in somebody's home."""


def _control_groups_can_be_made() -> bool:
    """Whether memory, tasks and processors of a group of version 2 can be bounded by whoever runs the tests."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    root = next((Path(place) for _, place, kind, *_ in mounts if kind == "cgroup2"), None)
    if root is None:
        return False
    group = root / f"substrate-tests-{os.getpid()}"
    try:
        (root / "cgroup.subtree_control").write_text("+memory +pids +cpu")
        group.mkdir()
        group.rmdir()
    except OSError:
        return False
    return True


def _loops_can_be_mounted() -> bool:
    """Whether the kernel itself can be asked what is in a file system."""
    if os.geteuid() != 0 or shutil.which("losetup") is None or shutil.which("mount") is None:
        return False
    asked = subprocess.run(["losetup", "--find"], capture_output=True, timeout=30, check=False)
    return asked.returncode == 0 and "\text4\n" in Path("/proc/filesystems").read_text()


def _system_python_fits() -> bool:
    """Whether it loads the extension modules that are installed for the tests' interpreter."""
    ask = [SYSTEM_PYTHON, "-c", "import sys, venv; print(sys.implementation.cache_tag)"]
    try:
        told = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    return told.strip() == sys.implementation.cache_tag


PARTS: dict[str, Part] = {
    "root": Part(lambda: os.geteuid() == 0, "run the tests as root"),
    "user-namespaces": Part(_namespaces_can_be_made, "allow user namespaces: sysctl user.max_user_namespaces=10000"),
    "system-python": Part(
        _system_python_fits, "install the distribution's Python of the tests' version, with venv", "python3-venv"
    ),
    "debugfs": program("debugfs", "e2fsprogs"),
    "e2fsck": program("e2fsck", "e2fsprogs"),
    "loop-mount": Part(_loops_can_be_mounted, "run the tests as root on a kernel with loop devices and ext4"),
    "control-groups": Part(
        _control_groups_can_be_made,
        "run the tests as root on a machine with control groups of version 2 (`tools/emulated_machine.py run` is one)",
    ),
    "curl": program("curl", "curl"),
    "gcc": program("gcc", "build-essential"),
    "nginx": program("nginx", "nginx-light"),
    "bubblewrap": program("bwrap", "bubblewrap"),
    "chromium": program("chromium", "chromium"),
    "x86-64-glibc": Part(
        lambda: os.uname().machine == "x86_64" and Path("/lib64/ld-linux-x86-64.so.2").exists(),
        "run the tests on x86-64 with glibc",
    ),
    "pidfd": Part(_pidfds_work, "use Linux 5.3 or newer, and a sandbox that allows pidfd_open"),
}
"""A part joins this table together with the first test that needs it."""


@cache
def is_present(part: str) -> bool:
    """Whether the machine has it; asked once."""
    return PARTS[part].present()


def needs(*parts: str) -> pytest.MarkDecorator:
    """Mark a test that runs only where these real parts are. Raises `KeyError` for a part that nobody has described."""
    unknown = set(parts) - PARTS.keys()
    if unknown:
        raise KeyError(f"no such part: {', '.join(sorted(unknown))}; add it to PARTS. Known are {', '.join(PARTS)}")
    return pytest.mark.needs(*parts)


def is_full() -> bool:
    """Whether this run may leave nothing out. Raises `pytest.UsageError` for a word that means nothing."""
    said = os.environ.get("SUBSTRATE_TESTS", "")
    if said not in ("", FULL):
        raise pytest.UsageError(f"SUBSTRATE_TESTS is {said!r}; accepted are {FULL!r} and nothing")
    return said == FULL


def simulation_seeds() -> range:
    """The seeds that every seeded simulation of this run tries; `SUBSTRATE_SEED=n` replays just one."""
    one = os.environ.get("SUBSTRATE_SEED")
    if one is not None:
        return range(int(one), int(one) + 1)
    return range(SEEDS_FULL if is_full() else SEEDS_PLAIN)


def fuzz_examples(plain: int) -> int:
    """How many examples a fuzzer tries that tries `plain` of them in a plain run."""
    return plain * FUZZ_FACTOR if is_full() else plain


def steps(stride: int) -> Iterator[int]:
    """The steps of the loop at which a test interferes: each in a full run, every `stride`-th in a plain one."""
    return count(1, 1 if is_full() else stride)


def demand(item: pytest.Item, parts: Iterable[str]) -> None:
    """Skip the test where one of the parts is absent; in a full run fail it, unless the part is excused.

    `SUBSTRATE_TESTS_EXCUSED` holds parts, separated by commas, that a full run may do without.
    """
    absent = [part for part in parts if not is_present(part)]
    if not absent:
        return
    item.user_properties += [("absent", part) for part in absent]
    why = "; ".join(f"this machine lacks {part}: {PARTS[part].cure}" for part in absent)
    excused = set(os.environ.get("SUBSTRATE_TESTS_EXCUSED", "").split(","))
    if is_full() and not excused.issuperset(absent):
        pytest.fail(why, pytrace=False)
    pytest.skip(why)


def pytest_configure(config: pytest.Config) -> None:
    """Know the mark; give property tests their budget, and the same examples in every run."""
    config.addinivalue_line("markers", "needs(*parts): the real parts of a machine that the test cannot do without")
    steady = hypothesis.settings(deadline=None, max_examples=fuzz_examples(40), derandomize=True)
    hypothesis.settings.register_profile("steady", steady)
    hypothesis.settings.register_profile("explore", steady, derandomize=False, print_blob=True)
    hypothesis.settings.load_profile(config.getoption("--hypothesis-profile", None) or "steady")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before anything of the test is set up, see whether its parts are there."""
    demand(item, [part for mark in item.iter_markers("needs") for part in mark.args])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """Say last how much was simulated and what was left out."""
    yield
    left_out: dict[str, int] = defaultdict(int)
    for outcome in ("skipped", "failed", "error"):
        for report in terminalreporter.getreports(outcome):
            said = getattr(report, "user_properties", ())  # a file that can't be collected has none
            for part in {value for key, value in said if key == "absent"}:
                left_out[part] += 1
    terminalreporter.section("real parts of the machine")
    for part, tests in sorted(left_out.items()):
        terminalreporter.line(f"absent: {part}; tests left out: {tests}; to have them, {PARTS[part].cure}")
    if not left_out:
        terminalreporter.line("none was absent")
    seeds = simulation_seeds()
    terminalreporter.line(f"simulation seeds: {len(seeds)}" + ("" if is_full() else f" (a full run has {SEEDS_FULL})"))


def absent_packages() -> list[str]:
    """The Debian packages that would bring what is absent."""
    return sorted({part.package for name, part in PARTS.items() if part.package and not is_present(name)})


if __name__ == "__main__":
    print(" ".join(absent_packages()))  # noqa: T201  # its reader is a script
