"""An `App` as a workload: its hooks and handler around one exchange."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING

from substrate_guest.app import App, Request, Response
from substrate_guest.calls import Calls

if TYPE_CHECKING:
    import asyncio

    from substrate_guest.exchange import Exchange
    from substrate_guest.identity import Identity

ACCEPTED = "bytes, str, dict, list, an iterator of bytes or a Response"


class CallableWorkload:
    """Runs an `App`."""

    def __init__(self, app: App) -> None:
        self._app = app
        self.rests = not app.restored_hooks  # they may begin something that goes on

    async def prime(self) -> None:
        """See `Workload.prime`."""
        async with Calls() as calls:
            for hook in self._app.prime_hooks:
                await calls.call(hook)

    async def start(self, duties: asyncio.TaskGroup) -> None:
        """See `Workload.start`; a callable needs no more."""

    async def restored(self, identity: Identity) -> None:
        """See `Workload.restored`."""
        async with Calls() as calls:
            for hook in self._app.restored_hooks:
                await calls.call(hook, identity)

    async def respond(self, request: Request, exchange: Exchange) -> None:
        """See `Workload.respond`; several errors come as an `ExceptionGroup`."""
        async with Calls() as calls:
            errors: list[Exception] = []
            last = b""
            try:
                for hook in self._app.before_hooks:
                    await calls.call(hook, request)
                last = await self._answer(calls, request, exchange)
            except (Exception, SystemExit) as error:  # noqa: BLE001  # raised again below, with the others
                errors.append(_as_exception(error))
            errors += await self._after(calls, request)
            if errors:
                raise errors[0] if len(errors) == 1 else ExceptionGroup("the handler and its hooks failed", errors)
            await exchange.end(last)

    async def _answer(self, calls: Calls, request: Request, exchange: Exchange) -> bytes:
        """Send all of the handler's answer but its end, which waits for the `after` hooks, and return that."""
        [handler] = self._app.handlers
        response = as_response(await calls.call(handler, request))
        body = response.body if isinstance(response.body, Iterator | AsyncIterator) else body_bytes(response.body)
        exchange.begin(response.status, raw_headers(response))
        if isinstance(body, bytes):
            return body
        async with aclosing(calls.pieces(body)) as pieces:
            async for piece in pieces:
                await exchange.write(body_piece(piece))
                if exchange.bodiless:
                    break
        return b""

    async def _after(self, calls: Calls, request: Request) -> list[Exception]:
        errors: list[Exception] = []
        for hook in self._app.after_hooks:
            try:
                await calls.call(hook, request)
            except (Exception, SystemExit) as error:  # noqa: BLE001  # returned, to be joined with the others
                errors.append(_as_exception(error))
        return errors


def as_response(result: object) -> Response:
    """What a handler returned, as a `Response`; raises `TypeError` for what cannot be one."""
    if isinstance(result, Response):
        return result
    if isinstance(result, bytes | bytearray | str | dict | list | Iterator | AsyncIterator):
        return Response(bytes(result) if isinstance(result, bytearray) else result)
    raise TypeError(f"the handler returned {type(result).__name__}, accepted are {ACCEPTED}")


def body_bytes(body: object) -> bytes:
    """A body that is known at once, in bytes; raises `TypeError` or `ValueError` for what cannot be a body."""
    if isinstance(body, str):
        return body.encode()
    if isinstance(body, dict | list):
        import json

        return json.dumps(body, separators=(",", ":")).encode()
    return body_piece(body)


def body_piece(piece: object) -> bytes:
    """A piece of a streamed body; raises `TypeError` unless it is bytes."""
    if isinstance(piece, bytes):
        return piece
    if isinstance(piece, bytearray | memoryview):
        return bytes(piece)
    raise TypeError(f"the body holds {type(piece).__name__}, accepted is bytes")


def raw_headers(response: Response) -> list[tuple[bytes, bytes]]:
    """The headers of `response` as HTTP spells them, with a `content-type` that fits its body."""
    given = response.headers
    pairs = given.items() if isinstance(given, Mapping) else given
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs]
    if not any(name.lower() == b"content-type" for name, _ in headers):
        headers.append((b"content-type", _content_type(response.body)))
    return headers


def _content_type(body: object) -> bytes:
    if isinstance(body, str):
        return b"text/plain; charset=utf-8"
    return b"application/json" if isinstance(body, dict | list) else b"application/octet-stream"


def _as_exception(error: Exception | SystemExit) -> Exception:
    return error if isinstance(error, Exception) else RuntimeError(f"the workload called exit({error.code!r})")
