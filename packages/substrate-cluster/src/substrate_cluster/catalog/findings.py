"""What is wrong with a workload table, or odd about it, and where."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from msgspec import Struct

MOST_PROBLEMS = 1_000
"""After so many problems a table is not read further."""

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Place(NamedTuple):
    """Where in a table something stands: `agent.egress.allow[0]`, and its line where the format tells."""

    path: str = ""
    line: int | None = None

    def key(self, key: str, line: int | None = None) -> Place:
        """The place of one key of the object here."""
        step = key if _PLAIN_KEY.fullmatch(key) else json.dumps(shortened(key))
        return Place(f"{self.path}.{step}" if self.path else step, line or self.line)

    def item(self, index: int) -> Place:
        """The place of one item of the list here."""
        return Place(f"{self.path}[{index}]", self.line)


class Finding(Struct, frozen=True):
    """One problem or one warning: its place and a sentence about it."""

    path: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        line = "" if self.line is None else f"line {self.line}"
        where = f"{self.path} ({line})" if self.path and line else self.path or line
        return f"{where}: {self.message}" if where else self.message


class TableInvalid(Exception):
    """A workload table is refused whole; `problems` are all that is wrong with it, and `str` lists them."""

    def __init__(self, source: str, problems: tuple[Finding, ...]) -> None:
        self.source = source
        self.problems = problems
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{source} is refused: {count}", *(f"  - {problem}" for problem in problems)]))


class Findings:
    """Collects what a walk over one table finds, so that people hear everything at once.

    `defaulted` are the places where a number of 0 or less stands for the default; they share one warning.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.problems: list[Finding] = []
        self.warnings: list[Finding] = []
        self.defaulted: list[str] = []

    def refuse(self, place: Place, message: str) -> None:
        """Note a problem; raises `TableInvalid` when there are too many to go on."""
        self.problems.append(Finding(place.path, message, place.line))
        if len(self.problems) == MOST_PROBLEMS:
            self.problems.append(Finding("", f"{MOST_PROBLEMS:,} problems are enough: the rest was not read"))
            self.settle()

    def warn(self, place: Place, message: str) -> None:
        """Note something that is accepted and probably not what was meant."""
        self.warnings.append(Finding(place.path, message, place.line))

    def settle(self) -> None:
        """Raise `TableInvalid` if there is any problem."""
        if self.problems:
            raise TableInvalid(self.source, tuple(self.problems))


def refused(source: str, message: str, line: int | None = None) -> TableInvalid:
    """The error for a table of which nothing could be read."""
    return TableInvalid(source, (Finding("", message, line),))


def shortened(text: str, most: int = 60) -> str:
    """At most `most` characters of `text`, with a mark where it was cut; lone surrogates are escaped."""
    shown = text[:most].encode("utf-8", "backslashreplace").decode()
    return shown if len(text) <= most else f"{shown}…"
