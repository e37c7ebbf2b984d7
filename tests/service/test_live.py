"""The live state says what is so: calls of the last minute, guests of every node, failures that can be explained."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.every_event import KINDS, made_up
from substrate_seam.errors import Ran, Reason
from substrate_seam.events import (
    BaseFailed,
    CallRefused,
    DaemonStarted,
    ExchangeEnded,
    GuestClaimed,
    InvocationAccepted,
    InvocationEnded,
    SlotFreed,
    WarningRaised,
)
from substrate_seam.invocation import Isolation, Start
from substrate_seam.report import NodeReport, WorkloadReport
from substrate_service.live import FAILURES_KEPT, TROUBLES_KEPT, WORKLOADS_SHOWN, Live
from substrate_service.snapshot import Guests
from substrate_service.traffic import Tally, class_of, together


class Clock:
    """Seconds that pass when told to."""

    now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def live(clock):
    return Live(clock=clock, wall_ms=lambda: round(1000 * clock.now_s))


def tell(live, event):
    """Give it an event if it takes the kind."""
    take = live.sink(type(event))
    if take is not None:
        take(event)


def seen(live, nodes=(), lost=None, reasons=()):
    return live.snapshot(nodes=nodes, lost=lost or {}, reasons=reasons)


def call(live, number=1, workload="w", **fields):
    """A whole call, as the front tells of it."""
    about = {"invocation_id": f"{number:032x}", "workload": workload, "caller": "c"}
    tell(live, InvocationAccepted(**about, body_bytes=1))
    told = {"status": 200, "ran": Ran.MAYBE, "total_ms": 4.0, "start": Start.POOL, **fields}
    tell(live, InvocationEnded(**about, **told))


def exchanged(live, number=1, **fields):
    """A whole call, as a node tells of it."""
    call = {"invocation_id": f"{number:032x}", "workload": "w"}
    about = {**call, "attempt": 1, "guest": "g"}
    times = {"queue_ms": 1.0, "claim_ms": 2.0, "ready_ms": 1.5}
    tell(live, GuestClaimed(**about, start=Start.WARM, isolation=Isolation.PROCESS, **times))
    tell(live, ExchangeEnded(**about, **{"guest_ms": 5.0, "body_bytes": 1, "status": 200, **fields}))
    tell(live, SlotFreed(**call, busy=0, waiting=0, free_mib=1))


def node(name="n1", *workloads, **fields):
    about = {"boot_id": "b", "size_mib": 1000, "free_mib": 600, "isolation": Isolation.MICROVM, "arch": "amd64"}
    reported = {str(place): each for place, each in enumerate(workloads)}
    return NodeReport(node_id=name, **{**about, **fields}, workloads=reported)


def w(name="w", **fields):
    return WorkloadReport(name=name, concurrency=4, **fields)


def test_calls_of_the_last_minute_are_counted_by_outcome_and_start(live, clock):
    call(live, start=Start.POOL, total_ms=4.0)
    clock.now_s += 30
    call(live, start=Start.COLD, total_ms=400.0, status=500)
    now = seen(live)
    assert (now.traffic.ended, now.traffic.failed, now.traffic.starts) == (2, 1, {"pool": 1, "cold": 1})
    assert now.traffic.p50_ms == pytest.approx(4.0, rel=0.023)
    assert now.traffic.p99_ms == pytest.approx(400.0, rel=0.023)
    assert [each.ended for each in now.seconds] == [0] * 29 + [1] + [0] * 29 + [1]
    assert [(each.workload, each.traffic.ended) for each in now.workloads] == [("w", 2)]
    clock.now_s += 31
    assert seen(live).traffic.starts == {"cold": 1}
    clock.now_s += 60
    now = seen(live)
    assert (now.traffic.ended, now.traffic.p50_ms, now.workloads) == (0, None, [])


def test_the_two_halves_of_one_daemon_count_a_call_once(live):
    """Where there is a front it knows what callers were told; the node's own view is for a node alone."""
    call(live)
    exchanged(live)
    assert seen(live).traffic.ended == 1


def test_a_node_without_a_front_counts_its_exchanges(live):
    """From the queue to the end of the exchange; a caller that left is no fault of the guest."""
    exchanged(live, 1)
    exchanged(live, 2, reason=Reason.CANCELLED)
    exchanged(live, 3, reason=Reason.GUEST_FAILED, message="it died", status=0)
    now = seen(live)
    assert (now.traffic.ended, now.traffic.failed, now.traffic.starts) == (3, 1, {"warm": 3})
    assert now.traffic.p50_ms == pytest.approx(8.0, rel=0.023)
    (failure,) = now.failures
    assert (failure.invocation_id, failure.reason, failure.ran) == (f"{3:032x}", "guest-failed", "maybe")


def test_the_start_of_a_guest_counts_whatever_became_of_its_call(live):
    """A call that failed, or whose caller left, before its reply began had a guest all the same."""
    for number, fields in enumerate(({}, {"status": 504, "reason": Reason.GUEST_TIMEOUT}, {"client_left": True})):
        about = {"invocation_id": f"{number:032x}", "workload": "w"}
        tell(live, InvocationAccepted(**about, caller="c", body_bytes=1))
        exchanged(live, number)
        tell(live, InvocationEnded(**about, caller="c", **{"status": 200, "ran": Ran.MAYBE, "total_ms": 4.0, **fields}))
    now = seen(live)
    assert (now.traffic.ended, now.traffic.failed, now.traffic.starts) == (3, 1, {"warm": 3})
    assert now.workloads[0].traffic.starts == {"warm": 3}


