"""The story of one invocation: what each daemon's ring tells of it, put in order, and the sum of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

Plain = dict[str, Any]
"""An event as JSON has it: its name under `event`, and its members."""


class Happened(Struct, frozen=True):
    """One event, at a time of its daemon's wall clock in nanoseconds."""

    at_ns: int
    event: Plain


class Story(Struct, frozen=True):
    """What one daemon tells of an invocation, oldest first; `now_ns` is its wall clock as it tells it."""

    now_ns: int
    events: tuple[Happened, ...]


def nodes_in(story: Story) -> tuple[str, ...]:
    """The nodes where an invocation was placed, in order."""
    placed = (happened.event for happened in story.events if happened.event["event"] == "invocation.placed")
    return tuple(dict.fromkeys(event["node"] for event in placed))


def told(
    invocation_id: str, own: Story, *, nodes: Mapping[str, Story] | None = None, silent: Mapping[str, str] | None = None
) -> Plain:
    """The whole story, ready for JSON: the sum of it, and every event with `at_ms` since the first.

    `nodes` are the stories of nodes in other processes; their events say `on` which node they happened. Each was told
    at the time of `own.now_ns`, so that clocks which differ do not matter; as that time is a guess, no node begins
    before the call was placed on it. `silent` says why a node told nothing.
    """
    happened = [(each.at_ns, each.event) for each in own.events]
    for node_id, story in (nodes or {}).items():
        behind_ns = own.now_ns - story.now_ns
        if story.events:
            behind_ns = max(behind_ns, _placed_ns(own, node_id) - story.events[0].at_ns)
        happened += [(each.at_ns + behind_ns, {"on": node_id, **each.event}) for each in story.events]
    happened.sort(key=lambda pair: pair[0])
    began_ns = happened[0][0]
    events = [{"at_ms": round((at_ns - began_ns) / 1e6, 3), **event} for at_ns, event in happened]
    return {
        "invocation_id": invocation_id,
        "began_ns": began_ns,
        "summary": summary(events),
        "events": events,
        **({"silent": dict(silent)} if silent else {}),
    }


def _placed_ns(own: Story, node_id: str) -> int:
    """When the call was placed there, or 0 where nothing is told of that."""
    return next(
        (
            each.at_ns
            for each in own.events
            if each.event["event"] == "invocation.placed" and each.event["node"] == node_id
        ),
        0,
    )


_SUMMED = {
    "invocation.accepted": ("workload", "caller"),
    "guest.claimed": ("attempt", "guest", "start", "isolation", "base", "queue_ms", "claim_ms", "ready_ms"),
    "exchange.ended": ("guest_ms", "cpu_ms", "peak_mib"),
    "invocation.ended": ("status", "ran", "reason", "message", "node", "total_ms", "client_left"),
    "call.refused": ("status", "reason", "message"),
}


def summary(events: list[Plain]) -> Plain:
    """What became of an invocation: its end, its phases in ms, what its guest used, and who ended the guest."""
    latest = {event["event"]: event for event in events}
    found = {
        name: event[name]
        for kind, names in _SUMMED.items()
        if (event := latest.get(kind)) is not None
        for name in names
        if name in event
    }
    words = _end_of_guest(latest)
    return found | ({"guest_end": words} if words else {})


def _end_of_guest(latest: Mapping[str, Plain]) -> str:
    gone, exchange = latest.get("guest.gone"), latest.get("exchange.ended")
    if gone is None:
        return "it is still there, as far as is known" if "guest.claimed" in latest else ""
    if gone.get("exit"):
        return f"it ended by itself: {gone['exit']}"
    if exchange is None:
        return "its node ended it before it had the request"
    if exchange.get("reason") is None:
        return "its node ended it, after its reply was whole"
    return f"its node ended it: {exchange.get('message') or exchange['reason']}"
