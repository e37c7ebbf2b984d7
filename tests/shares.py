"""How a run is shared among processes: one more than there are processors, and what takes long comes first."""

from __future__ import annotations

import compileall
import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCES = (TESTS.parent / "packages", TESTS.parent / "apps")
LONG = ("conformance", "e2e", "browser", "app", "benchmark", "simulation", "node", "guest", "boundaries")
"""Folders whose files start processes or play thousands of stories, the longest first; a file is one process's."""


def pytest_configure(config: pytest.Config) -> None:
    """Compile the sources once for all: a guest may write nothing, so each would compile all that it loads."""
    if not hasattr(config, "workerinput"):
        for folder in SOURCES:
            compileall.compile_dir(folder, quiet=2)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A third of its time a test waits for what it has started, so a process for each processor would leave it idle."""
    return int(os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS") or len(os.sched_getaffinity(0)) + 1)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long files, so that no process ends alone with one."""
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    folder = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
    return LONG.index(folder) if folder in LONG else len(LONG)
