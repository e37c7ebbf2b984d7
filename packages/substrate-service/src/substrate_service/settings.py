"""Reading settings from the environment: once, all of them, and with every problem told at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

from msgspec import Struct

from substrate_seam import durations
from substrate_service import address
from substrate_service.address import Address, parse_address

Value = TypeVar("Value")
Default = TypeVar("Default")
Word = TypeVar("Word", bound=str)

_SHOWN_CHARACTERS_MAX: Final = 80
_SIZE = re.compile(r"([0-9]{1,15})\s*(|B|KiB|MiB|GiB|TiB)")
_SIZE_BYTES: Final = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_TRUE: Final = ("true", "on", "yes", "1")
_FALSE: Final = ("false", "off", "no", "0")
_INJECTED: Final = ("SERVICE_", "PORT")
"""How names go on that Kubernetes puts into the environment of a pod, for a Service of the daemon's name."""


class Problem(Struct, frozen=True, kw_only=True):
    """One variable that cannot be used as it is: what was found, and what is accepted."""

    variable: str
    found: str
    accepted: str

    def __str__(self) -> str:
        return f"{self.variable}: found {self.found}; accepted is {self.accepted}"


class SettingsInvalid(Exception):
    """Some settings cannot be used; the message lists all of them, one a line."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = "one setting" if len(problems) == 1 else f"{len(problems)} settings"
        super().__init__("\n  ".join([f"{count} cannot be used:", *map(str, problems)]))


class EnvironmentReader:
    """Typed settings out of an environment, such as `os.environ`; the problems are raised by `finish`.

    Each getter takes the full name of a variable and gives its value, or the default when the variable is unset,
    empty or wrong; the default may be None. A variable that begins with `prefix` and that no getter asked for is a
    problem too.
    """

    def __init__(self, environment: Mapping[str, str], *, prefix: str) -> None:
        self._environment = environment
        self._prefix = prefix
        self._known: set[str] = set()
        self._secret: set[str] = set()
        self._problems: list[Problem] = []

    def text(self, variable: str, default: Default) -> str | Default:
        """The value as it is."""
        return self._read(variable, default, str, "any text")

    def secret(self, variable: str, default: Default) -> str | Default:
        """The value as it is; no problem ever shows it."""
        self._secret.add(variable)
        return self.text(variable, default)

    def integer(self, variable: str, default: Default, *, at_least: int = 0, at_most: int = 2**53) -> int | Default:
        """A decimal number; unlike Go's daemon we refuse a malformed one rather than to ignore it."""

        def parse(text: str) -> int:
            if not re.fullmatch(r"[+-]?[0-9]{1,16}", text) or not at_least <= int(text) <= at_most:
                raise ValueError
            return int(text)

        bounds = f"from {at_least} to {at_most}" if at_most < 2**53 else f"of at least {at_least}"
        return self._read(variable, default, parse, f"a whole number {bounds}")

    def duration(self, variable: str, default_s: Default, *, zero: bool = False) -> float | Default:
        """Seconds, written in Go syntax; positive, or 0 if `zero` has a meaning."""

        def parse(text: str) -> float:
            seconds = durations.parse_duration(text)
            if seconds < 0 or not (seconds or zero):
                raise ValueError
            return seconds

        return self._read(variable, default_s, parse, f"{durations.ACCEPTED}, {'0 or ' if zero else ''}more than 0")

    def size(self, variable: str, default_bytes: Default) -> int | Default:
        """Bytes, written as `8 MiB`, `64KiB` or a plain number."""

        def parse(text: str) -> int:
            if not (match := _SIZE.fullmatch(text)):
                raise ValueError
            return int(match[1]) * _SIZE_BYTES[match[2]]

        return self._read(variable, default_bytes, parse, "a size such as 8 MiB, 64KiB or a plain number of bytes")

    def fraction(self, variable: str, default: Default) -> float | Default:
        """A number from 0 to 1."""

        def parse(text: str) -> float:
            if not 0.0 <= (number := float(text)) <= 1.0:
                raise ValueError
            return number

        return self._read(variable, default, parse, "a number from 0 to 1")

    def matching(self, variable: str, pattern: re.Pattern[str], accepted: str) -> str | None:
        """The first group of a pattern that the whole value fits; None without a value, or with one that does not."""

        def parse(text: str) -> str:
            if (match := pattern.fullmatch(text)) is None:
                raise ValueError
            return match[1]

        return self._read(variable, None, parse, accepted)

    def address(self, variable: str, default: Default) -> Address | Default:
        """Where to listen."""
        return self._read(variable, default, parse_address, address.ACCEPTED)

    def path(self, variable: str, default: Default) -> Path | Default:
        """A path, made absolute from where the daemon was started; whether anything is there its user finds out."""

        def parse(text: str) -> Path:
            if "\0" in text:
                raise ValueError
            return Path(text).absolute()

        return self._read(variable, default, parse, "a path")

    def boolean(self, variable: str, *, default: Default) -> bool | Default:
        """True or false, in any of the usual words."""

        def parse(text: str) -> bool:
            if text.lower() not in _TRUE + _FALSE:
                raise ValueError
            return text.lower() in _TRUE

        return self._read(variable, default, parse, f"{', '.join(_TRUE)} or {', '.join(_FALSE)}")

    def choice(self, variable: str, default: Default, *, among: Collection[Word]) -> Word | Default:
        """One of a few words."""

        def parse(text: str) -> Word:
            for word in among:
                if word == text:
                    return word
            raise ValueError

        return self._read(variable, default, parse, ", ".join(among))

    def names(self, variable: str) -> tuple[str, ...]:
        """A list with commas between; blanks around an item and empty items are dropped."""
        return self._read(variable, (), lambda text: tuple(filter(None, map(str.strip, text.split(",")))), "a list")

    def refuse(self, variable: str, accepted: str) -> None:
        """Add a problem that only the caller can see, such as two settings that exclude each other."""
        value = self._environment.get(variable, "")
        found = "a value that is not shown" if value and variable in self._secret else _shown(value)
        self._problems.append(Problem(variable=variable, found=found, accepted=accepted))

    def finish(self, *, known: Collection[str] = ()) -> None:
        """Raise `SettingsInvalid` if there was any problem.

        `known` are variables that are accepted without having been asked for.
        """
        self._known |= set(known)
        for variable, value in sorted(self._environment.items()):
            rest = variable.removeprefix(self._prefix)
            if value and rest != variable and variable not in self._known and not rest.startswith(_INJECTED):
                self._problems.append(self._unknown(variable))
        if self._problems:
            raise SettingsInvalid(self._problems)

    def _read(self, variable: str, default: Default, parse: Callable[[str], Value], accepted: str) -> Value | Default:
        self._known.add(variable)
        text = self._environment.get(variable, "")
        if not text:
            return default
        try:
            return parse(text)
        except ValueError:
            self.refuse(variable, accepted)
            return default

    def _unknown(self, variable: str) -> Problem:
        near = difflib.get_close_matches(variable, self._known, n=1, cutoff=0.0)
        accepted = f"no variable of this name; the nearest is {near[0]}" if near else "no variable of this prefix"
        # What a misspelt name holds may be a secret.
        return Problem(variable=variable, found="an unknown variable", accepted=accepted)


def _shown(value: str) -> str:
    if not value:
        return "nothing"
    return repr(value if len(value) <= _SHOWN_CHARACTERS_MAX else f"{value[:_SHOWN_CHARACTERS_MAX]}…")
