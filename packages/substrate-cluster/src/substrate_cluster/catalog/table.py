"""The workload table that people write, checked whole and turned into what the planes use. Reads no file.

The keys are those of the Go daemon and a few more; `docs/workload-table.md` explains each.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any, Final, Literal, TypedDict, cast, get_args

from msgspec import Struct

from substrate_cluster.catalog.document import Mapping, Value, read_document
from substrate_cluster.catalog.fields import (
    Read,
    duration,
    egress_rules,
    egress_secrets,
    environment,
    expected,
    flag,
    keys,
    list_of,
    matching,
    one_of,
    text,
    unknown_key,
    whole,
    whole_or_default,
)
from substrate_cluster.catalog.findings import Finding, Findings, Place
from substrate_seam.invocation import Isolation
from substrate_seam.workload import EgressRules, Name, Workload, WorkloadSpec

DEFAULT_REQUEST_TIMEOUT_S: Final = 90.0
DEFAULT_START_TIMEOUT_S: Final = 30.0
NAME_ACCEPTED: Final = "1 to 63 letters, digits, dots, underscores and dashes, beginning with a letter or digit"

_NAME = re.compile(cast("str", get_args(Name)[1].pattern))


class WorkloadEntry(TypedDict, total=False):
    """One workload as people write it, after each field was checked by itself. Durations are seconds by now."""

    image: str
    rootfsPath: str
    harnessInit: str
    vcpus: int
    memMib: int
    concurrency: int
    egressEnabled: bool
    egressSecrets: None
    warmBase: bool
    readyPath: str
    sessioned: bool
    requestTimeout: float
    command: tuple[str, ...]
    path: str
    python: str
    env: dict[str, str]
    guest: Literal["substrate", "go-shim"]
    isolation: Isolation
    pool: int
    startTimeout: float
    queue: int
    callers: tuple[str, ...]
    egress: EgressRules
    primeEgress: bool


class Entry(Struct, frozen=True, kw_only=True):
    """A workload as the cluster knows it: what nodes get, and what only the front needs.

    `request_timeout_s` bounds the exchange with the guest, `start_timeout_s` everything before it, in seconds.
    `callers` are the names that may call it; None admits whoever is authenticated.
    """

    workload: Workload
    request_timeout_s: float = DEFAULT_REQUEST_TIMEOUT_S
    start_timeout_s: float = DEFAULT_START_TIMEOUT_S
    callers: frozenset[str] | None = None


class ParsedTable(Struct, frozen=True):
    """A whole and valid table: its entries by name, and what in it is probably not what was meant."""

    entries: dict[str, Entry]
    warnings: tuple[Finding, ...] = ()


READERS: Final[dict[str, Read]] = {
    "image": text,
    "rootfsPath": matching(r"[^\x00-\x1f\x7f]+", "a path"),
    "harnessInit": matching(r"/[!#-&(-~]{0,254}", "an absolute path in the guest, without spaces and quotes"),
    "vcpus": whole_or_default(1, 32, 2),
    "memMib": whole_or_default(32, 1_048_576, 2_048),
    "concurrency": whole_or_default(1, 4_096, 4),
    "egressEnabled": flag,
    "egressSecrets": egress_secrets,
    "warmBase": flag,
    "readyPath": matching(r"/[!-\"$-~]{0,1023}", "a path that begins with /, in visible ASCII without #"),
    "sessioned": flag,
    "requestTimeout": duration(86_400, "24h"),
    "command": list_of(text, "arguments", least=1),
    "path": matching(r"[^\x00-\x1f\x7f]+", "the path of a directory"),
    "python": matching(r"[^\x00-\x1f\x7f/]*/[^\x00-\x1f\x7f]+", "the path of an interpreter, with a slash in it"),
    "env": environment,
    "guest": one_of("substrate", "go-shim"),
    "isolation": one_of(*Isolation),
    "pool": whole(0, 1_024),
    "startTimeout": duration(3_600, "1h"),
    "queue": whole(0, 65_536),
    "callers": list_of(matching(r"[!-~]{1,256}", "the name of a caller, in visible ASCII"), "names of callers"),
    "egress": egress_rules,
    "primeEgress": flag,
}
"""How each field is read, in the order of the documentation."""

_TO_NODES: Final = {
    "image": "image",
    "rootfsPath": "rootfs_path",
    "harnessInit": "harness_init",
    "vcpus": "vcpus",
    "memMib": "memory_mib",
    "concurrency": "concurrency",
    "egressEnabled": "egress_enabled",
    "warmBase": "warm_base",
    "readyPath": "ready_path",
    "sessioned": "sessioned",
    "command": "command",
    "path": "path",
    "python": "python",
    "env": "env",
    "guest": "guest",
    "isolation": "isolation",
    "pool": "pool",
    "queue": "queue",
    "egress": "egress",
    "primeEgress": "prime_egress",
}
"""The fields that travel, and what a `WorkloadSpec` calls them; their defaults are its defaults."""

_HOST_PATHS: Final = ("rootfsPath", "path", "python")
_EMPTY_IS_DEFAULT: Final = frozenset({"image", "harnessInit", "readyPath", "requestTimeout", *_HOST_PATHS})


def parse_table(raw: bytes, *, source: str, directory: str | None = None) -> ParsedTable:
    """Read a workload table in JSON or YAML; `source` names it in messages, and its suffix may tell the format.

    Relative paths are those below `directory`, an absolute path; without one they are refused. Raises
    `TableInvalid` with everything that is wrong with the table.
    """
    findings = Findings(source)
    entries = _entries(read_document(raw, source=source), directory, findings)
    if findings.defaulted:
        findings.warn(Place(), f"numbers of 0 or less mean the default: {', '.join(findings.defaulted)}")
    findings.settle()
    return ParsedTable(entries, tuple(findings.warnings))


def _entries(tree: Value, directory: str | None, findings: Findings) -> dict[str, Entry]:
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        expected("an object of workloads by name", tree, Place(), findings)
        return {}
    entries: dict[str, Entry] = {}
    for name, value, place in keys(tree, Place(), findings):
        if not _NAME.fullmatch(name):
            expected(f"a name of {NAME_ACCEPTED}", name, place, findings)
        entry = _entry(name, value, place, directory, findings)
        if entry is not None:
            entries[name] = entry
    return entries


def _entry(name: str, value: Value, place: Place, directory: str | None, findings: Findings) -> Entry | None:
    """One workload, or None after at least one problem was noted."""
    if not isinstance(value, Mapping):
        expected("an object", value, place, findings)
        return None
    problems_before = len(findings.problems)
    places: dict[str, Place] = {}
    written: dict[str, Any] = {}
    for key, field, at in keys(value, place, findings):
        if key not in READERS:
            unknown_key(key, tuple(READERS), at, findings)
        elif field is not None and not (field == "" and key in _EMPTY_IS_DEFAULT):
            places[key] = at
            written[key] = READERS[key](field, at, findings)
    _resolve_paths(written, directory, places, findings)
    _check_guest(cast("WorkloadEntry", written), place, places, findings)
    _check_sense(cast("WorkloadEntry", written), places, findings)
    return None if len(findings.problems) > problems_before else _sealed(name, cast("WorkloadEntry", written))


def _resolve_paths(
    written: dict[str, Any], directory: str | None, places: dict[str, Place], findings: Findings
) -> None:
    """Make the paths of the host absolute, in place."""
    for key in _HOST_PATHS:
        path = written.get(key)
        if path is None or path.startswith("/"):
            continue
        if directory is None:
            expected("an absolute path, since this table is in no directory", path, places[key], findings)
        else:
            written[key] = posixpath.normpath(posixpath.join(directory, path))


def _check_guest(entry: WorkloadEntry, place: Place, places: dict[str, Place], findings: Findings) -> None:
    """Refuse what does not go together with the kind of guest. Goes by what was written, even where it was bad."""
    if ("command" in places) == ("rootfsPath" in places):
        both = "both command and rootfsPath" if "command" in places else "neither command nor rootfsPath"
        return findings.refuse(
            place, f"found {both}; accepted is exactly one: command for a process guest, rootfsPath for a microVM"
        )
    if "rootfsPath" in places:
        for key in ("path", "python", "env"):
            if key in places:
                findings.refuse(places[key], "this goes with command only; a microVM brings what its image holds")
        return None
    if entry.get("guest") == "go-shim":
        findings.refuse(places["guest"], "found go-shim with command; a process guest is always a substrate guest")
    if entry.get("isolation") not in {None, Isolation.PROCESS}:
        findings.refuse(
            places["isolation"], "found more isolation than command can have; a microVM needs rootfsPath instead"
        )
    return None


def _check_sense(entry: WorkloadEntry, places: dict[str, Place], findings: Findings) -> None:
    """Warn of what is accepted and changes nothing, or more than people may think."""
    if "command" in places:
        for key in ("image", "harnessInit"):
            if key in places:
                findings.warn(places[key], "this has no effect on a process guest")
    if not entry.get("egressEnabled"):
        for key in ("egress", "primeEgress"):
            if entry.get(key):
                findings.warn(places[key], "this has no effect without egressEnabled: true")
    if entry.get("callers") == ():
        findings.warn(places["callers"], "an empty list lets nobody call; leave it out to let everybody")
    if (entry.get("pool") or 0) > (entry.get("concurrency") or 4):
        findings.warn(places["pool"], "more guests are parked than can ever run at once (concurrency)")


def _sealed(name: str, entry: WorkloadEntry) -> Entry:
    """Split what was written into what nodes get and what stays here; both are checked by now."""
    for_nodes: dict[str, Any] = {_TO_NODES[key]: value for key, value in entry.items() if key in _TO_NODES}
    for_nodes.setdefault("guest", "go-shim" if "rootfsPath" in entry else "substrate")
    callers = entry.get("callers")
    return Entry(
        workload=Workload.of(WorkloadSpec(name=name, requires=_requires(entry), **for_nodes)),
        request_timeout_s=entry.get("requestTimeout", DEFAULT_REQUEST_TIMEOUT_S),
        start_timeout_s=entry.get("startTimeout", DEFAULT_START_TIMEOUT_S),
        callers=None if callers is None else frozenset(callers),
    )


def _requires(entry: WorkloadEntry) -> tuple[str, ...]:
    """The features without which a node must not run this, because it would ignore a safeguard."""
    needs = {
        "egress": entry.get("egressEnabled"),
        "egress-rules": "egress" in entry,
        "pool": entry.get("pool", 0) > 0,
        "sessioned": entry.get("sessioned"),
    }
    return tuple(feature for feature, needed in needs.items() if needed)
