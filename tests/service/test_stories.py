"""A bounded ring tells the whole story of each recent invocation."""

from substrate_seam.events import CallQueued, DaemonStopped, GuestGone
from substrate_seam.story import Happened, Story
from substrate_service.stories import EVENTS_MAX, Stories


def queued(invocation_id, waiting=1):
    return CallQueued(invocation_id=invocation_id, workload="w", waiting=waiting)


def ticking():
    """A clock that moves on by 1.5 ms at each look."""
    now_ns = 1_000_000_000

    def clock():
        nonlocal now_ns
        now_ns += 1_500_000
        return now_ns

    return clock


def test_a_story_is_what_happened_in_order_with_times_since_its_beginning():
    """Events of other invocations, and of none, are not in it."""
    stories = Stories(clock=ticking())
    stories.emit(queued("a"))
    stories.emit(queued("b"))
    stories.emit(DaemonStopped(daemon="d", clean=True))
    stories.emit(GuestGone(guest="g", workload="w", invocation_id="a"))
    assert stories.story("a") == Story(
        1_006_000_000,
        (
            Happened(1_001_500_000, {"event": "call.queued", "workload": "w", "waiting": 1}),
            Happened(1_004_500_000, {"event": "guest.gone", "guest": "g", "workload": "w"}),
        ),
    )


def test_nothing_is_told_of_an_unknown_invocation():
    """Neither of one that fell off the ring."""
    stories = Stories(clock=ticking(), stories_max=2)
    for invocation_id in "abc":
        stories.emit(queued(invocation_id))
    assert stories.story("a") is None
    assert stories.story("nobody") is None
    assert stories.story("b") is not None


def test_an_endless_story_keeps_its_beginning():
    """A call that queues and retries for ever does not fill the memory."""
    stories = Stories(clock=ticking())
    for number in range(EVENTS_MAX + 10):
        stories.emit(queued("a", waiting=number))
    kept = [happened.event["waiting"] for happened in stories.story("a").events]
    assert kept == list(range(EVENTS_MAX))
