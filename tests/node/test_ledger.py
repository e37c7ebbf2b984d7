"""The node's one account of memory: it is never overdrawn by a new lease, and each lease is returned once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from substrate_node.ledger import Lease, Ledger

MIB = st.integers(1, 500)


class Accounts(RuleBasedStateMachine):
    """Leases come and go while the node's size is changed."""

    def __init__(self) -> None:
        super().__init__()
        self.freed = 0
        self.ledger = Ledger(1000, freed=self.note)
        self.leases: list[Lease] = []

    def note(self) -> None:
        self.freed += 1

    @rule(mib=MIB)
    def reserve(self, mib: int) -> None:
        free_mib = self.ledger.free_mib
        lease = self.ledger.reserve(mib)
        assert (lease is not None) == (mib <= free_mib), "what is free may be leased, and nothing else"
        if lease is not None:
            self.leases.append(lease)

    @rule(dice=st.randoms(use_true_random=False), times=st.integers(1, 3))
    def release(self, dice, times: int) -> None:
        if not self.leases:
            return
        lease = self.leases.pop(dice.randrange(len(self.leases)))
        told = self.freed
        for _ in range(times):
            lease.release()
        assert self.freed == told + 1, "whoever waits hears of it, once"

    @rule(size_mib=st.integers(0, 2000))
    def resize(self, size_mib: int) -> None:
        committed_mib, told = self.ledger.committed_mib, self.freed
        self.ledger.resize(size_mib)
        assert self.ledger.committed_mib == committed_mib, "lowering the size takes nothing away"
        assert self.freed == told + 1

    @invariant()
    def the_sum_is_right(self) -> None:
        assert self.ledger.committed_mib == sum(lease.mib for lease in self.leases)
        assert self.ledger.free_mib == max(0, self.ledger.size_mib - self.ledger.committed_mib)


TestAccounts = Accounts.TestCase
TestAccounts.settings = settings(max_examples=30, deadline=None)


@given(leases=st.lists(MIB, max_size=10))
def test_below_its_commitments_a_node_leases_nothing_until_it_fits(leases: list[int]):
    """And then exactly what fits."""
    ledger = Ledger(10_000)
    held = [ledger.reserve(mib) for mib in leases]
    ledger.resize(100)
    for lease in held:
        assert lease is not None
        assert (ledger.reserve(1) is None) == (ledger.committed_mib >= 100) or ledger.committed_mib <= 100
        lease.release()


def test_memory_is_back_before_anybody_hears_of_it():
    """Whoever is told that some was freed can lease it at once."""
    seen: list[Lease | None] = []
    ledger = Ledger(100, freed=lambda: seen.append(ledger.reserve(100)))
    lease = ledger.reserve(100)
    assert lease is not None
    lease.release()
    assert seen[0] is not None
    assert ledger.free_mib == 0


@pytest.mark.parametrize("mib", [101, 100_000])
def test_what_never_fits_is_never_leased(mib: int):
    assert Ledger(100).reserve(mib) is None
