"""The node's end of the wire: a LocalNode served over HTTP, as a plain ASGI application.

The body of an invocation is not read before its guest is ready. The first `receive` makes the server send `100
Continue`, and the first byte of the body that then comes is the commit: whatever breaks before it, nothing ran.
"""

from __future__ import annotations

import asyncio
import re
import traceback
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from contextlib import aclosing
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import msgspec

from substrate_node.invoker import Claim
from substrate_node.node import LocalNode
from substrate_seam.errors import GuestUnavailable, InternalError, Ran, Reason, SubstrateError
from substrate_seam.events import DefectFound, Emit
from substrate_seam.invocation import GuestRequest, Reply
from substrate_seam.report import NodeLimits
from substrate_seam.wire import (
    BODY_WITHIN_S,
    BOOT_ID_HEADER,
    DRAIN,
    INVOCATION_HEADER,
    INVOCATIONS,
    LIMITS,
    MISDIRECTED,
    REPORTS,
    WORKLOADS,
    CancelAnswer,
    DrainOrder,
    StoryAnswer,
    WireError,
    data_frames,
    decode_invocation,
    encode_error,
    error_frame,
    head_frame,
    receipt_frame,
)
from substrate_seam.workload import Workload

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Fields = list[tuple[bytes, bytes]]

Allow = Callable[[Scope], str | None]
"""Why the peer of a call may not speak to this node; None if it may."""

PEERCERT: Final = "substrate.peercert"
"""The extension by which our listener names a peer whose certificate was verified: `{"names": [...]}`."""
ABORT: Final = "substrate.abort"
"""The extension by which our listener lets us cut a connection."""
WATCH: Final = "substrate.watch"
"""The extension of our listener that has a function called if the peer leaves before its reply is complete."""

_ID: Final = re.compile(r"[0-9a-f]{32}")
_ORDER_BYTES_MAX: Final = 1_048_576
"""Of the body of a call that is no invocation."""
_JSON: Final = (b"content-type", b"application/json")
_FRAMES: Final = (b"content-type", b"application/octet-stream")

T = TypeVar("T")


