"""What nodes have reported, arranged so that a choice never scans the fleet."""

from __future__ import annotations

from collections.abc import Iterator, Set

from msgspec import Struct, structs

from substrate_seam.report import NodeReport, WorkloadReport


class NodeView(Struct, frozen=True, kw_only=True):
    """One node as last heard: its report with all workloads merged in."""

    report: NodeReport
    workloads: dict[str, WorkloadReport]

    def load(self, digest: str) -> float:
        """Calls that hold or await a slot of the workload, per slot; 0 for one it has not reported."""
        workload = self.workloads.get(digest)
        return (workload.busy + workload.waiting) / workload.concurrency if workload else 0.0

    def has_room(self, digest: str) -> bool:
        """Whether a slot of a known workload is free, as far as reported."""
        workload = self.workloads.get(digest)
        return workload is not None and workload.busy < workload.concurrency and not workload.waiting


class Members:
    """A set of node ids from which any can be drawn by its place, in constant time."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._places: dict[str, int] = {}

    def add(self, node_id: str) -> None:
        """Put a node in; it may be there already."""
        if node_id not in self._places:
            self._places[node_id] = len(self._ids)
            self._ids.append(node_id)

    def discard(self, node_id: str) -> None:
        """Take a node out; it may not be there."""
        place = self._places.pop(node_id, None)
        if place is None:
            return
        last = self._ids.pop()
        if last != node_id:
            self._ids[place] = last
            self._places[last] = place

    def __getitem__(self, place: int) -> str:
        """The node at a place from 0 to `len - 1`; places change when nodes come and go."""
        return self._ids[place]

    def __len__(self) -> int:
        """How many there are."""
        return len(self._ids)

    def __iter__(self) -> Iterator[str]:
        """All of them, in no order that means anything."""
        return iter(self._ids)

    def without(self, avoid: Set[str]) -> int:
        """How many are left when those in `avoid` are not counted. Costs as much as `avoid` is large."""
        return len(self._ids) - sum(node_id in self._places for node_id in avoid)


class NodeIndex:
    """The nodes that can be heard. Applying a report costs as much as the report is long."""

    def __init__(self) -> None:
        self._views: dict[str, NodeView] = {}
        self._open = Members()
        self._with_room: dict[str, Members] = {}
        self._knowing: dict[str, Members] = {}

    def view(self, node_id: str) -> NodeView | None:
        """The node as last heard, or None if it cannot be heard."""
        return self._views.get(node_id)

    @property
    def views(self) -> dict[str, NodeView]:
        """All nodes that can be heard, by id. Not for the path of a call."""
        return dict(self._views)

    @property
    def open(self) -> Members:
        """Nodes that take calls, whatever they know."""
        return self._open

    def with_room(self, digest: str) -> Members:
        """Nodes that take calls, know the workload and reported a free slot of it."""
        return self._with_room.get(digest, _NOBODY)

    def knowing(self, digest: str) -> Members:
        """Nodes that take calls and know the workload."""
        return self._knowing.get(digest, _NOBODY)

    def apply(self, report: NodeReport) -> None:
        """Take in a report: a full one replaces what was known, the others change it."""
        node_id, known = report.node_id, self._views.get(report.node_id)
        if report.full or known is None or known.report.boot_id != report.boot_id:
            touched = set(report.workloads) | (set(known.workloads) if known else set())
            merged: dict[str, WorkloadReport] = {}
        else:
            turned = known.report.draining != report.draining
            touched = set(report.workloads) | (set(known.workloads) if turned else set())
            merged = known.workloads
        for digest, workload in report.workloads.items():
            if workload is None:
                merged.pop(digest, None)
            else:
                merged[digest] = workload
        self._views[node_id] = NodeView(report=structs.replace(report, workloads={}), workloads=merged)
        self._file(node_id, touched)

    def retract(self, node_id: str) -> None:
        """The node is silent: its capacity is gone. Its guests may well live."""
        view = self._views.pop(node_id, None)
        if view is not None:
            self._file(node_id, set(view.workloads))

    def _file(self, node_id: str, digests: set[str]) -> None:
        view = self._views.get(node_id)
        taking = view is not None and not view.report.draining
        _put(self._open, node_id, member=taking)
        for digest in digests:
            known = taking and view is not None and digest in view.workloads
            room = known and view is not None and view.has_room(digest)
            for members, member in ((self._knowing, known), (self._with_room, room)):
                _put(members.setdefault(digest, Members()), node_id, member=member)
                if not len(members[digest]):
                    del members[digest]


_NOBODY = Members()


def _put(members: Members, node_id: str, *, member: bool) -> None:
    if member:
        members.add(node_id)
    else:
        members.discard(node_id)
