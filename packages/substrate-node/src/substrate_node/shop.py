"""What the calls of one node share."""

from __future__ import annotations

from collections.abc import Callable

from substrate_node.base import Bases
from substrate_node.calls import Calls
from substrate_node.ledger import Lease, Ledger
from substrate_node.pool import Parked, Pool
from substrate_node.ready import IdentityMint
from substrate_node.reaper import Reaper
from substrate_node.slots import Slots
from substrate_node.starter import Starter
from substrate_seam.events import Emit

Stake = Parked | Lease
"""What a call needs beside its slot: memory, or a parked guest that has some."""


class Shop:
    """The parts of a node that its calls use. `changed` hears the digest of which more calls, or fewer, are served."""

    __slots__ = (
        "bases",
        "calls",
        "changed",
        "clock",
        "emit",
        "ledger",
        "mint",
        "node_id",
        "pool",
        "reaper",
        "slots",
        "starter",
    )

    def __init__(
        self,
        *,
        node_id: str,
        calls: Calls,
        slots: Slots[Stake],
        ledger: Ledger,
        bases: Bases,
        pool: Pool,
        starter: Starter,
        mint: IdentityMint,
        reaper: Reaper,
        emit: Emit,
        clock: Callable[[], float],
        changed: Callable[[str], None],
    ) -> None:
        self.node_id = node_id
        self.calls = calls
        self.slots = slots
        self.ledger = ledger
        self.bases = bases
        self.pool = pool
        self.starter = starter
        self.mint = mint
        self.reaper = reaper
        self.emit = emit
        self.clock = clock
        self.changed = changed
