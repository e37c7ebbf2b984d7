"""The two ways in: `POST /invoke/{workload}[/{session}]`, and any request under `/http/{workload}/`."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Final, Protocol

from msgspec import Struct

from substrate_cluster.admission import Admission
from substrate_cluster.auth import Authenticator
from substrate_cluster.ingress.errors import refused, told_reason
from substrate_cluster.ingress.exchange import ClientLeft, Exchange, HangUpWatch, check_size, defect, whole_body
from substrate_cluster.ingress.headers import (
    Sorted,
    content_length,
    demands_of,
    from_guest,
    sort_fields,
    started_fields,
    to_guest,
    trace_of,
)
from substrate_cluster.ingress.hosts import HostRule
from substrate_cluster.ingress.sessions import cut_workload, guest_target, parse_session, printable
from substrate_seam.errors import Ran, Reason, SubstrateError
from substrate_seam.events import Emit, InvocationAccepted, InvocationEnded
from substrate_seam.executor import NodeExecutor
from substrate_seam.invocation import GuestRequest, Invocation, Reply, Trace
from substrate_seam.tracing import Join, pass_on
from substrate_seam.workload import Workload

INVOKE: Final = b"/invoke/"
HTTP: Final = b"/http/"
ROUTES: Final = "POST /invoke/{workload}[/{session}], any method on /http/{workload}/{path}, GET /healthz, GET /readyz"

_CLIENT_LEFT: Final = 499
"""The status of a call whose caller left before a head went out; nobody ever receives it."""


class Entry(Protocol):
    """What the front needs to know of a workload."""

    @property
    def workload(self) -> Workload:
        """What nodes run."""
        ...

    @property
    def request_timeout_s(self) -> float:
        """How long the exchange with the guest may take."""
        ...

    @property
    def start_timeout_s(self) -> float:
        """How long everything before it may take."""
        ...

    @property
    def callers(self) -> frozenset[str] | None:
        """Who may call it; None admits whoever is authenticated."""
        ...


class Catalog(Protocol):
    """The workloads as they are now."""

    def get(self, name: str, /) -> Entry | None:
        """The workload of this name, None when there is none."""
        ...

    def entries(self) -> Sequence[Entry]:
        """All workloads."""
        ...


class Limits(Struct, frozen=True, kw_only=True):
    """How large a request's body may be, in bytes, and how long it may take to arrive, in seconds."""

    body_bytes_max: int = 8_388_608
    body_within_s: float = 30.0


