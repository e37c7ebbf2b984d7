"""A snapshot of a daemon drawn in lines of text, for a terminal of a given size or for a pipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from datetime import datetime, tzinfo

from substrate_service.snapshot import Failure, NodeNow, Snapshot, Trouble, WorkloadNow

_PLAIN, _BOLD, _DIM, _RED, _GREEN, _YELLOW, _HEADING = "", "1", "2", "31", "32", "33", "2;4"
_LEVELS = " ▁▂▃▄▅▆▇█"
_STARTS = (("pool", "parked"), ("warm", "warm"), ("cold", "cold"))
_BAR_CELLS = 16
_WORKLOADS_LEAST = 3

Span = tuple[str, str]
"""Some text and how it looks: the parameters of a terminal's SGR sequence."""
Line = Sequence[Span]


def drawn(
    snapshot: Snapshot, *, columns: int, lines: int | None = None, colour: bool = False, zone: tzinfo | None = None
) -> list[str]:
    """The snapshot in lines that fit; without `lines` it may take as many as it likes.

    Times are told in `zone`, without one as on this machine. Nothing that a guest or a workload said reaches the
    terminal as anything but printable text.
    """
    head = [*_overview(snapshot, columns, zone), *_alarms(snapshot)]
    rest = [[], *_nodes(snapshot.nodes), *_failures(snapshot.failures, zone), *_troubles(snapshot.troubles, zone)]
    room = len(snapshot.workloads) if lines is None else max(_WORKLOADS_LEAST, lines - len(head) - len(rest) - 3)
    whole = [*head, [], *_workloads(snapshot, room), *rest]
    return [_styled(line, columns, colour=colour) for line in whole[:lines]]


def _overview(snapshot: Snapshot, columns: int, zone: tzinfo | None) -> Iterator[Line]:
    traffic, guests = snapshot.traffic, snapshot.guests
    state: Span = ("not ready", _RED) if snapshot.reasons else ("ready", _GREEN)
    yield [
        (f"{snapshot.daemon} {snapshot.version}  ", _BOLD),
        state,
        (f"  up {age(snapshot.up_s)}  as of {_time(snapshot.at_ms, zone)}", _DIM),
    ]
    yield [
        ("calls   ", _DIM),
        (f"{traffic.ended} in the last minute, ", _PLAIN),
        (f"{traffic.failed} failed", _RED if traffic.failed else _PLAIN),
        (f"    p50 {lasted(traffic.p50_ms)}  p99 {lasted(traffic.p99_ms)}", _PLAIN),
    ]
    yield [("        ", _DIM), (sparkline([each.ended for each in snapshot.seconds[:-1]], columns - 8), _GREEN)]
    starts = "  ".join(f"{name} {traffic.starts.get(kind, 0)}" for kind, name in _STARTS)
    yield [("starts  ", _DIM), (starts, _PLAIN)]
    states = (
        f"serving {guests.serving}  starting {guests.starting}  parked {guests.parked}  being parked {guests.making}"
    )
    yield [("guests  ", _DIM), (states, _PLAIN)]
    size_mib = sum(node.size_mib for node in snapshot.nodes)
    taken_mib = size_mib - sum(node.free_mib for node in snapshot.nodes)
    yield [
        ("queue   ", _DIM),
        (f"{snapshot.waiting} waiting", _YELLOW if snapshot.waiting else _PLAIN),
        (f"    slots {bar(snapshot.busy, snapshot.slots)} {snapshot.busy} of {snapshot.slots}", _PLAIN),
        (f"    memory {bar(taken_mib, size_mib)} {size(taken_mib)} of {size(size_mib)}", _PLAIN),
    ]


def _alarms(snapshot: Snapshot) -> Iterator[Line]:
    for reason in snapshot.reasons:
        yield [("takes no calls: ", _RED), (reason, _RED)]
    for door in snapshot.doors:
        yield [("open    ", _YELLOW), (door, _YELLOW)]
    if snapshot.turned_away:
        counts = ", ".join(f"{count} {reason}" for reason, count in snapshot.turned_away.items())
        yield [("turned away in the last minute: ", _DIM), (counts, _PLAIN)]


def _workloads(snapshot: Snapshot, room: int) -> Iterator[Line]:
    heads = ("WORKLOAD", "CALLS", "FAILED", "P50", "P99", "BUSY", "WAIT", "PARKED", "ISOLATION", "STARTED BY")
    shown = snapshot.workloads[:room]
    rows = [(_workload_cells(each), _RED if each.traffic.failed else _PLAIN) for each in shown]
    yield from _table(heads, rows, right={"BUSY", "WAIT", "PARKED", "CALLS", "FAILED", "P50", "P99"})
    left_off = len(snapshot.workloads) - len(shown) + snapshot.workloads_left_off
    if left_off:
        yield [(f"and {left_off} more", _DIM)]


