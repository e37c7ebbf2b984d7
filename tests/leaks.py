"""Nothing outlives a test: no descriptor, no process, no task."""

from __future__ import annotations

import asyncio
import gc
import inspect
from contextlib import suppress
from pathlib import Path

import pytest
import uvloop

_DESCRIPTORS = Path("/proc/self/fd")
_THREADS = Path("/proc/self/task")


def _open_descriptors() -> set[str]:
    """Each open descriptor with what it points to, `number -> target`."""
    found = set()
    for entry in list(_DESCRIPTORS.iterdir()):
        try:
            found.add(f"{entry.name} -> {entry.readlink()}")
        except FileNotFoundError:  # the one that listed the directory
            continue
    return found


def _children() -> set[int]:
    """The processes that this one has started and not yet reaped."""
    found: set[int] = set()
    for thread in _THREADS.iterdir():
        with suppress(FileNotFoundError):  # a thread may end while we look
            found.update(map(int, (thread / "children").read_text().split()))
    return found


@pytest.fixture(scope="session", autouse=True)
def lasting_descriptors():
    """Open what libuv opens with its first loop and keeps for the life of the process: a pipe for signals."""
    uvloop.new_event_loop().close()


@pytest.fixture(autouse=True)
def nothing_outlives_its_test():
    """Every descriptor and every process that a test opened is gone when it ends."""
    descriptors, children = _open_descriptors(), _children()
    yield
    if _open_descriptors() - descriptors:
        gc.collect()  # what only a reference cycle keeps open is closed by now, with a warning of its own
    left = sorted(_open_descriptors() - descriptors) + [f"process {pid}" for pid in _children() - children]
    assert not left, f"left behind: {', '.join(left)}"


@pytest.fixture
async def no_task_outlives_its_test():
    """Every task that a test, or a fixture that is undone before this one, began has ended."""
    yield
    left = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert not left, f"tasks left behind: {', '.join(left)}"


@pytest.hookimpl(trylast=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    """Give every asynchronous test the check for tasks, around all its other fixtures."""
    if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.function):
        outermost = item.fixturenames.index(nothing_outlives_its_test.__name__)
        item.fixturenames.insert(outermost + 1, no_task_outlives_its_test.__name__)
