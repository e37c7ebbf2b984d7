"""Whose trace a call belongs to, and whether it is kept."""

from random import Random

import pytest

from substrate_seam.invocation import Trace
from substrate_seam.tracing import Context, Sampler, joining, pass_on, read_context, span_of

ID = "0123456789abcdef" + "fedcba9876543210"
CALLER = Trace(f"00-{'a' * 32}-{'b' * 16}-01", "vendor=1")
UNSAMPLED = Trace(f"00-{'a' * 32}-{'b' * 16}-00")
ALL, NONE = Sampler(parent=False, ratio=1.0), Sampler(parent=False, ratio=0.0)


def test_without_traces_of_our_own_the_callers_context_goes_on_as_received():
    assert pass_on(ID, CALLER) is CALLER
    assert pass_on(ID, None) is None


def test_a_call_joins_its_callers_trace_as_a_span_of_its_own():
    assert joining(ALL)(ID, CALLER) == Trace(f"00-{'a' * 32}-{span_of(ID)}-01", "vendor=1")


def test_a_call_without_a_trace_begins_one_under_its_own_id():
    trace = joining(ALL)(ID, None)
    assert read_context(trace) == Context(ID, "fedcba9876543210", sampled=True)


@pytest.mark.parametrize(
    ("sampler", "caller", "kept"),
    [
        (ALL, UNSAMPLED, True),
        (NONE, CALLER, False),
        (Sampler(parent=True, ratio=1.0), UNSAMPLED, False),
        (Sampler(parent=True, ratio=0.0), CALLER, True),
        (Sampler(parent=True, ratio=0.0), None, False),
        (Sampler(parent=True, ratio=1.0), None, True),
    ],
)
def test_a_parent_decides_where_it_is_asked(sampler, caller, kept):
    assert read_context(joining(sampler)(ID, caller)).sampled is kept


def test_a_ratio_keeps_that_share_of_traces_and_every_daemon_the_same_ones():
    dice = Random(1)
    ids = [f"{dice.getrandbits(128):032x}" for _ in range(4000)]
    kept = [each for each in ids if Sampler(parent=False, ratio=0.25).keeps(each, None)]
    assert 800 < len(kept) < 1200
    assert all(Sampler(parent=True, ratio=0.5).keeps(each, None) for each in kept)
