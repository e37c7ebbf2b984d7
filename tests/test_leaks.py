"""A test that leaves something behind fails, even if all that it looked at was right."""

from pathlib import Path

ASYNCIO = "asyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
LEAVES_A_DESCRIPTOR = """
import os

def test_it():
    os.open("/dev/null", os.O_RDONLY)
"""
LEAVES_A_PROCESS = """
import subprocess

def test_it(request):
    global left  # or its destructor would complain first
    left = subprocess.Popen(["sleep", "60"])
    request.session.addfinalizer(lambda: (left.kill(), left.wait()))
"""
LEAVES_A_TASK = """
import asyncio

async def test_it():
    asyncio.get_running_loop().create_task(asyncio.Event().wait(), name="forgotten")
    await asyncio.sleep(0)
"""
LEAVES_A_TASK_ON_A_SHARED_LOOP = """
import asyncio, pytest, pytest_asyncio

pytestmark = pytest.mark.asyncio(loop_scope="module")

@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lasting():
    async with asyncio.TaskGroup() as duties:
        task = duties.create_task(asyncio.Event().wait(), name="of them all")
        yield
        task.cancel()

async def test_it(lasting):
    asyncio.get_running_loop().create_task(asyncio.Event().wait(), name="forgotten")
    await asyncio.sleep(0)

async def test_that_finds_it_there(lasting):
    assert "of them all" in {task.get_name() for task in asyncio.all_tasks()}
"""
LEAVES_NOTHING = """
import asyncio, pytest, socket

@pytest.fixture(scope="session")
def lasting():
    with socket.socket() as kept:
        yield kept

@pytest.fixture
async def helper():
    async with asyncio.TaskGroup() as duties:
        task = duties.create_task(asyncio.Event().wait())
        yield
        task.cancel()

async def test_it(lasting, helper):
    with open("/dev/null"):
        await asyncio.sleep(0)
"""


LEFT = {
    "descriptor": (LEAVES_A_DESCRIPTOR, "left behind: * -> /dev/null"),
    "process": (LEAVES_A_PROCESS, "left behind: process *"),
    "task": (LEAVES_A_TASK, "tasks left behind: forgotten"),
    "shared": (LEAVES_A_TASK_ON_A_SHARED_LOOP, "tasks left behind: forgotten"),
}


def test_what_outlives_its_test_fails_it_and_no_other(pytester):
    """All tests are run by one process, which shows that what one has left is not held against the next."""
    pytester.makepyfile(**{f"test_{what}": source for what, (source, _) in LEFT.items()}, test_no_leak=LEAVES_NOTHING)
    pytester.makeini(f"[pytest]\npythonpath = {Path(__file__).parent}\n{ASYNCIO}")
    result = pytester.runpytest_subprocess("-p", "leaks", "-p", "no:xdist", "-p", "no:hypothesispytest", timeout=60)
    result.assert_outcomes(passed=len(LEFT) + 2, errors=len(LEFT))
    for what, (_, said) in LEFT.items():
        result.stdout.fnmatch_lines([f"ERROR test_{what}.py::test_it - *AssertionError: {said}*"])
