"""The page about the workload table says what the code does."""

import json
import re
from pathlib import Path

import pytest

from substrate_cluster.catalog import TableInvalid, parse_table
from substrate_cluster.catalog.table import READERS

PAGE = (Path(__file__).parents[2] / "docs" / "workload-table.md").read_text()
EXAMPLES = re.findall(r"^```(yaml|json)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
ROWS = re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE, re.MULTILINE)
NUMBERS = re.findall(r"^\| `(\w+)` \| \d+ \| ([\d,]+) to ([\d,]+) \|", PAGE, re.MULTILINE)
DURATIONS = re.findall(r"^\| `(\w+)` \| `\w+` \| up to `(\w+)` \|", PAGE, re.MULTILINE)
WRITTEN = {"`true`": True, "`false`": False, '`""`': "", "`{}`": {}}
PROCESS, MICROVM = {"command": ["serve"]}, {"rootfsPath": "/r.ext4"}


def entry_of(fields):
    """The one workload of a table, as it is understood."""
    return parse_table(json.dumps({"w": fields}).encode(), source="page.json").entries["w"]


def is_accepted(**fields):
    """Whether a process guest may have these fields."""
    try:
        entry_of({**PROCESS, **fields})
    except TableInvalid:
        return False
    return True


@pytest.mark.parametrize(("suffix", "text"), EXAMPLES, ids=[suffix for suffix, _ in EXAMPLES])
def test_each_example_is_a_table_without_warnings(suffix, text):
    """People copy them."""
    table = parse_table(text.encode(), source=f"example.{suffix}", directory="/srv")
    assert table.entries
    assert table.warnings == ()


def test_every_field_has_its_row_and_no_row_is_about_another():
    """Neither can be forgotten."""
    assert sorted(field for field, _ in ROWS) == sorted(READERS)


@pytest.mark.parametrize(
    ("field", "default"), [row for row in ROWS if row[1] in WRITTEN or re.match(r"`?\d|`/", row[1])]
)
def test_a_default_that_the_page_names_is_the_one_in_force(field, default):
    """Writing it down changes nothing."""
    value = WRITTEN[default] if default in WRITTEN else int(default) if default.isdecimal() else default.strip("`")
    assert entry_of({**PROCESS, field: value}) == entry_of(PROCESS)


@pytest.mark.parametrize(("guest", "default"), [(MICROVM, "go-shim"), (PROCESS, "substrate")])
def test_the_default_guest_is_the_one_that_the_page_names(guest, default):
    """It depends on what the guest is started from."""
    assert ("guest", "`go-shim` with `rootfsPath`, else `substrate`") in ROWS
    assert entry_of({**guest, "guest": default}) == entry_of(guest)


def test_the_bounds_that_the_page_names_are_those_in_force():
    """The last value that is accepted is, and the next one is not."""
    assert [field for field, *_ in NUMBERS + DURATIONS] == [
        *("vcpus", "memMib", "concurrency", "queue", "pool"),
        *("requestTimeout", "startTimeout"),
    ]
    for field, *bounds in NUMBERS:
        least, most = (int(bound.replace(",", "")) for bound in bounds)
        assert is_accepted(**{field: least})
        assert is_accepted(**{field: most})
        assert not is_accepted(**{field: most + 1})
        assert least < 2 or not is_accepted(**{field: least - 1})
    for field, most in DURATIONS:
        assert is_accepted(**{field: most})
        assert not is_accepted(**{field: f"{most}1us"})
