"""The choice of a node for one call. Pure: an index and dice in, a node or a reason out."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from substrate_cluster.placement.index import Members, NodeIndex
from substrate_seam.invocation import WorkloadRef

if TYPE_CHECKING:
    from random import Random

_DRAWS_MAX = 16


class Placed(Struct, frozen=True, kw_only=True):
    """Where a call goes, why there, and among how many nodes that was the choice."""

    node_id: str
    because: Literal["room", "shortest-queue", "unknown-there"]
    candidates: int


class Refused(Struct, frozen=True, kw_only=True):
    """No node can take the call: none can be heard, or all that can were tried."""

    because: Literal["no-node", "all-tried"]


def place(call: WorkloadRef, index: NodeIndex, dice: Random, *, avoid: Set[str] = frozenset()) -> Placed | Refused:
    """Choose the less loaded of two drawn at random among nodes with room.

    Without room anywhere: among those that know the workload, since each of them keeps a queue. If none knows it:
    among all, since whoever is asked will be told.
    """
    digest = call.digest
    for members, because in (
        (index.with_room(digest), "room"),
        (index.knowing(digest), "shortest-queue"),
        (index.open, "unknown-there"),
    ):
        candidates = members.without(avoid)
        if candidates:
            first = _draw(members, dice, avoid)
            second = _draw(members, dice, {*avoid, first}) if candidates > 1 else first
            chosen = min((first, second), key=lambda node_id: _load(index, node_id, digest))
            return Placed(node_id=chosen, because=because, candidates=candidates)  # type: ignore[arg-type]  # literals above
    return Refused(because="all-tried" if len(index.open) else "no-node")


def _draw(members: Members, dice: Random, avoid: Set[str]) -> str:
    """One of the members that are not to be avoided. Rejection is cheap, because few are avoided."""
    if len(members) == 1:
        return members[0]  # dice may be dear, and most fleets of one node are one process
    for _ in range(_DRAWS_MAX):
        node_id = members[dice.randrange(len(members))]
        if node_id not in avoid:
            return node_id
    return next(node_id for node_id in members if node_id not in avoid)


def _load(index: NodeIndex, node_id: str, digest: str) -> float:
    view = index.view(node_id)
    return view.load(digest) if view is not None else float("inf")
