"""One request and its answer, over ASGI: the funnel that every error ends in, the body, and the caller's hang-up."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Final, Self, cast

from starlette.types import Receive, Scope, Send

from substrate_cluster.admission import Hold
from substrate_cluster.ingress.errors import Fields, answer_to, refused, told_reason
from substrate_cluster.ingress.headers import started_fields, wants_json
from substrate_seam.errors import InternalError, Reason, SubstrateError
from substrate_seam.events import CallRefused, DefectFound, Emit

ABORT: Final = "substrate.abort"
"""The extension of our listener that breaks the connection, so that a cut reply never looks whole."""
WATCH: Final = "substrate.watch"
"""The extension of our listener that has a function called if the caller leaves before its reply is complete."""
WHOLE: Final = "substrate.whole"
"""The extension of our listener that gives the body at once if all of it is here, else None."""

ANSWERED: Final = "substrate.answered"
"""Set by our listener when it says `http.disconnect` after an answer of its own, of which it has told."""


class Exchange:
    """One request under its id, and how much of its answer has gone out.

    `status` is 0 until a head went out; `complete` turns true with the last piece; `body_bytes` counts what went out.
    """

    __slots__ = (
        "_began_s",
        "_clock",
        "_id_field",
        "_send",
        "body_bytes",
        "complete",
        "extensions",
        "id",
        "receive",
        "scope",
        "status",
    )

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, *, invocation_id: str, clock: Callable[[], float]
    ) -> None:
        self.scope = scope
        self.extensions: Mapping[str, Any] = scope.get("extensions", {})
        self.receive = receive
        self._send = send
        self.id = invocation_id
        self._id_field = (b"fc-invocation-id", invocation_id.encode())
        self._clock = clock
        self._began_s = clock()
        self.status = 0
        self.body_bytes = 0
        self.complete = False

    @property
    def age_ms(self) -> float:
        """Milliseconds since the request's head was here."""
        return round((self._clock() - self._began_s) * 1e3, 3)

    async def head(self, status: int, fields: Fields) -> None:
        """Send a head; the exchange's id joins its fields."""
        fields.append(self._id_field)
        await self._send({"type": "http.response.start", "status": status, "headers": fields})
        self.status = status

    async def piece(self, body: bytes) -> None:
        """Send a piece of the body, at once."""
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        self.body_bytes += len(body)

    async def end(self, body: bytes = b"") -> None:
        """Send the last piece."""
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
        self.body_bytes += len(body)
        self.complete = True

    async def answer(self, status: int, fields: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """Send a whole answer of our own; Content-Length joins its fields."""
        await self.head(status, [*fields, (b"content-length", b"%d" % len(body))])
        await self.end(body)

    async def fail(self, error: SubstrateError) -> None:
        """Tell the caller of an error: by an answer, or once a head went out by breaking the connection.

        Raises the error itself where the server cannot break a connection: its own handling of that does.
        """
        if self.complete:
            return
        if not self.status:
            status, fields, body = answer_to(error, self.id, as_json=wants_json(self.scope["headers"]))
            await self.answer(status, fields + (started_fields(error.started) if error.started else []), body)
        elif ABORT in self.extensions:
            self.complete = True
            await self._send({"type": ABORT})
        else:
            raise error


Handler = Callable[[Exchange], Awaitable[None]]


class Endpoint:
    """An ASGI application around one handler: names the request, and answers for whatever the handler raises."""

    def __init__(
        self,
        handler: Handler,
        *,
        mint_id: Callable[[], str],
        emit: Emit,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._handler = handler
        self._clock = clock
        self._mint_id = mint_id
        self._emit = emit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        clock = self._clock or asyncio.get_running_loop().time
        exchange = Exchange(scope, receive, send, invocation_id=self._mint_id(), clock=clock)
        try:
            await self._handler(exchange)
        except SubstrateError as error:
            await exchange.fail(error)
            reason = told_reason(error.reason)
            self._emit(
                CallRefused(invocation_id=exchange.id, reason=reason, status=exchange.status, message=error.message)
            )
        except Answered:
            pass
        except Exception as error:  # noqa: BLE001  # the last resort: told to the caller and to the maintainers
            await exchange.fail(defect(error, exchange.id, emit=self._emit))


def defect(error: Exception, invocation_id: str, *, emit: Emit) -> InternalError:
    """What a caller hears of a bug of ours; its maintainers hear the rest."""
    trace = "".join(traceback.format_exception(error))
    emit(DefectFound(message=f"{type(error).__name__}: {error}", traceback=trace, invocation_id=invocation_id))
    return InternalError("a defect in the substrate", hint="Please report it with the id of the invocation.")


async def whole_body(exchange: Exchange, hold: Hold, *, bytes_max: int, within_s: float) -> bytes:
    """The request's body, covered by `hold` as it arrives.

    Raises `body-too-large`, `body-timeout`, `overloaded`, or `bad-request` when the caller leaves meanwhile; `Answered`
    when the listener has told the caller what is wrong with it.
    """
    if WHOLE in exchange.extensions and (whole := exchange.extensions[WHOLE]()) is not None:
        check_size(len(whole), bytes_max=bytes_max)
        hold.cover(len(whole))
        return cast(bytes, whole)
    pieces: list[bytes] = []
    size = 0
    try:
        with _Deadline(within_s):
            more = True
            while more:
                message = await exchange.receive()
                if message["type"] == "http.disconnect":
                    if message.get(ANSWERED):
                        raise Answered
                    raise refused(Reason.BAD_REQUEST, "the caller left before its body was whole")
                piece: bytes = message.get("body", b"")
                if piece:
                    size += len(piece)
                    check_size(size, bytes_max=bytes_max)
                    hold.cover(size)
                    pieces.append(piece)
                more = message.get("more_body", False)
    except TimeoutError:
        raise refused(
            Reason.BODY_TIMEOUT, f"the body was not whole after {within_s:g} s", hint="Send it faster, or less of it."
        ) from None
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def check_size(body_bytes: int, *, bytes_max: int) -> None:
    """Raises `body-too-large` for a body over its bound."""
    if body_bytes > bytes_max:
        raise refused(
            Reason.BODY_TOO_LARGE,
            f"the body is over {bytes_max} bytes",
            hint="Send less, or let the workload fetch it.",
        )


class Answered(Exception):
    """The listener has answered in the application's stead, and has told of that: there is nothing left to say."""


class ClientLeft(Exception):
    """The caller closed its connection before it had its whole answer."""


class _Cut:
    """Leaves the block it guards by an error of its own once `fire` is called.

    It cancels the task that runs the block, as `asyncio.timeout` does, and costs a third of that: a cancellation from
    elsewhere stays one.
    """

    __slots__ = ("_cancelling", "_fired", "_owner")
    error: type[Exception]

    def __enter__(self) -> Self:
        owner = asyncio.current_task()
        assert owner is not None
        self._owner = owner
        self._cancelling = owner.cancelling()
        self._fired = False
        return self

    def fire(self) -> None:
        """End the block."""
        self._fired = True
        self._owner.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._fired and self._owner.uncancel() <= self._cancelling and isinstance(error, asyncio.CancelledError):
            raise self.error from error


class _Deadline(_Cut):
    """Leaves the block by `TimeoutError` after so many seconds."""

    __slots__ = ("_timer", "_within_s")
    error = TimeoutError

    def __init__(self, within_s: float) -> None:
        self._within_s = within_s

    def __enter__(self) -> Self:
        self._timer = asyncio.get_running_loop().call_later(self._within_s, self.fire)
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        super().__exit__(kind, error, traceback)


class HangUpWatch(_Cut):
    """Leaves the block by `ClientLeft` as soon as the caller is gone.

    Our listener tells it; elsewhere one task awaits `receive`. The block calls `stop` before its last message, because
    a server also says `disconnect` when an answer is complete.
    """

    __slots__ = ("_exchange", "_stopped", "_watcher")
    error = ClientLeft

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._stopped = False
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        super().__enter__()
        if WATCH in self._exchange.extensions:
            self._exchange.extensions[WATCH](self.fire)
        else:
            # Owned by this block, which cancels it on every way out; a TaskGroup would wrap the executor's errors.
            self._watcher = asyncio.get_running_loop().create_task(self._watch(), name="hang-up-watch")
        return self

    async def _watch(self) -> None:
        while (await self._exchange.receive())["type"] != "http.disconnect":
            pass
        self.fire()

    def fire(self) -> None:
        """End the block, unless a hang-up means nothing any more."""
        if not self._stopped:
            super().fire()

    def stop(self) -> None:
        """From now on a hang-up means nothing."""
        self._stopped = True
        if self._watcher is not None:
            self._watcher.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        super().__exit__(kind, error, traceback)
