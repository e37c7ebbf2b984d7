"""Audit mode: nothing is acted on that is not written down first."""

from pathlib import Path

import pytest

SOURCE = """
from pathlib import Path
from substrate_guest import App

app = App(lambda request: Path("acted").read_text(), before=[lambda request: Path("acted").write_text("acted")])
"""
STAMP = [("fc-invocation-id", "inv-1"), ("fc-attempt", "2")]
AUDIT = {"SUBSTRATE_AUDIT": "1"}


def acted(guest) -> bool:
    return Path(guest.path.parent / "acted").exists()


def test_the_journal_has_the_entry_before_the_guest_acts(start):
    guest = start(source=SOURCE, env=AUDIT, journal=b"+")
    guest.restored()
    assert guest.ask(headers=STAMP).text == "acted"
    assert guest.journal == ["inv-1 2\n"]


@pytest.mark.parametrize("journal", [None, b""])
def test_without_a_confirmed_entry_nothing_runs(start, journal):
    """Whether the host has no journal or its journal hangs up on us."""
    guest = start(source=SOURCE, env=AUDIT, journal=journal)
    guest.restored()
    reply = guest.ask(headers=STAMP)
    assert reply.status == 503
    assert "the journal cannot be reached" in reply.text
    assert not acted(guest)


@pytest.mark.parametrize("headers", [[], STAMP[:1], STAMP[1:]])
def test_what_cannot_be_named_is_not_run(start, headers):
    guest = start(source=SOURCE, env=AUDIT, journal=b"+")
    guest.restored()
    assert guest.ask(headers=headers).status == 503
    assert guest.journal == []
    assert not acted(guest)


def test_without_audit_mode_there_is_no_journal(start):
    guest = start(source=SOURCE, journal=b"+")
    guest.restored()
    assert guest.ask(headers=STAMP).text == "acted"
    assert guest.journal == []
