"""Durations are Go's: what `time.ParseDuration` takes we take, with the same meaning, and nothing else."""

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from substrate_seam.durations import format_duration, parse_duration

NS_PER = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
MOST_NS = 2**63 - 1

# What Go 1.26 answers, in nanoseconds; None where it reports an error.
GO_SAYS = {
    "0": 0,
    "+0": 0,
    "-0": 0,
    "0s": 0,
    "-0s": 0,
    "00s": 0,
    "007s": 7_000_000_000,
    "1s": 1_000_000_000,
    "+1s": 1_000_000_000,
    "-1s": -1_000_000_000,
    "1.s": 1_000_000_000,
    ".5s": 500_000_000,
    "1h2m3s": 3_723_000_000_000,
    "3h1h": 14_400_000_000_000,
    "1m30s": 90_000_000_000,
    "300ms": 300_000_000,
    "1.5h": 5_400_000_000_000,
    "0.1h": 360_000_000_000,
    "1ms1us1ns": 1_001_001,
    "1\u00b5s": 1_000,
    "1\u03bcs": 1_000,
    "1us": 1_000,
    "1ns": 1,
    "9223372036s": 9_223_372_036_000_000_000,
    "0.00000000000000000000000001h": 0,
    "": None,
    "s": None,
    "1": None,
    ".s": None,
    ".": None,
    "-.s": None,
    "-": None,
    "+": None,
    "1 s": None,
    " 1s": None,
    "1s ": None,
    "1s\n": None,
    "1S": None,
    "1d": None,
    "1sm": None,
    "1m5": None,
    "1e3s": None,
    "1_0s": None,
    "--1s": None,
    "+-1s": None,
    "1..5s": None,
    "1.2.3s": None,
    "0x1s": None,
    "inf": None,
    "nans": None,
    "1\u017f": None,
    "\u0663s": None,
    "\uff11s": None,
    "9223372037s": None,
    "3000000h": None,
    "99999999999999999999s": None,
}


def exact_ns(text: str) -> Fraction | None:
    """Read a duration character by character, as the Go documentation describes it; None when it is none."""
    sign, rest = (text[0], text[1:]) if text[:1] in ("+", "-") else ("", text)
    if rest == "0":
        return Fraction(0)
    total, seen = Fraction(0), bool(rest)
    while rest:
        number = rest[: len(rest) - len(rest.lstrip("0123456789."))]
        rest = rest[len(number) :]
        unit = next((u for u in sorted(NS_PER, key=len, reverse=True) if rest.startswith(u)), None)
        rest = rest[len(unit or "") :]
        whole = number.count(".") <= 1 and number.strip(".") != ""
        if not whole or unit is None or (rest and rest[0] not in "0123456789."):
            return None
        total += Fraction(f"0{number}0" if "." in number else number) * NS_PER[unit]
    return (-total if sign == "-" else total) if seen else None


@pytest.mark.parametrize(("text", "nanoseconds"), GO_SAYS.items(), ids=ascii)
def test_a_duration_means_what_go_says(text, nanoseconds):
    """A table taken from Go itself, good and bad."""
    if nanoseconds is None:
        with pytest.raises(ValueError, match="accepted is a duration in Go syntax"):
            parse_duration(text)
    else:
        assert parse_duration(text) == pytest.approx(nanoseconds / 1e9, rel=1e-12, abs=1e-9)


@given(st.text(st.sampled_from("0123456789.+-nuµμmsh"), max_size=24))
@example("1.5h30m")
@example("5.")
@example("")
def test_exactly_the_strings_of_the_grammar_are_accepted(text):
    """Whatever the letters, we agree with a character by character reading of the rules, up to the 64-bit limit."""
    expected = exact_ns(text)
    try:
        seconds = parse_duration(text)
    except ValueError:
        # Go's limit is 2**63 nanoseconds; ours is the whole second below it, 292 years either way.
        assert expected is None or abs(expected) > MOST_NS - 10**9
    else:
        assert expected is not None
        assert seconds == pytest.approx(float(expected / 10**9), rel=1e-12)


@given(st.text(max_size=80))
def test_no_text_breaks_the_parser(text):
    """Anything else is a `ValueError` that quotes a bounded part of it."""
    try:
        parse_duration(text)
    except ValueError as refused:
        assert len(str(refused)) < 1_000  # noqa: PT017  # most texts raise and some do not; both are fine


@given(st.integers(min_value=-(10**18), max_value=10**18))
def test_what_is_formatted_reads_back_to_the_nanosecond(nanoseconds):
    """Formatting loses nothing that a float of seconds can hold."""
    seconds = nanoseconds / 1e9
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, rel=1e-15, abs=1e-9)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (5e-10, "0s"),
        (1e-9, "1ns"),
        (1.5e-6, "1.5us"),
        (0.3, "300ms"),
        (1.5, "1.5s"),
        (90, "1m30s"),
        (-90, "-1m30s"),
        (3600, "1h"),
        (3661.25, "1h1m1.25s"),
    ],
)
def test_durations_are_written_as_people_write_them(seconds, text):
    """The unit follows the size, and parts that are zero are left out."""
    assert format_duration(seconds) == text
