"""Work in threads ends before its owner does."""

from __future__ import annotations

import asyncio
import threading

import pytest

from substrate_node.offloop import off_loop


async def test_it_gives_what_the_function_gives_or_raises():
    """With its arguments."""
    assert await off_loop(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await off_loop(divmod, 7, 0)


@pytest.mark.parametrize("cancels", [1, 3])
@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancellation_waits_for_the_thread_and_goes_on_then(cancels: int, fails: bool):
    """However often, and whatever comes of the work."""
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert go_on.wait(10)
        ended.set()
        if fails:
            raise ValueError

    task = asyncio.get_running_loop().create_task(off_loop(work))
    await asyncio.to_thread(begun.wait, 10)
    for _ in range(cancels):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
