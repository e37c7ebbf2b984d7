"""Events become spans, under the names and with the attributes of the Go daemon.

Nothing is started and ended here: an event says how long what it tells of has taken, so a span is made when it is over.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

from msgspec import Struct

from substrate_seam import events as e
from substrate_seam.events import Event
from substrate_seam.invocation import Start, Trace
from substrate_seam.tracing import Context, read_context, span_of

_CALLS_MAX: Final = 10_000

Attributes = dict[str, str | bool | int | float]


class Moment(Struct, frozen=True):
    """Something that happened within a span."""

    name: str
    at_ns: int
    attributes: Attributes


class Span(Struct, frozen=True, kw_only=True):
    """A span that is over; ids are in hex, `parent_id` is empty for the first of its trace.

    `server` marks the one that answers a request; `error` says why it failed, empty if it did not.
    """

    scope: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: Attributes
    server: bool = False
    error: str = ""
    moments: tuple[Moment, ...] = ()


class _Call:
    """A call that is traced, as long as anything of it is still to come."""

    __slots__ = ("awaited", "context", "moments", "parent_id", "session")

    def __init__(self, context: Context, *, parent_id: str = "", session: str = "") -> None:
        self.context = context
        self.parent_id = parent_id
        self.session = session
        self.moments: list[Moment] = []
        self.awaited = 0


class Spans:
    """An `Emit` that gives each span to `export`. `clock` gives wall-clock nanoseconds, `hide` hashes a session's id.

    Calls that are not sampled cost a look into a dictionary for each event.
    """

    def __init__(
        self, export: Callable[[Span], None], *, clock: Callable[[], int], hide: Callable[[str], str] = str
    ) -> None:
        self._export = export
        self._clock = clock
        self._hide = hide
        self._calls: OrderedDict[str, _Call] = OrderedDict()
        self._handlers: dict[type[Event], Callable[[Any], None]] = {
            e.InvocationAccepted: self._accepted,
            e.InvocationRefused: self._refused,
            e.InvocationEnded: self._ended,
            e.SlotTaken: self._slot_taken,
            e.StartFailed: self._start_failed,
            e.GuestClaimed: self._claimed,
            e.ExchangeEnded: self._exchanged,
            e.SlotFreed: self._slot_freed,
            e.BaseBuilt: self._base_built,
            e.BaseFailed: self._base_failed,
        }

    def __call__(self, event: Event) -> None:
        """Make the spans that this event ends."""
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(event)

    # At the front.

    def _accepted(self, event: e.InvocationAccepted) -> None:
        if not event.trace:
            return
        parent_id = read_context(Trace(event.parent)).span_id if event.parent else ""
        session = self._hide(event.session) if event.session is not None else ""
        self._await(event.invocation_id, event.trace, parent_id=parent_id, session=session)

    def _refused(self, event: e.InvocationRefused) -> None:
        if (call := self._calls.get(event.invocation_id)) is not None:
            attributes: Attributes = {"fc.node": event.node, "fc.error": event.reason, "fc.attempt": event.attempt}
            call.moments.append(Moment("refused", self._clock(), attributes))

    def _ended(self, event: e.InvocationEnded) -> None:
        call = self._calls.get(event.invocation_id)
        if call is None:
            return
        attributes: Attributes = {
            "fc.workload": event.workload,
            "fc.invocation_id": event.invocation_id,
            "fc.ran": event.ran,
            "http.response.status_code": event.status,
        }
        if call.session:
            attributes["fc.session"] = call.session
        if event.start is not None:
            attributes |= {"fc.pool_hit": event.start is Start.POOL, "fc.start": event.start}
        if event.node:
            attributes["fc.node"] = event.node
        if event.reason is not None:
            attributes["fc.error"] = event.reason
        end_ns = self._clock()
        self._export(
            Span(
                scope="fc-invoke/ingress",
                name="fc_invoke",
                trace_id=call.context.trace_id,
                span_id=span_of(event.invocation_id),
                parent_id=call.parent_id,
                start_ns=end_ns - _ns(event.total_ms),
                end_ns=end_ns,
                attributes=attributes,
                server=True,
                error=event.message or event.reason if event.reason is not None else "",
                moments=tuple(call.moments),
            )
        )
        self._over(event.invocation_id, call)

    # On the node.

    def _slot_taken(self, event: e.SlotTaken) -> None:
        if event.invocation_id is not None and event.trace:
            self._await(event.invocation_id, event.trace)
            self._child(event.invocation_id, "acquire_slot", took_ms=event.queue_ms)

    def _start_failed(self, event: e.StartFailed) -> None:
        name = _START_NAMES.get(event.start, "acquire_guest")
        attributes: Attributes = {"fc.guest": event.guest}
        self._child(event.invocation_id, name, took_ms=event.took_ms, attributes=attributes, error=event.message)

    def _claimed(self, event: e.GuestClaimed) -> None:
        name = _START_NAMES.get(event.start)
        if name is None:
            return  # it was parked: nothing was started
        started_ms = max(0.0, event.ready_ms - event.wait_ready_ms)
        attributes: Attributes = {"fc.guest": event.guest, "fc.isolation": event.isolation}
        self._child(event.invocation_id, name, took_ms=started_ms, ago_ms=event.wait_ready_ms, attributes=attributes)
        self._child(event.invocation_id, "guest_wait_ready", took_ms=event.wait_ready_ms)

    def _exchanged(self, event: e.ExchangeEnded) -> None:
        answered = event.head_ms is not None
        self._child(
            event.invocation_id,
            "guest_exec",
            took_ms=event.head_ms if event.head_ms is not None else event.guest_ms,
            ago_ms=event.release_ms + (event.guest_ms - event.head_ms if event.head_ms is not None else 0.0),
            attributes={"fc.workload": event.workload, "fc.guest": event.guest, "fc.attempt": event.attempt},
            error="" if answered or event.reason is None else event.message or event.reason,
        )
        used: Attributes = {}
        if event.cpu_ms is not None:
            used["fc.guest.cpu_ms"] = event.cpu_ms
        if event.peak_mib is not None:
            used["fc.guest.peak_rss_mib"] = event.peak_mib
        broke = answered and event.reason is not None
        self._child(
            event.invocation_id,
            "vm_release",
            took_ms=event.release_ms,
            attributes=used,
            error=event.message or event.reason or "" if broke else "",
        )

    def _slot_freed(self, event: e.SlotFreed) -> None:
        if event.invocation_id is not None and (call := self._calls.get(event.invocation_id)) is not None:
            self._over(event.invocation_id, call)

    def _child(
        self,
        invocation_id: str,
        name: str,
        *,
        took_ms: float,
        ago_ms: float = 0.0,
        attributes: Attributes | None = None,
        error: str = "",
    ) -> None:
        """A span below that of the call, which took so long and was over so long ago."""
        call = self._calls.get(invocation_id)
        if call is None:
            return
        end_ns = self._clock() - _ns(ago_ms)
        self._export(
            Span(
                scope=_SCOPES[name],
                name=name,
                trace_id=call.context.trace_id,
                span_id=os.urandom(8).hex(),
                parent_id=call.context.span_id,
                start_ns=end_ns - _ns(took_ms),
                end_ns=end_ns,
                attributes=attributes or {},
                error=error,
            )
        )

    # Bases have traces of their own.

    def _base_built(self, event: e.BaseBuilt) -> None:
        attributes: Attributes = {"fc.workload": event.workload, "fc.base": event.base}
        build = self._alone("base_snapshot_build", took_ms=event.build_ms, attributes=attributes)
        self._export(build)
        self._export(
            Span(
                scope=build.scope,
                name="snapshot_save",
                trace_id=build.trace_id,
                span_id=os.urandom(8).hex(),
                parent_id=build.span_id,
                start_ns=build.end_ns - _ns(event.capture_ms),
                end_ns=build.end_ns,
                attributes={"fc.workload": event.workload},
            )
        )

    def _base_failed(self, event: e.BaseFailed) -> None:
        attributes: Attributes = {"fc.workload": event.workload}
        self._export(self._alone("base_snapshot_build", took_ms=0.0, attributes=attributes, error=event.message))

    def _alone(self, name: str, *, took_ms: float, attributes: Attributes, error: str = "") -> Span:
        end_ns = self._clock()
        return Span(
            scope="fc-invoke/driver",
            name=name,
            trace_id=os.urandom(16).hex(),
            span_id=os.urandom(8).hex(),
            parent_id="",
            start_ns=end_ns - _ns(took_ms),
            end_ns=end_ns,
            attributes=attributes,
            error=error,
        )

    # Calls come and go.

    def _await(self, invocation_id: str, traceparent: str, *, parent_id: str = "", session: str = "") -> None:
        """Something of this call is to come, if it is traced."""
        call = self._calls.get(invocation_id)
        if call is None:
            context = read_context(Trace(traceparent))
            if not context.sampled:
                return
            call = self._calls[invocation_id] = _Call(context, parent_id=parent_id, session=session)
            if len(self._calls) > _CALLS_MAX:
                self._calls.popitem(last=False)
        call.awaited += 1

    def _over(self, invocation_id: str, call: _Call) -> None:
        call.awaited -= 1
        if call.awaited <= 0:
            self._calls.pop(invocation_id, None)


_START_NAMES: Final = {Start.WARM: "snapshot_restore", Start.COLD: "firecracker_boot"}
_SCOPES: Final = {
    "acquire_slot": "fc-invoke/invoker",
    "acquire_guest": "fc-invoke/invoker",
    "guest_exec": "fc-invoke/invoker",
    "vm_release": "fc-invoke/invoker",
    "snapshot_restore": "fc-invoke/driver",
    "firecracker_boot": "fc-invoke/driver",
    "guest_wait_ready": "fc-invoke/driver",
}


def _ns(milliseconds: float) -> int:
    return round(milliseconds * 1e6)
