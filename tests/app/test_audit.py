"""The audit's judgement: what callers were told, held against what guests wrote down."""

import httpx
import msgspec
import pytest
from msgspec import structs

from fc_invoke.audit import Answer, AuditImpossible, judge, settled
from fc_invoke.auditing import told
from substrate_service.live import Live
from substrate_service.snapshot import WorkloadNow


def answer(**fields):
    return Answer(**({"behaviour": "patient", "invocation_id": "a"} | fields))


def words(answers, journal):
    return [violation.words for violation in judge(answers, journal)]


def test_answers_that_agree_with_the_journal_are_the_truth():
    """A guest's answer with one entry, a refusal with none, a maybe with either."""
    answers = [
        answer(status=200, whole=True),
        answer(invocation_id="b", status=503, ran="no", whole=True),
        answer(invocation_id="c", status=502, ran="maybe", whole=True),
        answer(invocation_id="d", status=504, ran="maybe", whole=True),
        answer(invocation_id="", behaviour="leaving"),
    ]
    assert words(answers, [("a", 1), ("c", 1), ("e", 2)]) == []


def test_a_refused_call_that_ran_is_a_lie():
    """`ran: no` is a promise."""
    assert words([answer(status=503, ran="no")], [("a", 1)]) == ["its caller was told `ran: no` (503), and it ran"]


def test_an_invocation_that_ran_twice_is_found_whoever_called():
    """Also under another attempt, and also if nobody knows its caller."""
    assert words([], [("a", 1), ("a", 2)]) == ["it acted 2 times"]


def test_an_answer_of_a_guest_that_never_acted_is_a_lie():
    """Whatever gave it, no guest did."""
    assert words([answer(status=200, whole=True)], []) == ["its caller got 200 of a guest that never acted"]


def test_a_reply_that_broke_off_may_have_any_reason():
    """Its caller saw that it is not whole."""
    assert words([answer(status=200)], []) == []


def test_the_report_counts_what_callers_did_and_names_every_lie():
    """For people: first the many, then the few that matter."""
    answers = [
        answer(status=200, whole=True),
        answer(status=503, ran="no"),
        answer(behaviour="leaving", invocation_id=""),
    ]
    report = told(answers, judge(answers, [("a", 1)]))
    assert "1  leaving    left before it was told anything" in report
    assert "3 calls, 1 answers that were not the truth" in report
    assert "a: its caller was told" in report


class Nodes:
    """Admin listeners of two nodes: at each look at one, the next of its states is told, the last one for ever."""

    def __init__(self, **busy):
        self.busy, self.asked = busy, []

    def __call__(self, request):
        assert request.url.path == "/v1/live"
        self.asked.append(request.url.host)
        states = self.busy[request.url.host]
        busy, waiting = states.pop(0) if len(states) > 1 else states[0]
        workloads = [WorkloadNow(workload="other", busy=3), WorkloadNow(workload="echo", busy=busy, waiting=waiting)]
        now = Live(clock=lambda: 0.0, wall_ms=lambda: 0).snapshot(nodes=[], lost={}, reasons=[])
        return httpx.Response(200, content=msgspec.json.encode(structs.replace(now, workloads=workloads)))

    async def settle(self, *, within_s):
        async with httpx.AsyncClient(transport=httpx.MockTransport(self)) as operator:
            await settled(operator, ["http://n1", "http://n2"], "echo", within_s=within_s)


async def test_journals_are_read_when_every_node_says_that_the_calls_have_ended():
    """Whatever waits or runs of the workload may still act; calls of other workloads are waited for by nobody."""
    nodes = Nodes(n1=[(1, 2), (0, 1), (0, 0)], n2=[(1, 0), (0, 0)])
    await nodes.settle(within_s=30.0)
    assert nodes.asked == ["n1", "n1", "n1", "n2", "n2"]


async def test_an_audit_does_not_wait_for_ever_where_others_call_the_workload_too():
    nodes = Nodes(n1=[(1, 0)], n2=[(0, 0)])
    await nodes.settle(within_s=0.05)
    assert set(nodes.asked) == {"n1"}


async def test_a_node_that_does_not_say_what_it_is_at_makes_an_audit_impossible():
    async with httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(403, text="no"))) as operator:
        with pytest.raises(AuditImpossible, match="http://n1/v1/live: no"):
            await settled(operator, ["http://n1"], "echo", within_s=1.0)