class Front:
    """Takes requests to guests, and answers in their stead when there is no guest to answer."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        executor: NodeExecutor,
        authenticator: Authenticator,
        admission: Admission,
        hosts: HostRule,
        limits: Limits,
        emit: Emit,
        join: Join = pass_on,
    ) -> None:
        self._join = join
        self._catalog = catalog
        self._executor = executor
        self._authenticator = authenticator
        self._admission = admission
        self._hosts = hosts
        self._limits = limits
        self._emit = emit

    async def not_found(self, exchange: Exchange) -> None:
        """Every path that does not exist, and every method where it does not; strangers do not learn which."""
        await self._admit(exchange)
        raise _no_such_thing(exchange)

    async def invoke(self, exchange: Exchange) -> None:
        """`POST /invoke/{workload}[/{session}]`; the guest's target says the session, and keeps the query."""
        caller, _, fields = await self._admit(exchange)
        name, rest = cut_workload(exchange.scope["raw_path"], INVOKE)
        if exchange.scope["method"] != "POST" or not name:
            raise _no_such_thing(exchange)
        entry = self._entry(name, caller)
        session = parse_session(rest)
        path = "/invoke" if session is None else "/invoke/" + session
        await self._run(exchange, fields, entry, caller=caller, session=session, path=path, host=b"vsock")

    async def http(self, exchange: Exchange) -> None:
        """Any request under `/http/{workload}/`; the guest's target is the rest of the path, as it came."""
        caller, host, fields = await self._admit(exchange)
        name, rest = cut_workload(exchange.scope["raw_path"], HTTP)
        entry = self._entry(name, caller)
        if entry.workload.spec.guest == "go-shim":
            raise refused(
                Reason.NOT_FOUND,
                f"workload {name!r} does not serve /http",
                hint=f"Its guest speaks only POST /invoke/{name}.",
            )
        sessions = fields.ours.get(b"fc-session", [b""])
        if len(sessions) != 1:
            raise refused(Reason.BAD_SESSION, f"the request names {len(sessions)} sessions; accepted is one fc-session")
        session = parse_session(sessions[0])
        await self._run(exchange, fields, entry, caller=caller, session=session, path="/" + printable(rest), host=host)

    async def _admit(self, exchange: Exchange) -> tuple[str, bytes, Sorted]:
        """The caller's name, the host it called and its sorted fields; raises for whoever may not come in at all."""
        fields = sort_fields(exchange.scope["headers"])
        host = self._hosts.check(fields.ours)
        caller = await self._authenticator.authenticate(fields.ours.get(b"authorization", ()))
        return caller, host, fields

    def _entry(self, name: str, caller: str) -> Entry:
        entry = self._catalog.get(name)
        if entry is None:
            raise refused(
                Reason.UNKNOWN_WORKLOAD,
                f"unknown workload {name[:100]!r}",
                hint=f"{self._nearest(name, caller)}`fc-invoke top` and the admin listener list the workloads.",
            )
        if not _admits(entry, caller):
            raise refused(
                Reason.FORBIDDEN,
                "forbidden",
                hint=f"Caller {caller!r} is not among the `callers` of workload {name!r}.",
            )
        return entry

    def _nearest(self, name: str, caller: str) -> str:
        """Which workload may be meant, of those that the caller may call: nobody learns the names of others."""
        names = [entry.workload.name for entry in self._catalog.entries() if _admits(entry, caller)]
        near = get_close_matches(name[:100], names, n=1)
        return f"The nearest is {near[0]!r}; " if near else ""

    async def _run(
        self,
        exchange: Exchange,
        fields: Sorted,
        entry: Entry,
        *,
        caller: str,
        session: str | None,
        path: str,
        host: bytes,
    ) -> None:
        """Take the body in, inside every bound, and let a guest answer."""
        target = guest_target(path, exchange.scope["query_string"])
        demands = demands_of(fields.ours)
        announced_bytes = content_length(fields.ours) or 0
        check_size(announced_bytes, bytes_max=self._limits.body_bytes_max)
        with self._admission.admit(caller) as hold:
            hold.cover(announced_bytes)
            body = await whole_body(
                exchange, hold, bytes_max=self._limits.body_bytes_max, within_s=self._limits.body_within_s
            )
            guest_fields = to_guest(fields, host=host, authorization_used=self._authenticator.uses_authorization)
            caller_trace = trace_of(fields.ours)
            invocation = Invocation(
                id=exchange.id,
                attempt=1,
                workload=entry.workload.ref,
                session=session,
                caller=caller,
                demands=demands,
                request=GuestRequest(exchange.scope["method"], target, guest_fields, body),
                start_within_s=entry.start_timeout_s,
                run_within_s=entry.request_timeout_s,
                trace=self._join(exchange.id, caller_trace),
            )
            await self._answer(exchange, invocation, caller_trace)

    async def _answer(self, exchange: Exchange, invocation: Invocation, caller_trace: Trace | None) -> None:
        """Run an accepted invocation to whatever end it takes, and tell of that end exactly once."""
        self._emit(
            InvocationAccepted(
                invocation_id=invocation.id,
                workload=invocation.workload.name,
                caller=invocation.caller,
                body_bytes=len(invocation.request.body),
                session=invocation.session,
                trace=invocation.trace.parent if invocation.trace is not None else "",
                parent=caller_trace.parent if caller_trace is not None else "",
            )
        )
        ending = _Ending()
        try:
            await self._relay(exchange, invocation, ending)
        except ClientLeft:
            ending.client_left = True
        except SubstrateError as error:
            ending.error = error
            await exchange.fail(error)
        except Exception as error:  # noqa: BLE001  # a bug in whatever is behind the seam; its caller must still hear
            ending.error = defect(error, exchange.id, emit=self._emit)
            await exchange.fail(ending.error)
        finally:
            self._emit(ending.told(exchange, invocation))

    async def _relay(self, exchange: Exchange, invocation: Invocation, ending: _Ending) -> None:
        """Stream the guest's reply as it arrives; whichever way this ends, the guest is given back."""
        with HangUpWatch(exchange) as watch:
            async with self._executor.invoke(invocation) as reply:
                ending.reply = reply
                fields = from_guest(reply.headers, status=reply.status)
                await exchange.head(reply.status, fields + started_fields(reply.started))
                async for piece in reply.body:
                    await exchange.piece(piece)
                watch.stop()
                await exchange.end()


class _Ending:
    """How an invocation ended: answered, failed, left by its caller, or (none of these) cut short by ourselves."""

    __slots__ = ("client_left", "error", "reply")

    def __init__(self) -> None:
        self.reply: Reply | None = None
        self.error: SubstrateError | None = None
        self.client_left = False

    def told(self, exchange: Exchange, invocation: Invocation) -> InvocationEnded:
        error, reply = self.error, self.reply
        started = reply.started if reply is not None else error.started if error is not None else None
        receipt = None if reply is None else reply.receipt
        cut_short = error is None and not self.client_left and not exchange.complete
        reason = Reason.INTERNAL if cut_short else None if error is None else told_reason(error.reason)
        return InvocationEnded(
            invocation_id=invocation.id,
            workload=invocation.workload.name,
            caller=invocation.caller,
            status=exchange.status or (_CLIENT_LEFT if self.client_left else 0),
            ran=Ran.MAYBE if error is None else error.ran,
            total_ms=exchange.age_ms,
            reason=reason,
            message="the daemon cut the call short" if cut_short else "" if error is None else error.message,
            start=None if started is None else started.start,
            node=None if started is None else started.node,
            guest=None if started is None else started.guest,
            queue_ms=None if started is None else started.queue_ms,
            claim_ms=None if started is None else started.claim_ms,
            ready_ms=None if started is None else started.ready_ms,
            guest_ms=None if receipt is None else receipt.guest_ms,
            client_left=self.client_left,
            body_bytes=exchange.body_bytes,
        )


def _admits(entry: Entry, caller: str) -> bool:
    return entry.callers is None or caller in entry.callers


def _no_such_thing(exchange: Exchange) -> SubstrateError:
    method, path = exchange.scope["method"], exchange.scope["raw_path"][:100].decode("latin-1")
    return refused(Reason.NOT_FOUND, f"there is no {method} {path!r} here", hint=f"There is {ROUTES}.")
