"""Clean-up that survives cancellation, and an owner for what is still being undone."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from substrate_seam.events import CleanupFailed, CleanupLate, Emit

T = TypeVar("T")

_PAUSE_S_MIN, _PAUSE_S_MAX = 0.05, 5.0
_CANCELLED_WITHIN_S = 1.0


class Reaper:
    """Owns clean-up work that outlives whoever began it. Closing it waits until all of it is done or its time is up."""

    def __init__(self, *, emit: Emit) -> None:
        self._emit = emit
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, cleanup: Coroutine[Any, Any, T], *, what: str) -> asyncio.Task[T]:
        """Run `cleanup` under this owner; a failure of it is told as `CleanupFailed`."""
        task = asyncio.get_running_loop().create_task(cleanup, name=what)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._tell(task.get_name(), error)

    def _tell(self, what: str, error: BaseException) -> None:
        self._emit(CleanupFailed(what=what, message=f"{type(error).__name__}: {error}"))

    def attempt(self, step: Callable[[], object], *, what: str) -> bool:
        """Take a step of clean-up that waits for nothing; a failure is told. Whether it succeeded."""
        try:
            step()
        except Exception as error:  # noqa: BLE001  # whatever broke, what is to be undone is still there
            self._tell(what, error)
            return False
        return True

    async def insist(self, step: Callable[[], Awaitable[object]], *, what: str) -> None:
        """Take a step of clean-up again and again, ever more patiently, until it succeeds; each failure is told."""
        pause_s = _PAUSE_S_MIN
        while True:
            try:
                await step()
            except Exception as error:  # noqa: BLE001  # whatever broke, what is to be undone is still there
                self._tell(what, error)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _PAUSE_S_MAX)
            else:
                return

    async def finish(self, cleanup: Coroutine[Any, Any, object], *, what: str, within_s: float = 10.0) -> None:
        """Run `cleanup` to its end even if cancelled meanwhile, then let the cancellation go on.

        After `within_s` seconds a `CleanupLate` is told and the clean-up goes on without us.
        """
        await self.join(self.spawn(cleanup, what=what), within_s=within_s)

    async def join(self, task: asyncio.Task[Any], *, within_s: float = 10.0) -> None:
        """Wait for a task of this owner as `finish` does. Its failure has been told and is not raised here."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + within_s
        cancelled: asyncio.CancelledError | None = None
        while not task.done() and loop.time() < deadline_s:
            try:
                await _settled(task, within_s=None if within_s == math.inf else deadline_s - loop.time())
            except asyncio.CancelledError as again:  # once, twice, or on each turn by an anyio scope
                cancelled = again
        if not task.done():
            self._emit(CleanupLate(what=task.get_name(), waited_s=within_s))
        if cancelled is not None:
            raise cancelled

    async def aclose(self, *, within_s: float = math.inf) -> None:
        """Wait for everything owned, including what is added meanwhile, even if cancelled.

        What is not done after `within_s` seconds is given up, and told of as `CleanupFailed`.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + within_s
        cancelled: asyncio.CancelledError | None = None
        while self._tasks and loop.time() < deadline_s:
            left_s = None if within_s == math.inf else deadline_s - loop.time()
            try:
                await asyncio.wait(set(self._tasks), timeout=left_s)
            except asyncio.CancelledError as again:
                cancelled = again
        await self._give_up(within_s)
        if cancelled is not None:
            raise cancelled

    async def _give_up(self, waited_s: float) -> None:
        given_up = sorted(self._tasks, key=asyncio.Task.get_name)
        for task in given_up:
            message = f"given up after {waited_s:.0f} s; what is left of it the next daemon of this state root removes"
            self._emit(CleanupFailed(what=task.get_name(), message=message))
            task.cancel()
        if given_up:
            await asyncio.wait(given_up, timeout=_CANCELLED_WITHIN_S)


async def _settled(task: asyncio.Task[Any], *, within_s: float | None) -> None:
    """Wait until a task has ended, at most so long. Unlike `await task` it never cancels it; half of `asyncio.wait`."""
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()

    def wake(_: object = None) -> None:
        if not waiter.done():
            waiter.set_result(None)

    timer = loop.call_later(within_s, wake) if within_s is not None else None
    task.add_done_callback(wake)
    try:
        await waiter
    finally:
        task.remove_done_callback(wake)
        if timer is not None:
            timer.cancel()
