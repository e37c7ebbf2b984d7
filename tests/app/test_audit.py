"""The audit's judgement: what callers were told, held against what guests wrote down."""

from fc_invoke.audit import Answer, judge
from fc_invoke.auditing import told


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
