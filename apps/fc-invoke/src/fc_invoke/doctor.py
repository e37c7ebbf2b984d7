"""`fc-invoke doctor`: whether this machine can run guests with the settings there are, and how to mend it if not."""

from __future__ import annotations

import asyncio
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping

from fc_invoke.settings import PREFIX, read_settings
from substrate_guest import isolation
from substrate_node.doctor import Diagnosis, Kind, Level, Sight, diagnosed, examined
from substrate_node.host import microvm_rules
from substrate_node.state import default_state_root
from substrate_service.settings import SettingsInvalid

STATUS = {
    frozenset(Kind): 0,
    frozenset(): 1,
    frozenset({Kind.PROCESS}): 3,
    frozenset({Kind.MICROVM}): 4,
}
"""The exit status for each set of guests that can be had; 2 is for settings that can't be used."""
_COLOURS = {Level.OK: "32", Level.WARNING: "33", Level.PROBLEM: "31"}
_MARGIN, _WIDTH = 26, 110


def doctor(environment: Mapping[str, str], *, as_json: bool) -> int:
    """Look, tell everything that was found on standard output, and return the exit status."""
    try:
        sight = asyncio.run(look(environment))
    except SettingsInvalid as error:
        print(f"fc-invoke: {error}", file=sys.stderr)
        return 2
    diagnosis = diagnosed(sight)
    if as_json:
        print(json.dumps(as_data(diagnosis), indent=2))
    else:
        colourful = sys.stdout.isatty() and "NO_COLOR" not in environment
        print("\n".join(lines(diagnosis, colourful=colourful)))
    return STATUS[ready(diagnosis)]


async def look(environment: Mapping[str, str]) -> Sight:
    """See this machine as `serve` would with that environment. Raises `SettingsInvalid`."""
    node = read_settings(environment).node
    return await examined(
        microvm_rules(node, "fc-invoke", audited=node.audit_journal is not None),
        node.state_root or default_state_root("fc-invoke", environment),
        memory_mib=node.memory_mib,
        prefix=PREFIX,
        guest_argv=isolation.argv(),
    )


def ready(diagnosis: Diagnosis) -> frozenset[Kind]:
    """What guests can be had."""
    return frozenset(kind for kind in Kind if diagnosis.ready_for(kind))


def as_data(diagnosis: Diagnosis) -> dict[str, object]:
    """All of it for a program to read."""
    return {
        "ready": {kind.name.lower(): diagnosis.ready_for(kind) for kind in Kind},
        "jailed": diagnosis.jailed,
        "findings": [
            {
                "check": finding.check,
                "level": finding.level,
                "says": finding.says,
                "cure": finding.cure,
                "stops": [kind.name.lower() for kind in finding.stops],
            }
            for finding in diagnosis.findings
        ],
    }


def lines(diagnosis: Diagnosis, *, colourful: bool) -> Iterator[str]:
    """All of it for people to read: a finding, below it what to do, and last what guests can be had."""
    for finding in diagnosis.findings:
        head = _coloured(f"{finding.level:<9}{finding.check:<{_MARGIN - 9}}", finding.level, colourful=colourful)
        first, *rest = _wrapped(finding.says)
        yield head + first
        yield from (f"{' ' * _MARGIN}{line}" for line in [*rest, *_wrapped(finding.cure and f"Cure: {finding.cure}")])
    yield ""
    for kind in Kind:
        stopped_by = list(dict.fromkeys(f.check for f in diagnosis.findings if kind in f.stops))
        level = Level.PROBLEM if stopped_by else Level.OK
        verdict = f"no: see {', '.join(stopped_by)}" if stopped_by else "yes"
        jailed = ", jailed" if kind is Kind.MICROVM and diagnosis.jailed and not stopped_by else ""
        yield _coloured(f"{kind.value + ':':<{_MARGIN}}", level, colourful=colourful) + verdict + jailed


def _coloured(text: str, level: Level, *, colourful: bool) -> str:
    return f"\x1b[{_COLOURS[level]}m{text}\x1b[m" if colourful else text


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH - _MARGIN, break_on_hyphens=False, break_long_words=False)