class NodeDaemon:
    """The ASGI application. `body_bytes_max` bounds a guest's request; `allow`, if given, is asked about every peer."""

    def __init__(
        self, node: LocalNode, *, emit: Emit, body_bytes_max: int = 8_388_608, allow: Allow | None = None
    ) -> None:
        self._node = node
        self._emit = emit
        self._body_bytes_max = body_bytes_max
        self._allow = allow
        self._boot_id = node.boot_id.encode()
        self._streams: dict[_HangUp, None] = {}
        self._closed = False
        self._calls: Mapping[tuple[str, str], Callable[[_Call], Awaitable[None]]] = {
            ("GET", REPORTS): self._reports,
            ("POST", INVOCATIONS): self._invoke,
            ("DELETE", f"{INVOCATIONS}/*"): self._cancel,
            ("GET", f"{INVOCATIONS}/*"): self._story,
            ("PUT", f"{WORKLOADS}/*"): self._ensure,
            ("DELETE", f"{WORKLOADS}/*"): self._forget,
            ("PUT", DRAIN): self._drain,
            ("DELETE", DRAIN): self._resume,
            ("PUT", LIMITS): self._limit,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one call."""
        call = _Call(scope, receive, send)
        try:
            await self._serve(call)
        except SubstrateError as error:
            await call.refuse(error)
        except Exception as defect:  # noqa: BLE001  # the last resort: told to the agent and to the maintainers
            await call.refuse(self._told(defect))

    def close(self) -> None:
        """End the streams of reports, which would go on for ever, and begin no more, so that the daemon can stop."""
        self._closed = True
        for stream in self._streams:
            stream.leave()

    async def _serve(self, call: _Call) -> None:
        if self._allow is not None and (why := self._allow(call.scope)) is not None:
            known = PEERCERT in call.scope.get("extensions", ())
            raise _refused(Reason.FORBIDDEN if known else Reason.UNAUTHENTICATED, why)
        serve = self._calls.get((call.method, call.path)) or self._calls.get((call.method, call.parent + "/*"))
        if serve is None:
            raise _refused(Reason.NOT_FOUND, f"this node knows no {call.method} {call.path[:100]}")
        if call.path != REPORTS and call.field(BOOT_ID_HEADER) != self._boot_id:
            await call.refuse(self._misdirected(), status=MISDIRECTED)
            return
        await serve(call)

    def _misdirected(self) -> SubstrateError:
        return GuestUnavailable(
            Reason.NODE_UNREACHABLE,
            f"node {self._node.node_id!r} is another one than was expected: it has started anew",
            hint="Hear its reports again.",
        )

    def _told(self, defect: Exception, invocation_id: str | None = None) -> InternalError:
        """What an agent hears of a bug of ours; its maintainers hear the rest."""
        trace = "".join(traceback.format_exception(defect))
        message = f"{type(defect).__name__}: {defect}"
        self._emit(DefectFound(message=message, traceback=trace, invocation_id=invocation_id))
        return InternalError(f"a defect of node {self._node.node_id!r}", hint="Its log has the traceback.")

    # Invocations.

    async def _invoke(self, call: _Call) -> None:
        try:
            invocation = decode_invocation(call.field(INVOCATION_HEADER))
        except WireError as error:
            raise _refused(Reason.BAD_REQUEST, str(error)) from error
        async with self._node.claim(invocation) as claim:
            body = await call.body(bytes_max=self._body_bytes_max)
            if body is None:
                return  # the agent left before the commit
            plain = invocation.request
            with _HangUp(call) as hang_up:
                ending = await self._exchange(
                    call, claim, GuestRequest(plain.method, plain.target, plain.headers, body), invocation.id
                )
                hang_up.stop()
                await call.end(ending)

    async def _exchange(self, call: _Call, claim: Claim, request: GuestRequest, invocation_id: str) -> bytes:
        """Let the guest answer; what is left to be said in the end is returned, an error of any kind too."""
        try:
            return await self._relay(call, claim, await claim.exchange(request))
        except SubstrateError as error:
            return error_frame(error)
        except Exception as defect:  # noqa: BLE001  # as above: it has to end this reply, and no other
            return error_frame(self._told(defect, invocation_id))

    async def _relay(self, call: _Call, claim: Claim, reply: Reply) -> bytes:
        """Pass a reply on, piece by piece as it comes, or in one go if it is all here."""
        frames = [head_frame(reply.started, reply.status, reply.headers)]
        if claim.whole:
            async for piece in reply.body:
                frames += data_frames(piece)
        else:
            await call.piece(frames.pop())
            async for piece in reply.body:
                await call.piece(b"".join(data_frames(piece)))
        assert reply.receipt is not None
        frames.append(receipt_frame(reply.receipt))
        return b"".join(frames)

    async def _cancel(self, call: _Call) -> None:
        if not _ID.fullmatch(call.last):
            raise _refused(Reason.BAD_REQUEST, "an invocation's id is 32 hex digits")
        ran = await self._node.cancel(call.last)
        await call.answer(200, msgspec.json.encode(CancelAnswer(ran)))

    async def _story(self, call: _Call) -> None:
        story = await self._node.story(call.last)
        await call.answer(200, msgspec.json.encode(StoryAnswer(story)))

    # Workloads, size and drain.

    async def _ensure(self, call: _Call) -> None:
        raw = await call.order()
        try:
            workload = Workload.parse(raw)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise _refused(Reason.BAD_REQUEST, f"a workload that cannot be read: {error}") from error
        if workload.digest != call.last:
            raise _refused(Reason.BAD_REQUEST, f"the workload's digest is {workload.digest}, not the one in the path")
        await self._node.ensure(workload)
        await call.answer(204)

    async def _forget(self, call: _Call) -> None:
        await self._node.forget(call.last)
        await call.answer(204)

    async def _drain(self, call: _Call) -> None:
        order = _read(await call.order(), DrainOrder)
        await self._node.drain(within_s=order.within_s)
        await call.answer(204)

    async def _resume(self, call: _Call) -> None:
        await self._node.resume()
        await call.answer(204)

    async def _limit(self, call: _Call) -> None:
        await self._node.limit(_read(await call.order(), NodeLimits))
        await call.answer(204)

    # Reports.

    async def _reports(self, call: _Call) -> None:
        """One line of JSON for each report, until the agent leaves or the node ends."""
        if self._closed:
            raise GuestUnavailable(Reason.DRAINING, f"node {self._node.node_id!r} is stopping")
        with _HangUp(call) as hang_up:
            self._streams[hang_up] = None
            try:
                async with aclosing(self._node.reports()) as reports:
                    async for report in reports:
                        await call.piece(msgspec.json.encode(report) + b"\n")
            finally:
                del self._streams[hang_up]
            hang_up.stop()
        await call.end()  # also when `close` has cut the stream short: an agent may hear its end


def head_refusal(status: int, reason: str, message: str) -> tuple[Fields, bytes]:
    """How the listener tells an agent what it refuses itself, or that a call met a defect: as any error of the wire."""
    known = Reason(reason) if reason in set(Reason) else Reason.BAD_REQUEST
    ran = Ran.MAYBE if status >= 500 else Ran.NO
    return [_JSON], encode_error(SubstrateError(known, message, ran=ran))[1]


def only(names: Collection[str]) -> Allow:
    """Let in those peers whose certificate is in one of `names`."""
    allowed = frozenset(names)

    def allow(scope: Scope) -> str | None:
        shown = scope.get("extensions", {}).get(PEERCERT, {}).get("names", ())
        if not shown:
            return "a certificate is needed to speak to this node"
        if allowed.isdisjoint(shown):
            return f"a certificate in the name of {', '.join(map(repr, shown))} may not speak to this node"
        return None

    return allow


class _Call:
    """One request of an agent, and how much of the answer has gone out."""

    __slots__ = ("_begun", "_send", "last", "method", "parent", "path", "receive", "scope")

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.receive = receive
        self._send = send
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.parent, _, self.last = self.path.rpartition("/")
        self._begun = False

    def field(self, name: str) -> bytes:
        """The value of a field, empty without it."""
        wanted = name.encode()
        return next((value for field, value in self.scope["headers"] if field == wanted), b"")

    async def body(self, *, bytes_max: int) -> bytes | None:
        """Ask for the body and read it whole; None when the agent leaves. Raises `body-timeout`, `body-too-large`."""
        pieces: list[bytes] = []
        left = bytes_max
        try:
            async with asyncio.timeout(BODY_WITHIN_S):
                more = True
                while more:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        return None
                    pieces.append(message.get("body", b""))
                    left -= len(pieces[-1])
                    if left < 0:
                        raise _refused(Reason.BODY_TOO_LARGE, f"the body is over the {bytes_max} bytes of this node")
                    more = message.get("more_body", False)
        except TimeoutError:
            late = f"the body was not whole {BODY_WITHIN_S:g} s after the node was ready for it"
            raise _refused(Reason.BODY_TIMEOUT, late) from None
        return b"".join(pieces)

    async def order(self) -> bytes:
        """The body of a call that is no invocation; empty when the agent leaves."""
        return await self.body(bytes_max=_ORDER_BYTES_MAX) or b""

    async def piece(self, data: bytes) -> None:
        """Send a piece of a reply with status 200, at once."""
        await self._begin()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        """Send the last piece of a reply with status 200."""
        await self._begin()
        await self._send({"type": "http.response.body", "body": data})

    async def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": [_FRAMES]})

    async def answer(self, status: int, body: bytes = b"") -> None:
        """Send a whole reply."""
        self._begun = True
        fields = [_JSON, (b"content-length", b"%d" % len(body))] if body else []
        await self._send({"type": "http.response.start", "status": status, "headers": fields})
        await self._send({"type": "http.response.body", "body": body})

    async def refuse(self, error: SubstrateError, *, status: int | None = None) -> None:
        """Tell the agent of an error, or cut its connection if it has heard a part of something else."""
        if not self._begun:
            usual, body = encode_error(error)
            await self.answer(status or usual, body)
        elif ABORT in self.scope.get("extensions", ()):
            await self._send({"type": ABORT})
        else:
            raise error


class _HangUp:
    """Leaves the block it guards as soon as the peer is gone, and goes on behind it.

    It cancels the task that runs the block, as `asyncio.timeout` would: a cancellation from elsewhere stays one. Our
    listener tells it; elsewhere one task awaits `receive`. The block calls `stop` before its last message, because a
    server also says `disconnect` when a reply is complete.
    """

    __slots__ = ("_call", "_cancelling", "_left", "_owner", "_stopped", "_watcher")

    def __init__(self, call: _Call) -> None:
        self._call = call
        self._left = self._stopped = False
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        owner = asyncio.current_task()
        assert owner is not None
        self._owner = owner
        self._cancelling = owner.cancelling()
        watch = self._call.scope.get("extensions", {}).get(WATCH)
        if watch is not None:
            watch(self.leave)
        else:
            # Owned by this block, which cancels it on every way out.
            self._watcher = asyncio.get_running_loop().create_task(self._watch(), name="hang-up-watch")
        return self

    async def _watch(self) -> None:
        while (await self._call.receive())["type"] != "http.disconnect":
            pass
        self.leave()

    def leave(self) -> None:
        """Leave the block now, unless it has said that it is as good as over."""
        if not (self._left or self._stopped):
            self._left = True
            self._owner.cancel()

    def stop(self) -> None:
        """From now on a disconnect means nothing."""
        self._stopped = True
        if self._watcher is not None:
            self._watcher.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self.stop()
        return self._left and self._owner.uncancel() <= self._cancelling and isinstance(error, asyncio.CancelledError)


def _refused(reason: Reason, message: str) -> SubstrateError:
    return SubstrateError(reason, message, ran=Ran.NO)


def _read(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise _refused(Reason.BAD_REQUEST, f"a body that cannot be read: {error}") from error
