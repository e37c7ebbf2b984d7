"""One fixture parameter decides how the system is wired; every test here holds for both."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from e2e.system import System, Table, system, workload

GUESTS = Path(__file__).parent / "guests"

Starter = Callable[..., AbstractAsyncContextManager[System]]


@pytest.fixture(params=["single", "split"])
def kind(request: pytest.FixtureRequest) -> str:
    """`single`: fc-invoke. `split`: cluster-agent and node-daemon."""
    return request.param


@pytest.fixture
def table() -> Table:
    """The built-in workloads, and one that misbehaves on demand."""
    return {
        "echo": workload("substrate_guest.workloads.echo:app"),
        "python": workload("substrate_guest.workloads.python:app", memMib=128),
        "flows": workload("flows:app", path=str(GUESTS), requestTimeout="2s", startTimeout="10s"),
        "patient": workload("flows:app", path=str(GUESTS), requestTimeout="60s"),
        "narrow": workload("flows:app", path=str(GUESTS), concurrency=1, queue=1, startTimeout="5s"),
        "dies": {"command": ["python", "-c", "import sys; sys.exit('no such model')"], "memMib": 64},
        "parked": workload("substrate_guest.workloads.echo:app", pool=2),
    }


@pytest.fixture
def start(kind: str, tmp_path: Path, table: Table) -> Starter:
    """Starts a system with given settings, in a directory of the test's own."""

    def starter(**settings: str) -> AbstractAsyncContextManager[System]:
        return system(kind, tmp_path, table, **settings)

    return starter


@pytest.fixture
async def running(start: Starter) -> AsyncIterator[System]:
    """A running system; whatever the test did, nothing of its guests is left but parked ones."""
    async with start() as started:
        yield started
        await started.at_rest(parked=2)
        stale = [line for process in started.processes for line in process.other_lines]
        assert not stale, stale
        for process in started.processes:
            assert not process.seen("defect.found")
            assert not process.seen("cleanup.failed")
