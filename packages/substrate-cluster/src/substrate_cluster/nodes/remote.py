"""RemoteNode: a node across the network, spoken to over the wire.

Whether anything ran is decided by one moment, the commit: the first byte of an invocation's body. It is written only
after the node has said `100 Continue`, with a ready guest in hand. Whatever breaks before that moment, nothing ran and
nothing will; whatever breaks after it, something may have run, unless the node itself says that nothing did.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct

from substrate_cluster.nodes.connections import Broken, Connect, Connection, Connections, Overdue
from substrate_seam.errors import (
    DuplicateInvocation,
    GuestFailed,
    GuestTimeout,
    GuestUnavailable,
    Ran,
    Reason,
    SubstrateError,
)
from substrate_seam.executor import Node
from substrate_seam.invocation import Invocation, Receipt, Reply
from substrate_seam.report import NodeLimits, NodeReport
from substrate_seam.story import Story
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
    FrameReader,
    FrameType,
    StoryAnswer,
    WireError,
    decode_end,
    decode_error,
    decode_head,
    encode_invocation,
)
from substrate_seam.workload import Workload

_ANSWER_BYTES_MAX: Final = 1_048_576
_REPORT_BYTES_MAX: Final = 16_777_216
_WITHDRAWING_MAX: Final = 256
"""So many calls that were left before their commit are withdrawn at once; a node notices the others by itself."""

_report = msgspec.json.Decoder(NodeReport)
_story_answer = msgspec.json.Decoder(StoryAnswer)
_cancel_answer = msgspec.json.Decoder(CancelAnswer)


class Patience(Struct, frozen=True, kw_only=True):
    """How long a node is waited for, in seconds.

    `connect_s` for a connection, `order_s` for the answer to a call that is no invocation, `silence_s` between two
    reports (three heartbeats), `margin_s` beyond the bounds of an invocation, `idle_s` until an unused connection is
    closed (less than a node's own 75 s), `leave_s` for withdrawing calls when everything ends.
    """

    connect_s: float = 3.0
    order_s: float = 10.0
    silence_s: float = 6.0
    margin_s: float = 2.0
    idle_s: float = 30.0
    leave_s: float = 1.0


class RemoteNode:
    """A node across the network. An async context manager: leaving it leaves no task, connection or timer.

    `connect` opens a connection to it. Which start of the daemon it speaks to it learns from `reports`; before that,
    and after the daemon turned out to be another one, every other verb raises `GuestUnavailable`.
    """

    def __init__(self, node_id: str, connect: Connect, *, patience: Patience | None = None, idle_max: int = 64) -> None:
        self.patience = patience = patience or Patience()
        self.connections = Connections(
            connect,
            idle_max=idle_max,
            idle_s=patience.idle_s,
            connect_within_s=patience.connect_s,
            grace_s=patience.margin_s,
        )
        self._node_id = node_id
        self._boot_id: str | None = None
        self._listening: dict[Connection, None] = {}
        self._withdrawing: dict[asyncio.Task[None], None] = {}

    @property
    def node_id(self) -> str:
        """The name of the node."""
        return self._node_id

    async def __aenter__(self) -> RemoteNode:
        """Speak to the node; nothing is sent yet."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Withdraw the calls that were left waiting, as far as that is quick, and cut every connection."""
        try:
            if self._withdrawing:
                await asyncio.wait(tuple(self._withdrawing), timeout=self.patience.leave_s)
        finally:
            for task in self._withdrawing:
                task.cancel()
            await self.connections.aclose()

    # Invocations.

    def invoke(self, invocation: Invocation) -> RemoteInvoking:
        """Claim a guest and open its reply; leaving the block gives the guest back (see `NodeExecutor`)."""
        return RemoteInvoking(self, invocation)

    async def cancel(self, invocation_id: str) -> Ran:
        """Fence an id, and say whether it may have run. Raises `GuestUnavailable` if the node can't be asked."""
        answer = await self._order("DELETE", f"{INVOCATIONS}/{invocation_id}")
        try:
            return _cancel_answer.decode(answer).ran
        except msgspec.DecodeError as error:
            raise self.unreachable(f"it answered something else: {error}") from error

    async def story(self, invocation_id: str) -> Story | None:
        """What the node keeps of an invocation. Raises `GuestUnavailable` if it can't be asked."""
        answer = await self._order("GET", f"{INVOCATIONS}/{invocation_id}")
        try:
            return _story_answer.decode(answer).story
        except msgspec.DecodeError as error:
            raise self.unreachable(f"it answered something else: {error}") from error

    def withdraw(self, invocation_id: str) -> None:
        """Tell the node in the background that a call will not be committed, so that it gives up its place."""
        if len(self._withdrawing) >= _WITHDRAWING_MAX or self._boot_id is None:
            return
        # Owned by this node, which ends it with itself.
        task = asyncio.get_running_loop().create_task(self._withdraw(invocation_id), name=f"withdraw {invocation_id}")
        self._withdrawing[task] = None
        task.add_done_callback(self._withdrawing.pop)

    async def _withdraw(self, invocation_id: str) -> None:
        with suppress(SubstrateError):  # a node that can't be told finds out when it asks for the body
            await self.cancel(invocation_id)

    # Workloads, size and drain.

    async def ensure(self, workload: Workload) -> None:
        """Make a workload known and warm it in the background. Raises `GuestUnavailable` if that can't be done."""
        await self._order("PUT", f"{WORKLOADS}/{workload.digest}", workload.raw)

    async def forget(self, digest: str) -> None:
        """Drop this agent's interest in a workload. Raises `GuestUnavailable` if the node can't be told."""
        await self._order("DELETE", f"{WORKLOADS}/{digest}")

    async def drain(self, *, within_s: float) -> None:
        """Let it take no new invocations. Raises `GuestUnavailable` if the node can't be told."""
        await self._order("PUT", DRAIN, msgspec.json.encode(DrainOrder(within_s)))

    async def resume(self) -> None:
        """Let it take invocations again. Raises `GuestUnavailable` if the node can't be told."""
        await self._order("DELETE", DRAIN)

    async def limit(self, limits: NodeLimits) -> None:
        """Set the node's size. Raises `GuestUnavailable` if the node can't be told."""
        await self._order("PUT", LIMITS, msgspec.json.encode(limits))

    async def _order(self, method: str, path: str, body: bytes = b"") -> bytes:
        boot_id = self.boot_id()
        request = self.head(method, path, boot_id) + b"content-length: %d\r\n\r\n" % len(body) + body
        try:
            status, answer = await self._ask(request)
        except Broken as broken:
            raise self.unreachable(str(broken)) from broken
        if 200 <= status < 300:
            return answer
        raise self.refusal(status, answer, boot_id)

    async def _ask(self, request: bytes) -> tuple[int, bytes]:
        """Make one call that may be made twice: all verbs but an invocation do the same the second time."""
        for fresh in (False, True):
            connection = await self.connections.take(within_s=self.patience.connect_s, fresh=fresh)
            try:
                connection.begin(request, within_s=self.patience.order_s)
                return await connection.status(), await connection.body(bytes_max=_ANSWER_BYTES_MAX)
            except Broken:
                if fresh or not connection.stale:
                    raise
            finally:
                connection.finish()
        raise AssertionError("a fresh connection is never stale")

    # Reports.

    async def reports(self) -> AsyncGenerator[NodeReport, None]:
        """What the node says about itself, until it can no longer be heard.

        Raises `GuestUnavailable` if it can't be heard in the first place, or is not the node that it should be.
        """
        heard = False
        try:
            connection = await self.connections.take(within_s=self.patience.connect_s, fresh=True)
        except Broken as broken:
            raise self.unreachable(str(broken)) from broken
        self._listening[connection] = None
        try:
            connection.begin(self.head("GET", REPORTS) + b"\r\n", within_s=self.patience.silence_s)
            if (status := await connection.status()) != 200:
                raise self.refusal(status, await connection.body(bytes_max=_ANSWER_BYTES_MAX))
            unfinished = bytearray()
            while (piece := await connection.piece()) is not None:
                unfinished += piece
                *lines, unfinished = unfinished.split(b"\n")
                if len(unfinished) > _REPORT_BYTES_MAX:
                    raise Broken(f"a report is over {_REPORT_BYTES_MAX} bytes")
                for line in lines:
                    report = self._read_report(line)
                    heard = True
                    connection.bound(self.patience.silence_s)
                    yield report
            if not heard:
                raise Broken("its reports came to nothing")
        except Broken as broken:
            if not heard:
                raise self.unreachable(str(broken)) from broken
        finally:
            del self._listening[connection]
            connection.finish()

    def _read_report(self, line: bytearray) -> NodeReport:
        """Read a report, and learn from it which start of the daemon this is."""
        try:
            report = _report.decode(line)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise self.unreachable(f"its report cannot be read: {error}") from error
        if report.node_id != self._node_id:
            raise self.unreachable(f"what answers there calls itself {report.node_id!r}")
        if not (report.boot_id.isascii() and report.boot_id.isalnum()):
            raise self.unreachable("its boot id is not made of letters and digits")
        self._boot_id = report.boot_id
        return report

    # What the calls of one node share.

    def boot_id(self) -> str:
        """The start of the daemon that calls are meant for. Raises `GuestUnavailable` before it is known."""
        if self._boot_id is None:
            raise self.unreachable("it has not been heard yet")
        return self._boot_id

    def head(self, method: str, path: str, boot_id: str | None = None) -> bytes:
        """The beginning of a request's head."""
        head = f"{method} {path} HTTP/1.1\r\nhost: {self._node_id}\r\n"
        return (head if boot_id is None else f"{head}{BOOT_ID_HEADER}: {boot_id}\r\n").encode("ascii")

    def refusal(self, status: int, answer: bytes, boot_id: str | None = None) -> SubstrateError:
        """The error that the node told. If it is not the daemon that was meant, its reports have to be heard anew."""
        if status == MISDIRECTED and boot_id == self._boot_id:
            self._boot_id = None
            for connection in tuple(self._listening):
                connection.fail(Broken("it has started anew"))
        try:
            return decode_error(answer)
        except WireError as error:
            return self.unreachable(f"it answered {status} with {error}")

    def unreachable(self, why: str) -> GuestUnavailable:
        """What is raised when nothing can have run."""
        return GuestUnavailable(
            Reason.NODE_UNREACHABLE,
            f"node {self._node_id!r} could not be reached: {why}",
            hint="Retry. If it stays so, see whether the node runs and its address is right.",
            retry_after_s=1.0,
        )


class RemoteInvoking:
    """One invocation on its way: entered when the head of the guest's reply is here, then iterated for the body."""

    __slots__ = (
        "_committed",
        "_connection",
        "_ending",
        "_frames",
        "_invocation",
        "_node",
        "_reader",
        "_reply",
        "_waits_there",
    )

    def __init__(self, node: RemoteNode, invocation: Invocation) -> None:
        self._node = node
        self._invocation = invocation
        self._connection: Connection | None = None
        self._waits_there = False
        self._committed = False
        self._reader = FrameReader()
        self._frames: deque[tuple[FrameType, bytes]] = deque()
        self._reply: Reply | None = None
        self._ending: Receipt | SubstrateError | None = None

    async def __aenter__(self) -> Reply:
        """Place the invocation, commit it when a guest is ready, and wait for the head of its reply."""
        try:
            connection, sent = await self._commit()
            return await self._open(connection, sent)
        except BaseException:
            self._leave()
            raise

    async def __aexit__(self, *_: object) -> None:
        """Give the connection back, or cut it, at which the node ends the guest."""
        self._leave()

    def _leave(self) -> None:
        """Leave nothing. There is nothing to wait for, so no cancellation can come between."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.finish()
        if self._waits_there and not self._committed:
            self._waits_there = False
            self._node.withdraw(self._invocation.id)

    # Until the commit nothing runs.

    async def _commit(self) -> tuple[Connection, int]:
        """Bring the invocation to the point where it runs; returns how many bytes of its body were sent.

        A connection that was idle may have been closed by the node while our request was under way. That is the only
        break after which the very same request is sent again, at once and on a fresh connection: not a byte of a
        reply had come. Almost always the node has then never seen the request. Should it have admitted it, and lost
        the connection afterwards, it answers `duplicate`; not a byte of its body was or will be sent, so nothing ran.
        That and any other break is told as `node-unreachable`; placement knows whether another node, and another
        attempt number, make sense.
        """
        node, invocation = self._node, self._invocation
        boot_id = node.boot_id()
        request = b"".join(
            (
                node.head("POST", INVOCATIONS, boot_id),
                b"expect: 100-continue\r\ntransfer-encoding: chunked\r\n",
                INVOCATION_HEADER.encode(),
                b": ",
                encode_invocation(invocation),
                b"\r\n\r\n",
            )
        )
        within_s = max(0.0, invocation.start_within_s) + node.patience.margin_s
        for fresh in (False, True):
            try:
                connection = self._connection = await node.connections.take(within_s=within_s, fresh=fresh)
            except Broken as broken:
                raise node.unreachable(str(broken)) from broken
            connection.begin(request, within_s=within_s)
            self._waits_there = True
            try:
                if (status := await connection.go_ahead()) != 100:
                    refusal = await self._refused(connection, status, boot_id)
                    if fresh and isinstance(refusal, DuplicateInvocation):
                        self._waits_there = True  # by the sending before this one
                        raise node.unreachable("the connection broke while the call waited there") from refusal
                    raise refusal
                sent = connection.commit(invocation.request.body)
            except Broken as broken:
                if fresh or not connection.stale:
                    raise self._not_started(broken) from broken
                connection.finish()
            else:
                self._committed = True
                return connection, sent
        raise AssertionError("a fresh connection is never stale")

    async def _refused(self, connection: Connection, status: int, boot_id: str) -> SubstrateError:
        self._waits_there = False
        answer = await connection.body(bytes_max=_ANSWER_BYTES_MAX)
        connection.send_no_body()
        return self._node.refusal(status, answer, boot_id)

    def _not_started(self, broken: Broken) -> GuestUnavailable:
        if isinstance(broken, Overdue):  # a node that can speak would have said that it is too late
            within_s = self._invocation.start_within_s
            return self._node.unreachable(
                f"it had no guest ready, nor said why, within the {within_s:.1f} s in which the call must start"
            )
        return self._node.unreachable(str(broken))

    # From the commit on something may have run.

    async def _open(self, connection: Connection, sent: int) -> Reply:
        """Send the rest of the body and wait for the head of the reply."""
        invocation = self._invocation
        connection.bound(BODY_WITHIN_S + max(0.0, invocation.run_within_s) + self._node.patience.margin_s)
        try:
            await connection.send_rest(invocation.request.body, sent)
            if await connection.status() != 200:
                raise decode_error(await connection.body(bytes_max=_ANSWER_BYTES_MAX))
            kind, payload = await self._frame()
            if kind is FrameType.END:
                raise await self._failure(connection, payload)
            started, status, headers = decode_head(payload)
        except (Broken, WireError) as error:
            raise self._lost(error) from error
        reply = self._reply = Reply(started=started, status=status, headers=headers, body=self)
        return reply

    async def _failure(self, connection: Connection, payload: bytes) -> SubstrateError:
        ending = decode_end(payload)
        if isinstance(ending, Receipt):
            raise WireError("an end without a head")
        await connection.settle(within_s=self._node.patience.margin_s)
        return ending

    def __aiter__(self) -> RemoteInvoking:
        """Iterate over the pieces of the body."""
        return self

    async def __anext__(self) -> bytes:
        """The next piece. Raises `GuestFailed` or `GuestTimeout` when the reply does not come to its end."""
        while self._ending is None:
            try:
                kind, payload = await self._frame()
                if kind is FrameType.DATA:
                    return payload
                self._ending = self._read_ending(payload)
            except (Broken, WireError) as error:
                self._ending = self._lost(error)
            else:
                if self._connection is not None:
                    await self._connection.settle(within_s=self._node.patience.margin_s)
        if isinstance(self._ending, SubstrateError):
            raise self._ending
        assert self._reply is not None
        self._reply.receipt = self._ending
        raise StopAsyncIteration

    def _read_ending(self, payload: bytes) -> Receipt | SubstrateError:
        ending = decode_end(payload)
        if isinstance(ending, SubstrateError) and ending.ran is Ran.NO:  # it has run: its head is here
            return GuestFailed(ending.message, hint=ending.hint)
        return ending

    async def _frame(self) -> tuple[FrameType, bytes]:
        """The next frame. Raises `Broken` and `WireError`."""
        while not self._frames:
            if self._connection is None:
                raise Broken("the call was left")
            piece = await self._connection.piece()
            if piece is None:
                raise Broken("the reply stopped before its end")
            self._frames.extend(self._reader.feed(piece))
        return self._frames.popleft()

    def _lost(self, error: Exception) -> SubstrateError:
        node_id = self._node.node_id
        if isinstance(error, Overdue):
            return GuestTimeout(
                f"node {node_id!r} had no whole answer, nor said why, "
                f"when the {self._invocation.run_within_s:.1f} s of this call were long over",
                hint="See whether the node can be reached.",
            )
        return GuestFailed(f"node {node_id!r} was lost while it ran the request: {error}")


if TYPE_CHECKING:  # the type checker proves that it fits

    def _fits(node: RemoteNode) -> Node:
        return node
