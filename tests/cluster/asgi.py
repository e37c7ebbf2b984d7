"""A caller in memory: it speaks ASGI to an application as our listener does, and may leave whenever it likes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Scope

Fields = Iterable[tuple[str | bytes, str | bytes]]
PATIENCE_S = 5.0


class Answer:
    """What came back: `complete` when it ended as an answer, `aborted` when the connection was broken instead."""

    def __init__(self) -> None:
        self.status = 0
        self.fields: list[tuple[bytes, bytes]] = []
        self.pieces: list[bytes] = []
        self.complete = False
        self.aborted = False

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def values(self, name: str) -> list[str]:
        return [value.decode() for key, value in self.fields if key.decode() == name]

    def __getitem__(self, name: str) -> str | None:
        found = self.values(name)
        assert len(found) < 2, f"{name} came {len(found)} times"
        return found[0] if found else None


class Caller:
    """One request on its own connection.

    A body that ends in None never does. `pieces_taken` of it were read; `waited_for` is set once the server waits for
    more, or for the caller to leave.
    """

    def __init__(
        self,
        target: str | bytes,
        *,
        method: str = "POST",
        fields: Fields = (),
        body: Sequence[bytes | None] = (b"",),
        host: str | None = "localhost:8080",
        client: tuple[str, int] | None = ("127.0.0.1", 40000),
        can_abort: bool = True,
    ) -> None:
        raw = target.encode() if isinstance(target, str) else target
        raw_path, _, query = raw.partition(b"?")
        given = [(_raw(name).lower(), _raw(value)) for name, value in fields]
        self.scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(raw_path.decode("latin-1")),
            "raw_path": raw_path,
            "query_string": query,
            "root_path": "",
            "headers": ([(b"host", host.encode())] if host is not None else []) + given,
            "client": client,
            "server": ("127.0.0.1", 8080),
            "extensions": {"substrate.abort": {}} if can_abort else {},
        }
        self.answer = Answer()
        self.left = False
        self.pieces_taken = 0
        self.waited_for = asyncio.Event()
        self._body = list(body)
        self._whole = False
        self._heard = asyncio.Event()
        self._over = asyncio.Event()
        self._reads = asyncio.Event()
        self._reads.set()

    # What the caller does.

    def leave(self) -> None:
        """Close the connection."""
        self.left = True
        self._over.set()
        self._reads.set()

    def stall(self) -> None:
        """Read nothing more: the server's `send` waits."""
        self._reads.clear()

    async def until_heard(self, pieces: int) -> None:
        """Wait until so many pieces of the body are here."""
        while len(self.answer.pieces) < pieces:
            self._heard.clear()
            await self._heard.wait()

    # What the server does.

    async def receive(self) -> Message:
        if self._body and not self._over.is_set() and (piece := self._body[0]) is not None:
            del self._body[0]
            self.pieces_taken += 1
            return {"type": "http.request", "body": piece, "more_body": bool(self._body)}
        self.waited_for.set()
        await self._over.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if not self.left:
            await self._reads.wait()
        if self.left:
            return
        answer, kind = self.answer, message["type"]
        assert not answer.complete, f"{kind} came after the end"
        assert not answer.aborted, f"{kind} came after the abort"
        if kind == "http.response.start":
            assert answer.status == 0
            answer.status, answer.fields = message["status"], list(message["headers"])
        elif kind == "http.response.body":
            assert answer.status
            if message["body"]:
                answer.pieces.append(message["body"])
            answer.complete = not message["more_body"]
        else:
            assert kind == "substrate.abort"
            answer.aborted = True
        if answer.complete or answer.aborted:
            self._over.set()
        self._heard.set()

    async def run(self, app: ASGIApp) -> Answer:
        """Make the request and wait for what comes of it."""
        async with asyncio.timeout(PATIENCE_S):
            await app(self.scope, self.receive, self.send)
        return self.answer


async def call(app: ASGIApp, target: str | bytes, **how: Any) -> Answer:
    """Make one request and return the answer."""
    return await Caller(target, **how).run(app)


@asynccontextmanager
async def calling(app: ASGIApp, caller: Caller) -> AsyncIterator[asyncio.Task[Answer]]:
    """A request under way in a task of its own, which has ended when the block is left."""
    async with asyncio.timeout(PATIENCE_S):
        task = asyncio.get_running_loop().create_task(caller.run(app))
        try:
            yield task
            await asyncio.wait({task})
        finally:
            task.cancel()
            await asyncio.wait({task})


def _raw(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("latin-1")
