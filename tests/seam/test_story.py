"""One story out of several rings: in order whatever their clocks say, and summed up."""

import pytest

from substrate_seam.story import Happened, Story, nodes_in, summary, told

MS = 1_000_000


def story(now_ms, *events):
    return Story(
        now_ms * MS, tuple(Happened(at_ms * MS, {"event": name, **members}) for at_ms, name, members in events)
    )


AGENT = story(
    1_100,
    (1_000, "invocation.accepted", {"workload": "w", "caller": "anna"}),
    (1_001, "invocation.placed", {"node": "n1", "attempt": 1}),
    (1_040, "invocation.ended", {"status": 200, "ran": "maybe", "total_ms": 40.0}),
)
CLAIMED = {"guest": "inv-1", "start": "warm", "queue_ms": 1.0, "claim_ms": 2.0, "ready_ms": 3.0}


@pytest.mark.parametrize("skew_ms", [0, -3_600_000, 7])
def test_a_node_whose_clock_is_wrong_tells_its_part_where_it_belongs(skew_ms):
    node = story(
        1_100 + skew_ms,
        (1_010 + skew_ms, "guest.claimed", CLAIMED),
        (1_050 + skew_ms, "guest.gone", {"guest": "inv-1"}),
    )
    page = told("a" * 32, AGENT, nodes={"n1": node}, silent={"n2": "it is gone"})
    assert [(event["at_ms"], event["event"], event.get("on")) for event in page["events"]] == [
        (0.0, "invocation.accepted", None),
        (1.0, "invocation.placed", None),
        (10.0, "guest.claimed", "n1"),
        (40.0, "invocation.ended", None),
        (50.0, "guest.gone", "n1"),
    ]
    assert (page["invocation_id"], page["began_ns"], page["silent"]) == ("a" * 32, 1_000 * MS, {"n2": "it is gone"})
    assert page["summary"] == {
        "workload": "w",
        "caller": "anna",
        "status": 200,
        "ran": "maybe",
        "total_ms": 40.0,
        **CLAIMED,
        "guest_end": "its node ended it before it had the request",
    }


def test_a_node_begins_no_call_before_it_was_placed_there():
    """When a node told its part is a guess, which is worse the longer its answer took."""
    node = story(1_200, (1_010, "slot.taken", {}), (1_050, "guest.gone", {"guest": "inv-1"}))
    events = told("a" * 32, AGENT, nodes={"n1": node})["events"]
    assert [(event["at_ms"], event["event"]) for event in events[1:3]] == [
        (1.0, "invocation.placed"),
        (1.0, "slot.taken"),
    ]
    assert events[-1]["at_ms"] == 41.0


def test_the_nodes_of_a_story_are_those_where_it_was_placed():
    """Each once, also if it was placed there twice."""
    placed = [(at, "invocation.placed", {"node": node}) for at, node in enumerate(("b", "a", "b"))]
    assert nodes_in(story(5, *placed)) == ("b", "a")


@pytest.mark.parametrize(
    ("gone", "exchange", "words"),
    [
        (None, None, "it is still there, as far as is known"),
        ({"exit": "exit status 3"}, None, "it ended by itself: exit status 3"),
        ({}, {}, "its node ended it, after its reply was whole"),
        ({}, {"reason": "guest-timeout", "message": "it took too long"}, "its node ended it: it took too long"),
        ({}, {"reason": "cancelled", "message": "its caller left"}, "its node ended it: its caller left"),
        ({}, None, "its node ended it before it had the request"),
    ],
)
def test_it_is_told_who_ended_the_guest_and_why(gone, exchange, words):
    events = [{"event": "guest.claimed", **CLAIMED}]
    events += [] if exchange is None else [{"event": "exchange.ended", **exchange}]
    events += [] if gone is None else [{"event": "guest.gone", **gone}]
    assert summary(events)["guest_end"] == words


def test_of_a_call_that_had_no_guest_none_is_told():
    refused = {"event": "call.refused", "status": 404, "reason": "unknown-workload", "message": "unknown workload"}
    assert summary([refused]) == {"status": 404, "reason": "unknown-workload", "message": "unknown workload"}
