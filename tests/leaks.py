"""Nothing outlives a test: no descriptor, no process, no task."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import pytest_asyncio
import uvloop

_DESCRIPTORS, _THREADS = "/proc/self/fd", "/proc/self/task"


# Both are asked around each test, thousands of times, and plain strings take half the time of paths.
def _open_descriptors() -> set[str]:
    """Each open descriptor with what it points to, `number -> target`."""
    found = set()
    for number in os.listdir(_DESCRIPTORS):  # noqa: PTH208  # see above
        with suppress(FileNotFoundError):  # the one that listed the directory
            found.add(f"{number} -> {os.readlink(f'{_DESCRIPTORS}/{number}')}")  # noqa: PTH115  # see above
    return found


def _children() -> set[int]:
    """The processes that this one has started and not yet reaped."""
    found: set[int] = set()
    for thread in os.listdir(_THREADS):  # noqa: PTH208  # see above
        with suppress(FileNotFoundError), open(f"{_THREADS}/{thread}/children") as children:  # noqa: PTH123  # see above
            found.update(map(int, children.read().split()))  # a thread may end while we look
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
    if left_open := _open_descriptors() - descriptors:
        gc.collect()  # what only a reference cycle keeps open is closed by now, with a warning of its own
        left_open = _open_descriptors() - descriptors
    left = sorted(left_open) + [f"process {pid}" for pid in _children() - children]
    assert not left, f"left behind: {', '.join(left)}"


@asynccontextmanager
async def _no_task_left() -> AsyncIterator[None]:
    """Every task that began meanwhile has ended."""
    before = asyncio.all_tasks()
    yield
    left = [task.get_name() for task in asyncio.all_tasks() - before if task is not asyncio.current_task()]
    assert not left, f"tasks left behind: {', '.join(left)}"


@pytest.fixture
async def no_task_outlives_its_test():
    """Every task that a test, or a fixture that is undone before this one, began has ended."""
    async with _no_task_left():
        yield


@pytest_asyncio.fixture(loop_scope="module")
async def no_task_outlives_its_test_on_a_shared_loop():
    """The same where the tests of a module share a loop, and on it what is costly to start."""
    async with _no_task_left():
        yield


@pytest.hookimpl(trylast=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    """Give every asynchronous test the check for tasks, around all its other fixtures."""
    if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.function):
        marker = item.get_closest_marker("asyncio")
        shared = marker is not None and marker.kwargs.get("loop_scope") == "module"
        check = no_task_outlives_its_test_on_a_shared_loop if shared else no_task_outlives_its_test
        outermost = item.fixturenames.index(nothing_outlives_its_test.__name__)
        item.fixturenames.insert(outermost + 1, check.__name__)
