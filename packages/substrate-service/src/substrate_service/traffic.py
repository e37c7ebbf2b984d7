"""Calls counted in slots of time: what ended lately, how it started, how long it took. Its size is bounded."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

from substrate_service.snapshot import Second, Traffic

_PER_OCTAVE: Final = 16
"""So many classes of duration between a duration and its double: what is told of them is within 2.2 % of the truth."""
_MS_MIN: Final = 0.001


def class_of(total_ms: float) -> int:
    """The class of a duration, by which tallies count."""
    return math.floor(math.log2(max(total_ms, _MS_MIN)) * _PER_OCTAVE)


class Tally:
    """Calls of one slot of time, or of several together."""

    __slots__ = ("ended", "failed", "starts", "times")

    def __init__(self) -> None:
        self.ended = 0
        self.failed = 0
        self.starts: dict[str, int] = {}
        self.times: dict[int, int] = {}

    def add(self, start: str | None, class_: int, *, failed: bool) -> None:
        """Count one call that took as long as `class_of` says; `start` is None if it never had a guest."""
        self.ended += 1
        self.failed += failed
        if start is not None:
            self.starts[start] = self.starts.get(start, 0) + 1
        self.times[class_] = self.times.get(class_, 0) + 1

    def total_ms(self, share: float) -> float | None:
        """What this share of the calls (0 to 1) took at most; None without calls."""
        rank = math.ceil(share * self.ended)
        for class_ in sorted(self.times):
            rank -= self.times[class_]
            if rank <= 0:
                return float(f"{2 ** ((class_ + 0.5) / _PER_OCTAVE):.3g}")
        return None

    def traffic(self) -> Traffic:
        """The same, for whoever asks."""
        return Traffic(
            ended=self.ended,
            failed=self.failed,
            starts=dict(self.starts),
            p50_ms=self.total_ms(0.5),
            p99_ms=self.total_ms(0.99),
        )

    def second(self) -> Second:
        """The same, of one second."""
        return Second(ended=self.ended, failed=self.failed, p50_ms=self.total_ms(0.5))


def together(tallies: Iterable[Tally]) -> Tally:
    """Several tallies as one."""
    whole = Tally()
    for tally in tallies:
        whole.ended += tally.ended
        whole.failed += tally.failed
        for mine, theirs in ((whole.starts, tally.starts), (whole.times, tally.times)):
            _merge(mine, theirs)  # type: ignore[arg-type]  # keys of one kind each time
    return whole


def _merge(mine: dict[object, int], theirs: dict[object, int]) -> None:
    for key, count in theirs.items():
        mine[key] = mine.get(key, 0) + count


class Window:
    """The last `slots` slots of `slot_s` seconds each, the present one included; times are seconds of one clock."""

    def __init__(self, *, slots: int, slot_s: float) -> None:
        self._slots = slots
        self._slot_s = slot_s
        self._tallies: deque[tuple[int, Tally]] = deque()

    def at(self, now_s: float) -> Tally:
        """The slot of this moment."""
        number = self._number(now_s)
        if not self._tallies or self._tallies[-1][0] != number:
            self._drop_old(number)
            self._tallies.append((number, Tally()))
        return self._tallies[-1][1]

    def tallies(self, now_s: float) -> Iterator[Tally]:
        """Every slot in which something was counted, the oldest first."""
        self._drop_old(self._number(now_s))
        return (tally for _, tally in self._tallies)

    def each(self, now_s: float) -> list[Tally]:
        """One tally for every slot, also where nothing was counted; the present one last."""
        number = self._number(now_s)
        found = dict(self._tallies)
        return [found.get(each) or Tally() for each in range(number - self._slots + 1, number + 1)]

    def _number(self, now_s: float) -> int:
        return math.floor(now_s / self._slot_s)

    def _drop_old(self, number: int) -> None:
        while self._tallies and self._tallies[0][0] <= number - self._slots:
            self._tallies.popleft()
