"""One fixture parameter decides how the system is wired; every test here holds for both."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import pytest_asyncio

from e2e.system import System, Table, lent, system, until, workload

GUESTS = Path(__file__).parent / "guests"
PARKED = 2

Starter = Callable[..., AbstractAsyncContextManager[System]]


@pytest.fixture(params=["single", "split"], scope="module")
def kind(request: pytest.FixtureRequest) -> str:
    """`single`: fc-invoke. `split`: cluster-agent and node-daemon."""
    return request.param


@pytest.fixture
def table() -> Table:
    """The built-in workloads, and one that misbehaves on demand."""
    return workloads()


def workloads() -> Table:
    return {
        "echo": workload("substrate_guest.workloads.echo:app"),
        "python": workload("substrate_guest.workloads.python:app", memMib=128),
        "flows": workload("flows:app", path=str(GUESTS), startTimeout="10s"),
        "hasty": workload("flows:app", path=str(GUESTS), requestTimeout="500ms"),
        "patient": workload("flows:app", path=str(GUESTS), requestTimeout="60s"),
        "narrow": workload("flows:app", path=str(GUESTS), concurrency=1, queue=1, startTimeout="5s"),
        "dies": {"command": ["python", "-c", "import sys; sys.exit('no such model')"], "memMib": 64},
        "parked": workload("substrate_guest.workloads.echo:app", pool=PARKED),
    }


@pytest.fixture
def start(kind: str, tmp_path: Path, table: Table) -> Starter:
    """Starts a system with given settings, in a directory of the test's own."""

    def starter(**settings: str) -> AbstractAsyncContextManager[System]:
        return system(kind, tmp_path, table, **settings)

    return starter


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(kind: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    """A system for all tests of a module that leave it as it was; its pool is full."""
    async with system(kind, tmp_path_factory.mktemp(kind), workloads()) as started:
        await until(lambda: len(started.node.seen("guest.parked")) == PARKED)
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def running(shared: System) -> AsyncIterator[System]:
    """A running system; whatever the test did, nothing of its guests is left but parked ones."""
    async with lent(shared, parked=PARKED) as mine:
        yield mine
