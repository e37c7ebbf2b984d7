"""The whole story of recent invocations: a bounded ring of events by invocation id."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import msgspec

from substrate_seam.events import Emit, Event
from substrate_seam.story import Happened, Plain, Story

STORIES_MAX, EVENTS_MAX = 4_096, 64


class Stories:
    """Keeps the events of the last invocations. `clock` gives wall-clock nanoseconds.

    `emit` costs the same however many are kept; the oldest story falls off, and a story keeps its first events.
    """

    def __init__(self, *, clock: Callable[[], int], stories_max: int = STORIES_MAX) -> None:
        self._clock = clock
        self._stories_max = stories_max
        self._stories: OrderedDict[str, list[tuple[int, Event]]] = OrderedDict()

    def sink(self, kind: type[Event]) -> Emit | None:
        """What is done with events of a kind: kept, if they belong to an invocation."""
        return self.emit if "invocation_id" in kind.__struct_fields__ else None

    def emit(self, event: Event) -> None:
        """Keep an event that belongs to an invocation."""
        invocation_id: str | None = getattr(event, "invocation_id", None)
        if invocation_id is None:
            return
        story = self._stories.get(invocation_id)
        if story is None:
            story = self._stories[invocation_id] = []
            if len(self._stories) > self._stories_max:
                self._stories.popitem(last=False)
        if len(story) < EVENTS_MAX:
            story.append((self._clock(), event))

    def story(self, invocation_id: str) -> Story | None:
        """What happened, in order. None if nothing of it is kept."""
        story = self._stories.get(invocation_id)
        if not story:
            return None
        return Story(self._clock(), tuple(Happened(at_ns, _plain(event)) for at_ns, event in story))


def _plain(event: Event) -> Plain:
    plain = dict(msgspec.to_builtins(event))
    plain.pop("invocation_id", None)
    return plain
