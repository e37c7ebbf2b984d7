"""A test that leaves something behind fails, even if all that it looked at was right."""

from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (LEAVES_A_DESCRIPTOR, "left behind: * -> /dev/null"),
        (LEAVES_A_PROCESS, "left behind: process *"),
        (LEAVES_A_TASK, "tasks left behind: forgotten"),
    ],
    ids=["descriptor", "process", "task"],
)
def test_what_outlives_its_test_fails_it(source, said, pytester):
    result = run(pytester, source)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines([f"*AssertionError: {said}*"])


def test_what_a_fixture_undoes_or_a_session_keeps_is_not_left_behind(pytester):
    run(pytester, LEAVES_NOTHING).assert_outcomes(passed=1)


def run(pytester, source):
    """Run one test, in a process of its own."""
    pytester.makepyfile(source)
    pytester.makeini(f"[pytest]\npythonpath = {Path(__file__).parent}\n{ASYNCIO}")
    return pytester.runpytest_subprocess("-p", "leaks", timeout=60)
