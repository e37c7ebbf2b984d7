"""Blocking work away from the event loop, which never goes on after its owner has."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

A = ParamSpec("A")
R = TypeVar("R")


async def off_loop(function: Callable[A, R], *args: A.args, **kwargs: A.kwargs) -> R:
    """Run `function` in a thread. A cancellation waits until the thread is done with it, and goes on then."""
    work = asyncio.get_running_loop().run_in_executor(None, lambda: function(*args, **kwargs))
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError as again:
            cancelled = again
    if cancelled is not None:
        work.exception()  # nobody is left to hear of it
        raise cancelled
    return work.result()
