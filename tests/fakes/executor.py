"""A `NodeExecutor` that plays a script: it answers, streams, waits, fails or dies, and notes what it gave back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from msgspec import Struct

from substrate_seam.executor import NodeExecutor
from substrate_seam.invocation import Headers, Invocation, Isolation, Receipt, Reply, Start, Started

STARTED = Started(
    queue_ms=12.4,
    claim_ms=3.0,
    ready_ms=0.5,
    start=Start.POOL,
    node="node-1",
    guest="guest-1",
    isolation=Isolation.MICROVM,
)


class Hold:
    """A place where the script waits: `reached` is set when it gets there, `release` lets it go on."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.release = asyncio.Event()

    async def wait(self) -> None:
        self.reached.set()
        await self.release.wait()


Step = bytes | Hold | BaseException
"""A piece of the body, a wait, or an end by an error."""


class Act(Struct, kw_only=True):
    """What one invocation meets: steps before the head, the head, the steps of the body; then the guest is given back.

    Giving back takes `give_back_passes` passes of the event loop, whoever cancels meanwhile.
    """

    before: Sequence[Hold | BaseException] = ()
    started: Started = STARTED
    status: int = 200
    headers: Headers = ((b"content-type", b"text/plain"),)
    body: Sequence[Step] = (b"hello",)
    give_back_passes: int = 0


class ScriptedExecutor:
    """Plays one act per invocation, the last one again and again."""

    def __init__(self, *acts: Act) -> None:
        self._acts = list(acts) or [Act()]
        self.invocations: list[Invocation] = []
        self.given_back: list[str] = []

    @asynccontextmanager
    async def invoke(self, invocation: Invocation) -> AsyncIterator[Reply]:
        act = self._acts[min(len(self.invocations), len(self._acts) - 1)]
        self.invocations.append(invocation)
        try:
            for step in act.before:
                await _play(step)
            yield _reply(act)
        finally:
            await self._give_back(invocation.id, act.give_back_passes)

    async def _give_back(self, invocation_id: str, passes: int) -> None:
        cancelled: asyncio.CancelledError | None = None
        for _ in range(passes):
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError as again:
                cancelled = again
        self.given_back.append(invocation_id)
        if cancelled is not None:
            raise cancelled


def _reply(act: Act) -> Reply:
    async def body() -> AsyncIterator[bytes]:
        size = 0
        for step in act.body:
            if isinstance(step, bytes):
                size += len(step)
                yield step
            else:
                await _play(step)
        reply.receipt = Receipt(guest_ms=1.0, body_bytes=size)

    reply = Reply(started=act.started, status=act.status, headers=act.headers, body=body())
    return reply


async def _play(step: Hold | BaseException) -> None:
    if isinstance(step, Hold):
        await step.wait()
    else:
        raise step


if TYPE_CHECKING:
    _fits: type[NodeExecutor] = ScriptedExecutor