def _workload_cells(now: WorkloadNow) -> tuple[str, ...]:
    traffic = now.traffic
    starts = ", ".join(f"{traffic.starts[kind]} {name}" for kind, name in _STARTS if traffic.starts.get(kind))
    return (
        now.workload,
        str(traffic.ended),
        str(traffic.failed),
        lasted(traffic.p50_ms),
        lasted(traffic.p99_ms),
        f"{now.busy}/{now.slots}",
        str(now.waiting),
        str(now.guests.parked),
        now.isolation or "-",
        starts or "-",
    )


def _nodes(nodes: Sequence[NodeNow]) -> Iterator[Line]:
    heads = ("NODE", "STATE", "ISOLATION", "MEMORY", "", "WAIT", "START", "SERVE", "PARKED")
    rows = [(_node_cells(node), _RED if node.lost or node.draining else _PLAIN) for node in nodes]
    yield from _table(heads, rows, right={"WAIT", "START", "SERVE", "PARKED"})
    yield from ([(f"{node.node}: {node.lost}", _RED)] for node in nodes if node.lost)


def _node_cells(node: NodeNow) -> tuple[str, ...]:
    if node.lost:
        return (node.node, "not heard", *[""] * 7)
    taken_mib, guests = node.size_mib - node.free_mib, node.guests
    return (
        node.node,
        "draining" if node.draining else "takes calls",
        node.isolation or "-",
        f"{size(taken_mib)} of {size(node.size_mib)}",
        bar(taken_mib, node.size_mib),
        str(node.waiting),
        str(guests.starting),
        str(guests.serving),
        str(guests.parked),
    )


def _failures(failures: Sequence[Failure], zone: tzinfo | None) -> Iterator[Line]:
    if failures:
        yield []
        yield [("FAILED", _HEADING), ("  `fc-invoke explain ID` tells the whole story", _DIM)]
    for each in failures[:5]:
        told = f"{each.status or 'cut off'} {each.reason or 'from the guest'}"
        yield [
            (f"{_time(each.at_ms, zone)}  {each.invocation_id}  {each.workload}  ", _PLAIN),
            (told, _RED),
            (f"  ran: {each.ran or 'yes'}", _PLAIN),
        ]
        if each.message:
            yield [(f"          {each.message}", _DIM)]


def _troubles(troubles: Sequence[Trouble], zone: tzinfo | None) -> Iterator[Line]:
    if troubles:
        yield []
        yield [("WARNINGS", _HEADING)]
    for each in troubles[:3]:
        yield [(f"{_time(each.at_ms, zone)}  ", _PLAIN), (each.message, _YELLOW)]
        if each.hint:
            yield [(f"          {each.hint}", _DIM)]


def _table(heads: Sequence[str], rows: Sequence[tuple[Sequence[str], str]], *, right: Set[str]) -> Iterator[Line]:
    """Columns as wide as what is in them; those named `right` hold numbers."""
    widths = [max(map(len, column)) for column in zip(heads, *(cells for cells, _ in rows), strict=True)]

    def spaced(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if head in right else cell.ljust(width)
            for cell, width, head in zip(cells, widths, heads, strict=True)
        )
        return "  ".join(padded)

    yield [(spaced(heads), _HEADING)]
    for cells, style in rows:
        yield [(spaced(cells), style)]


def lasted(ms: float | None) -> str:
    """A duration for people."""
    if ms is None:
        return "-"
    if ms >= 1000:
        return f"{ms / 1000:.{0 if ms >= 10_000 else 1}f} s"
    return f"{ms:.{0 if ms >= 10 else 1}f} ms"


def age(seconds: float) -> str:
    """How long something has been up, for people."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{int(seconds)} s"


def size(mib: int) -> str:
    """An amount of memory for people."""
    return f"{mib / 1024:.1f} GiB" if mib >= 10_240 else f"{mib} MiB"


def bar(part: int, whole: int) -> str:
    """A part of a whole; something is never drawn as nothing."""
    filled = 0 if part <= 0 else max(1, min(_BAR_CELLS, round(_BAR_CELLS * part / max(1, whole))))
    return "█" * filled + "░" * (_BAR_CELLS - filled)


def sparkline(counts: Sequence[int], cells: int) -> str:
    """The latest counts, as many as fit, one cell each."""
    shown = counts[-max(1, cells) :]
    most = max([1, *shown])
    return "".join(_LEVELS[0 if not count else max(1, round(8 * count / most))] for count in shown)


def _time(at_ms: int, zone: tzinfo | None) -> str:
    return datetime.fromtimestamp(at_ms / 1000, tz=zone).astimezone(zone).strftime("%H:%M:%S")


def _styled(line: Line, columns: int, *, colour: bool) -> str:
    """A line cut to the width of the terminal, made harmless, and dressed."""
    parts: list[str] = []
    left = columns
    for text, style in line:
        shown = "".join(letter if letter.isprintable() else "·" for letter in text)[:left]
        left -= len(shown)
        parts.append(f"\x1b[{style}m{shown}\x1b[0m" if colour and style and shown else shown)
    return "".join(parts).rstrip()
