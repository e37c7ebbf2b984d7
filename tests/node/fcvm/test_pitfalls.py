"""The page on pitfalls keeps its word."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[2]
PAGE = (TESTS.parent / "docs/pitfalls.md").read_text()


def test_every_pitfall_has_one_row():
    """From the first to the last, in their order."""
    assert re.findall(r"^\| (P-\d\d) \|", PAGE, re.MULTILINE) == [f"P-{number:02}" for number in range(1, 39)]


def test_every_test_that_the_page_names_exists():
    """Under that very name."""
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", PAGE)
    assert len(named) > 40
    for file, function in named:
        text = (TESTS / file).read_text()
        assert not function or f"def {function}(" in text, f"{file}::{function}"
