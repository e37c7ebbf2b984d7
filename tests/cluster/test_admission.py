"""Places per caller and bytes of bodies: never over, and all of it given back."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from substrate_cluster.admission import Admission
from substrate_seam.errors import Ran, Reason, SubstrateError


def test_a_caller_at_its_limit_is_refused_and_told_when_to_come_back():
    admission = Admission(caller_limit=2, body_budget_bytes=0)
    with admission.admit("a"), admission.admit("a"):
        with pytest.raises(SubstrateError) as refused, admission.admit("a"):
            pass
        with admission.admit("b"):
            assert admission.in_flight == {"a": 2, "b": 1}
    assert (refused.value.reason, refused.value.ran, refused.value.retry_after_s) == (Reason.CALLER_LIMIT, Ran.NO, 1.0)
    assert admission.in_flight == {}


def test_bodies_over_the_budget_are_refused_and_reserve_nothing():
    admission = Admission(caller_limit=9, body_budget_bytes=100)
    with admission.admit("a") as one, admission.admit("a") as other:
        one.cover(60)
        with pytest.raises(SubstrateError) as refused:
            other.cover(41)
        assert admission.body_bytes == 60
        other.cover(40)
        assert admission.body_bytes == 100
    assert (refused.value.reason, refused.value.ran, refused.value.retry_after_s) == (Reason.OVERLOADED, Ran.NO, 1.0)
    assert admission.body_bytes == 0


def test_cover_is_a_total_and_never_shrinks():
    admission = Admission(caller_limit=1, body_budget_bytes=100)
    with admission.admit("a") as hold:
        for total in (10, 30, 20, 30):
            hold.cover(total)
        assert admission.body_bytes == 30


def test_an_error_inside_gives_everything_back():
    admission = Admission(caller_limit=1, body_budget_bytes=100)

    def cover_too_much():
        with admission.admit("a") as hold:
            hold.cover(50)
            hold.cover(101)

    with pytest.raises(SubstrateError):
        cover_too_much()
    assert (admission.in_flight, admission.body_bytes) == ({}, 0)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 60), max_size=3)), max_size=12),
    st.integers(0, 3),
    st.integers(0, 100),
)
def test_no_history_passes_a_cap_or_keeps_anything(calls, caller_limit, budget_bytes):
    admission = Admission(caller_limit=caller_limit, body_budget_bytes=budget_bytes)
    with ExitStack() as open_calls:
        held = 0
        for caller, totals in calls:
            try:
                hold = open_calls.enter_context(admission.admit(caller))
            except SubstrateError:
                assert admission.in_flight.get(caller, 0) == caller_limit
                continue
            covered = 0
            for total in totals:
                try:
                    hold.cover(total)
                    covered = max(covered, total)
                except SubstrateError:
                    assert held + total > budget_bytes
            held += covered
            assert admission.body_bytes == held <= budget_bytes
            assert all(0 < count <= caller_limit for count in admission.in_flight.values())
    assert (admission.in_flight, admission.body_bytes) == ({}, 0)