def test_guests_are_added_up_over_versions_and_nodes(live):
    """Versions of one workload share its slots; each has guests of its own."""
    nodes = [
        node("n1", w(busy=3, serving=1, waiting=2, parked=1), w(busy=3, serving=1, waiting=2, making=1, base="b")),
        node("n2", w(busy=1, serving=1, isolation=Isolation.PROCESS), free_mib=1000),
    ]
    now = seen(live, nodes)
    assert (now.slots, now.busy, now.waiting) == (8, 4, 2)
    assert now.guests == Guests(starting=1, serving=3, parked=1, making=1)
    (workload,) = now.workloads
    assert (workload.guests, workload.warm_on, workload.isolation) == (now.guests, 1, Isolation.PROCESS)
    assert [(each.node, each.free_mib, each.waiting) for each in now.nodes] == [("n1", 600, 2), ("n2", 1000, 0)]
    assert now.nodes[0].guests == Guests(starting=1, serving=2, parked=1, making=1)


def test_a_node_that_is_not_heard_is_shown_with_its_reason(live):
    now = seen(live, [node("n1")], lost={"n2": "it stopped reporting"}, reasons=["no room"])
    assert [(each.node, each.lost) for each in now.nodes] == [("n1", ""), ("n2", "it stopped reporting")]
    assert now.reasons == ["no room"]


def test_guests_that_are_processes_are_told_loudly(live):
    (door,) = seen(live, [node("n1", w("a", isolation=Isolation.PROCESS), w("b", isolation=Isolation.MICROVM))]).doors
    assert "'a'" in door
    assert "no security boundary" in door


def test_failures_come_with_what_explains_them_the_latest_first(live):
    """The guest's own errors too; those whose caller left are none."""
    call(live, 1, reason=Reason.CAPACITY, status=503, ran=Ran.NO, start=None, message="full")
    call(live, 2, status=502)
    call(live, 3, client_left=True, status=499)
    later, earlier = seen(live).failures
    assert (earlier.invocation_id, earlier.reason, earlier.ran, earlier.message) == (
        f"{1:032x}",
        "capacity",
        "no",
        "full",
    )
    assert (later.invocation_id, later.status, later.reason, later.ran) == (f"{2:032x}", 502, "", "")


def test_requests_that_were_turned_away_are_counted_apart(live, clock):
    """They are no calls, and do not push the failures out."""
    for reason in (Reason.FORBIDDEN, Reason.FORBIDDEN, Reason.NOT_FOUND):
        tell(live, CallRefused(invocation_id="i", reason=reason, status=403, message=""))
    now = seen(live)
    assert (now.turned_away, now.traffic.ended, now.failures) == ({"forbidden": 2, "not-found": 1}, 0, [])
    clock.now_s += 61
    assert seen(live).turned_away == {}


def test_what_an_operator_should_know_is_kept_once_the_latest_first(live, clock):
    tell(live, WarningRaised(message="one", hint="do this"))
    tell(live, BaseFailed(workload="w", message="no space", retry_in_s=3.0))
    clock.now_s += 1
    tell(live, WarningRaised(message="one", hint="do this"))
    first, second = seen(live).troubles
    assert (first.message, first.hint, first.at_ms) == ("one", "do this", 1_001_000)
    assert "no space" in second.message


def test_the_daemon_says_who_it_is_and_since_when(live, clock):
    tell(live, DaemonStarted(daemon="d", version="1.2", listen="", admin=""))
    clock.now_s += 5
    now = seen(live)
    assert (now.daemon, now.version, now.up_s, now.at_ms) == ("d", "1.2", 5.0, 1_005_000)


def test_however_much_happens_what_is_kept_and_told_is_bounded(live, clock):
    """More workloads than are shown are counted; of failures and warnings the latest stay."""
    for number in range(3000):
        clock.now_s += 0.01
        call(live, number, f"w{number}", status=500)
        tell(live, WarningRaised(message=f"warning {number}"))
        tell(live, CallRefused(invocation_id="i", reason=Reason.FORBIDDEN, status=403, message=""))
    now = seen(live)
    assert now.traffic.ended == 3000
    assert (len(now.failures), len(now.troubles), len(now.workloads)) == (FAILURES_KEPT, TROUBLES_KEPT, WORKLOADS_SHOWN)
    assert now.workloads[0].workload == "other"  # the busiest of them all
    assert len(now.workloads) + now.workloads_left_off == len(live._by_workload) == 1001
    assert now.failures[0].invocation_id == f"{2999:032x}"
    assert not live._claimed
    assert not live._open


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_event_is_taken(live, kind):
    tell(live, made_up(kind))
    seen(live)


@given(st.lists(st.floats(min_value=0.001, max_value=1e6), min_size=1), st.floats(min_value=0.01, max_value=1.0))
def test_what_is_told_of_durations_is_near_the_truth(durations_ms, share):
    """Within 2.2 %, and half of the third digit, of the exact value of that rank; in one tally as in several."""
    tallies = [Tally() for _ in range(3)]
    for place, total_ms in enumerate(durations_ms):
        tallies[place % 3].add("pool", class_of(total_ms), failed=False)
    rank = next(n for n in range(1, len(durations_ms) + 1) if n >= share * len(durations_ms))
    exact_ms = sorted(durations_ms)[rank - 1]
    assert together(tallies).total_ms(share) == pytest.approx(exact_ms, rel=0.03)
