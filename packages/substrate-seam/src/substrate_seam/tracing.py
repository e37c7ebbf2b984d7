"""W3C trace context: whether a call is traced, and under which name its callees join the trace. Pure."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from substrate_seam.invocation import Trace

Join = Callable[[str, Trace | None], Trace | None]
"""From an invocation's id and its caller's trace context to the context that node and guest are given."""


class Context(Struct, frozen=True):
    """A `traceparent`, read: ids in hex."""

    trace_id: str
    span_id: str
    sampled: bool


class Sampler(Struct, frozen=True):
    """Which traces are kept: those of a sampled `parent` if it decides, else a `ratio` of all, by their id."""

    parent: bool
    ratio: float

    def keeps(self, trace_id: str, caller: Context | None) -> bool:
        """Whether a call is traced."""
        if self.parent and caller is not None:
            return caller.sampled
        return int(trace_id[16:], 16) < self.ratio * 2**64


def read_context(trace: Trace) -> Context:
    """The parts of a well-formed `traceparent`, as ingress lets no other in."""
    _, trace_id, span_id, flags = trace.parent.split("-")
    return Context(trace_id, span_id, sampled=bool(int(flags, 16) & 1))


def pass_on(_: str, caller: Trace | None) -> Trace | None:
    """Without traces of our own, the caller's context goes on as received."""
    return caller


def joining(sampler: Sampler) -> Join:
    """With traces of our own, the context is that of the span of the call, in the caller's trace or a new one.

    An invocation's id is 128 random bits: it names a new trace, and its second half names the span of the call.
    """

    def join(invocation_id: str, caller: Trace | None) -> Trace:
        context = read_context(caller) if caller is not None else None
        trace_id = invocation_id if context is None else context.trace_id
        flags = "01" if sampler.keeps(trace_id, context) else "00"
        state = caller.state if caller is not None else ""
        return Trace(f"00-{trace_id}-{span_of(invocation_id)}-{flags}", state)

    return join


def span_of(invocation_id: str) -> str:
    """The id of the span of a call."""
    return invocation_id[16:]
