"""Releases of Firecracker: what each of them knows, and which of them must not be used."""

from __future__ import annotations

import re
from typing import NamedTuple


class Release(NamedTuple):
    """A release by its number; what is built on the way to one counts as it."""

    major: int
    minor: int
    patch: int

    @classmethod
    def parse(cls, said: str) -> Release:
        """Find the number in what `--version` or the API says. Raises `ValueError`."""
        found = re.search(r"(\d+)\.(\d+)\.(\d+)", said)
        if found is None:
            raise ValueError(f"{said[:64]!r} names no release")
        return cls(*map(int, found.groups()))

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"

    def knows(self, field: str) -> bool:
        """Whether the API takes an optional field; one that is not in our table is as old as the API."""
        since = _SINCE.get(field)
        if since is None:
            return True
        same_line = [first for first in since if first[:2] == self[:2]]
        return self >= same_line[0] if same_line else self > since[-1]

    def fault(self) -> str | None:
        """Why it must not run a guest of ours; None if it may."""
        if self in _BROKEN:
            return f"Firecracker {self} {_BROKEN[self]}"
        if self < OLDEST:
            return f"Firecracker {self} is older than {OLDEST}, the oldest that serves well"
        return None

    def objection(self) -> str | None:
        """Its fault, and what to install instead."""
        fault = self.fault()
        return f"{fault}. Install {ADVISED}" if fault is not None else None


ADVISED = "1.17.0, or 1.16.2"
OLDEST = Release(1, 14, 0)
"""Before it, streams to guests with a kernel of 6.17 or newer could be damaged, and log files were not created."""

_BROKEN = {
    Release(1, 16, 0): "is broken: the vsock of a restored guest may be dead for good (mended in 1.16.1)",
}
_SINCE = {  # the first release of each line that knows the field, oldest first
    "vsock_override": (Release(1, 16, 0),),
    "clock_realtime": (Release(1, 14, 4), Release(1, 15, 1), Release(1, 16, 0)),
    "huge_pages": (Release(1, 17, 0),),
}
