"""One reader per kind of field: a value as written in, a checked value out.

A reader returns None after it has refused what it read, so that the walk goes on and finds the next problem.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable
from typing import Any, TypeAlias

from substrate_cluster.catalog.document import Mapping, Odd, Value, found
from substrate_cluster.catalog.findings import Findings, Place, shortened
from substrate_seam.durations import parse_duration
from substrate_seam.workload import EgressRules

Read: TypeAlias = Callable[[Value, Place, Findings], Any]

MOST_ITEMS = 1_024
MOST_CHARACTERS = 128 * 1024
"""What Linux takes as one argument or one variable."""

_UNSENDABLE = re.compile("[\x00\ud800-\udfff]")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OURS = frozenset({"SUBSTRATE_LISTEN_FD", "SUBSTRATE_DIAL_FD"})
_HOST = re.compile(r"\*|(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*")
_HOST_PORT = re.compile(r"(\[[^\]]*\]|[^:\[\]]+)(?::([0-9]{1,5}))?")


def expected(accepted: str, value: Value, place: Place, findings: Findings, *, hint: str = "") -> None:
    """Refuse a value: what was found, what is accepted, and what to do about it."""
    hint = value.hint if isinstance(value, Odd) else hint
    findings.refuse(place, f"found {found(value)}; accepted is {accepted}" + (f" ({hint})" if hint else ""))


def text(value: Value, place: Place, findings: Findings) -> str | None:
    """Any string that can travel: no NUL, no lone surrogate."""
    if not isinstance(value, str):
        quoted = isinstance(value, bool | int | float)
        expected("a string", value, place, findings, hint="quote it" if quoted else "")
        return None
    if _UNSENDABLE.search(value) or len(value) > MOST_CHARACTERS:
        accepted = f"a string of at most {MOST_CHARACTERS:,} characters without NUL and lone surrogates"
        expected(accepted, value, place, findings)
        return None
    return value


def matching(pattern: str, accepted: str) -> Read:
    """A string that matches `pattern` from end to end."""
    compiled = re.compile(pattern)

    def read(value: Value, place: Place, findings: Findings) -> str | None:
        if isinstance(value, str) and compiled.fullmatch(value):
            return text(value, place, findings)
        expected(accepted, value, place, findings)
        return None

    return read


def flag(value: Value, place: Place, findings: Findings) -> bool | None:
    """True or false, as such."""
    if isinstance(value, bool):
        return value
    is_quoted = isinstance(value, str) and value.lower() in {"true", "false"}
    expected("true or false", value, place, findings, hint="without the quotes" if is_quoted else "")
    return None


def whole(least: int, most: int) -> Read:
    """A whole number from `least` to `most`."""

    def read(value: Value, place: Place, findings: Findings) -> int | None:
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        is_quoted = isinstance(value, str) and value.strip().isdecimal()
        hint = "without the quotes" if is_quoted else ""
        expected(f"a whole number from {least:,} to {most:,}", value, place, findings, hint=hint)
        return None

    return read


def whole_or_default(least: int, most: int, default: int) -> Read:
    """A whole number, where 0 and less mean the default, as they did in Go."""
    exact = whole(least, most)

    def read(value: Value, place: Place, findings: Findings) -> int | None:
        if isinstance(value, int) and not isinstance(value, bool) and value <= 0:
            findings.defaulted.append(f"{place.path} ({value} means {default})")
            return default
        number: int | None = exact(value, place, findings)
        return number

    return read


def duration(most_s: float, most: str) -> Read:
    """A positive duration in Go syntax of at most `most_s` seconds, in seconds."""
    accepted = f"a duration longer than 0 and at most {most} in Go syntax, such as 90s, 1m30s, 300ms or 1.5h"

    def read(value: Value, place: Place, findings: Findings) -> float | None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not isinstance(value, str):
            hint = f'write "{value}s" if you mean seconds' if is_number else ""
            expected(accepted, value, place, findings, hint=hint)
            return None
        try:
            seconds = parse_duration(value)
        except ValueError:
            seconds = 0.0
        if 0 < seconds <= most_s:
            return seconds
        expected(accepted, value, place, findings)
        return None

    return read


def one_of(*choices: str) -> Read:
    """One of a few words."""
    accepted = " or ".join(choices)

    def read(value: Value, place: Place, findings: Findings) -> str | None:
        if isinstance(value, str) and value in choices:
            return value
        expected(accepted, value, place, findings)
        return None

    return read


def list_of(item: Read, accepted: str, *, least: int = 0) -> Read:
    """A list whose items all read well; an empty one only where `least` is 0."""

    def read(value: Value, place: Place, findings: Findings) -> tuple[Any, ...] | None:
        if not isinstance(value, list) or not least <= len(value) <= MOST_ITEMS:
            hint = "write a list, even of one" if isinstance(value, str) else ""
            expected(f"a list of {least} to {MOST_ITEMS:,} {accepted}", value, place, findings, hint=hint)
            return None
        items = [item(one, place.item(index), findings) for index, one in enumerate(value)]
        return None if None in items else tuple(items)

    return read


def environment(value: Value, place: Place, findings: Findings) -> dict[str, str] | None:
    """Variables by name. The two through which a guest gets its sockets are ours."""
    if not isinstance(value, Mapping):
        expected("an object of strings by variable name", value, place, findings)
        return None
    variables: dict[str, str] = {}
    for name, written, at in keys(value, place, findings):
        if not _VARIABLE.fullmatch(name) or name in _OURS:
            expected(
                f"a name of letters, digits and underscores other than {' and '.join(sorted(_OURS))}",
                name,
                at,
                findings,
            )
        elif (checked := text(written, at, findings)) is not None:
            variables[name] = checked
    if sum(len(name) + len(written) for name, written in variables.items()) > MOST_CHARACTERS:
        findings.refuse(place, f"found too much; accepted are {MOST_CHARACTERS:,} characters of names and values")
    return variables


def destination(value: Value, place: Place, findings: Findings) -> str | None:
    """A pattern of hosts, with or without a port, in lower case."""
    accepted = "host or host:port, where a host is a name, *.name, an address ([…] for IPv6) or *"
    if not isinstance(value, str):
        expected(accepted, value, place, findings)
        return None
    parts = _HOST_PORT.fullmatch(value)
    if parts is None or not _is_host(parts[1]) or not 0 < int(parts[2] or 1) < 65_536:
        hint = "leave out scheme and path" if "/" in value else "IPv6 goes in brackets" if value.count(":") > 1 else ""
        expected(accepted, value, place, findings, hint=hint)
        return None
    return value.lower()


def egress_rules(value: Value, place: Place, findings: Findings) -> EgressRules | None:
    """What `egress` says. `deny` alone could be read two ways, so `allow` has to be there."""
    if not isinstance(value, Mapping):
        expected("an object with allow and deny", value, place, findings)
        return None
    lists: dict[str, tuple[str, ...]] = {}
    for key, written, at in keys(value, place, findings):
        if key not in {"allow", "deny"}:
            unknown_key(key, ("allow", "deny"), at, findings)
        elif written is not None:
            lists[key] = tuple(sorted(set(_hosts(written, at, findings) or ())))
            if key == "allow" and written == []:
                findings.refuse(at, "found an empty list; to let a guest reach nothing, leave egressEnabled out")
    if "allow" not in lists:
        findings.refuse(place, 'found no allow; accepted is allow with or without deny (allow: ["*"] for everything)')
    return EgressRules(**lists)


def egress_secrets(value: Value, place: Place, findings: Findings) -> None:
    """Check and drop `egressSecrets`: names were never read, and swapped placeholders are a generation that is gone."""
    if not isinstance(value, list):
        expected("a list of names", value, place, findings)
        return
    for index, secret in enumerate(value):
        if isinstance(secret, Mapping):
            _migrate(secret, place.item(index), findings)
        else:
            text(secret, place.item(index), findings)
    if value:
        findings.warn(place, "names of secrets have no effect here and never had; the egress proxy has them")


def keys(mapping: Mapping, place: Place, findings: Findings) -> list[tuple[str, Value, Place]]:
    """The entries of an object with their places; keys that are odd or were there before are refused."""
    seen: dict[str, int | None] = {}
    entries: list[tuple[str, Value, Place]] = []
    for key, value, line in mapping.entries:
        if isinstance(key, Odd):
            findings.refuse(
                Place(place.path, line or place.line), f"found {key.found} as a key; accepted is a string (quote it)"
            )
        elif key in seen:
            first = f" (first in line {seen[key]})" if seen[key] else ""
            findings.refuse(place.key(key, line), f"found the key a second time{first}; accepted is once")
        else:
            seen[key] = line
            entries.append((key, value, place.key(key, line)))
    return entries


def unknown_key(key: str, known: tuple[str, ...], place: Place, findings: Findings) -> None:
    """Refuse a key, and name the one that was probably meant."""
    plain = {name.lower(): name for name in known}
    typed = re.sub(r"[^a-z0-9]", "", key[:64].lower())
    near = difflib.get_close_matches(typed, plain, n=2)
    if plain.get(key.lower()) is not None:
        meant = f"keys are exact: write {plain[key.lower()]}"
    elif near:
        meant = f"did you mean {' or '.join(plain[name] for name in near)}?"
    else:
        meant = f"accepted are {', '.join(known)}"
    findings.refuse(place, f"found the unknown key {shortened(key)!r}; {meant}")


_hosts = list_of(destination, "hosts")


def _is_host(host: str) -> bool:
    if not host.startswith("["):
        return _HOST.fullmatch(host) is not None
    try:
        return ipaddress.IPv6Address(host[1:-1]).scope_id is None
    except ValueError:
        return False


def _migrate(secret: Mapping, place: Place, findings: Findings) -> None:
    """Say where a secret written into the table belongs now."""
    generation = (
        "found a secret of the first generation, whose placeholder was swapped inside URLs and headers; that put real "
        "values into logs and is gone"
        if any(entry.key == "placeholder" for entry in secret.entries)
        else "found a secret; the table holds none"
    )
    findings.refuse(
        place,
        f"{generation}. Move it to EGRESS_SECRETS of the egress proxy as an object of header, valuePrefix, env and "
        "egressTo: the proxy then sets that header towards these hosts",
    )
