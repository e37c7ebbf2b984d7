"""Calling other people's functions: async ones in the loop, plain ones in a thread that is started only for them."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

_END: Any = object()


class Calls:
    """The calls of one exchange: its plain functions run one after another in one thread, which ends with the block."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if self._thread is not None:
            # Every call is over by now, unless we were cancelled in the middle of one.
            self._thread.shutdown(wait=error_type is not asyncio.CancelledError)

    async def call(self, function: Callable[..., Any], *args: object) -> Any:  # noqa: ANN401  # it is the author's
        """The result of `function(*args)`, awaited if it can be."""
        result = function(*args) if _is_async(function) else await self.in_thread(function, *args)
        return await result if inspect.isawaitable(result) else result

    async def in_thread(self, function: Callable[..., Any], *args: object) -> Any:  # noqa: ANN401  # it is the author's
        """The result of plain `function(*args)`, run off the loop."""
        if self._thread is None:
            from concurrent.futures import ThreadPoolExecutor

            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="workload")
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def pieces(self, body: Iterator[bytes] | AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
        """What `body` yields, plain or async, as it yields it; closed with the block."""
        if isinstance(body, AsyncIterator):
            try:
                async for piece in body:
                    yield piece
            finally:
                if inspect.isasyncgen(body):
                    await body.aclose()
            return
        try:
            while (piece := await self.in_thread(next, body, _END)) is not _END:
                yield piece
        finally:
            if inspect.isgenerator(body):
                await self.in_thread(body.close)


def _is_async(function: Callable[..., Any]) -> bool:
    # A class instance with `async def __call__` is not a coroutine function itself; a partial of one is.
    return any(
        inspect.iscoroutinefunction(candidate) or inspect.isasyncgenfunction(candidate)
        for candidate in (function, getattr(function, "__call__", None))  # noqa: B004  # not whether it is callable
    )
