"""Durations as Go writes them (`90s`, `1m30s`, `300ms`, `1.5h`), held as seconds."""

from __future__ import annotations

import re

_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")  # \d would take any script's digits
_WHOLE = re.compile(rf"[+-]?(?:{_PART.pattern})+")
ACCEPTED = "a duration in Go syntax such as 90s, 1m30s, 300ms or 1.5h (a bare number is not one, except 0)"


def parse_duration(text: str) -> float:
    """Seconds of a Go duration; raises `ValueError` saying what is accepted."""
    if text in {"0", "+0", "-0"}:
        return 0.0
    if len(text) > 64 or not _WHOLE.fullmatch(text):
        raise ValueError(f"found {text[:64]!r}; accepted is {ACCEPTED}")
    seconds = sum(float(number) * _UNIT_S[unit] for number, unit in _PART.findall(text))
    if seconds > 9_223_372_036.0:  # Go holds durations in 64 bits of nanoseconds
        raise ValueError(f"found {text[:64]!r}, which is longer than 292 years; accepted is {ACCEPTED}")
    return -seconds if text.startswith("-") else seconds


def format_duration(seconds: float) -> str:
    """The shortest Go duration that says `seconds`, to the nanosecond."""
    sign, nanoseconds = ("-" if seconds < 0 else ""), round(abs(seconds) * 1e9)
    if nanoseconds == 0:
        return "0s"
    for unit, size in (("ns", 1), ("us", 1_000), ("ms", 1_000_000)):
        if (nanoseconds < size * 1_000 and unit != "ms") or (unit == "ms" and nanoseconds < 1_000_000_000):
            return f"{sign}{_trim(nanoseconds / size)}{unit}"
    hours, rest = divmod(nanoseconds, 3_600_000_000_000)
    minutes, rest = divmod(rest, 60_000_000_000)
    parts = [f"{hours}h" if hours else "", f"{minutes}m" if minutes else "", f"{_trim(rest / 1e9)}s" if rest else ""]
    return sign + "".join(parts)


def _trim(number: float) -> str:
    return f"{number:.9f}".rstrip("0").rstrip(".")
