"""What `fc-invoke check` says about a workload table, and on request about the host it is to run on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import NamedTuple

from substrate_cluster.catalog.findings import Finding, TableInvalid
from substrate_cluster.catalog.holder import TableSource
from substrate_cluster.catalog.table import Entry
from substrate_seam.durations import format_duration
from substrate_seam.workload import WorkloadSpec


class Kind(StrEnum):
    """What a path of the host leads to."""

    NOTHING = "nothing"
    DIRECTORY = "a directory"
    FILE = "a file"
    PROGRAM = "an executable file"
    OTHER = "something that is neither file nor directory"


class Checked(NamedTuple):
    """Whether a table may be used, and everything that is to be said about it."""

    ok: bool
    report: str


def check_table(source: TableSource, *, kind_of: Callable[[str], Kind] | None = None) -> Checked:
    """Check a table as a daemon would. Only with `kind_of` are the paths in it looked up, by that function."""
    try:
        table = source.parsed()
        if kind_of is not None and (missing := host_problems(table.entries.values(), kind_of=kind_of)):
            raise TableInvalid(source.label, missing)
    except TableInvalid as error:
        return Checked(ok=False, report=str(error))
    count = "one workload" if len(table.entries) == 1 else f"{len(table.entries)} workloads"
    lines = [f"{source.label}: OK, {count}", *_rows(table.entries.values())]
    return Checked(ok=True, report="\n".join([*lines, *(f"warning: {warning}" for warning in table.warnings)]))


def host_problems(entries: Iterable[Entry], *, kind_of: Callable[[str], Kind]) -> tuple[Finding, ...]:
    """What the host lacks of the files that workloads name."""
    problems: list[Finding] = []
    for spec in (entry.workload.spec for entry in entries):
        for field, path, accepted in _named_paths(spec):
            if path is not None and (kind := kind_of(path)) not in accepted:
                problems.append(Finding(f"{spec.name}.{field}", f"found {kind} at {path}; accepted is {accepted[0]}"))
    return tuple(problems)


def kind_on_host(path: str) -> Kind:
    """What `path` leads to on this host, symlinks followed; whatever cannot be looked at is nothing."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError):
        return Kind.NOTHING
    if S_ISDIR(mode):
        return Kind.DIRECTORY
    if not S_ISREG(mode):
        return Kind.OTHER
    return Kind.PROGRAM if mode & 0o111 else Kind.FILE


def _named_paths(spec: WorkloadSpec) -> tuple[tuple[str, str | None, tuple[Kind, ...]], ...]:
    return (
        ("rootfsPath", spec.rootfs_path, (Kind.FILE, Kind.PROGRAM)),
        ("path", spec.path, (Kind.DIRECTORY,)),
        ("python", spec.python, (Kind.PROGRAM,)),
    )


def _rows(entries: Iterable[Entry]) -> list[str]:
    """A small table for people: one line per workload, columns as wide as they need to be."""
    rows = [("NAME", "GUEST", "VCPUS", "MEM MIB", "CONCURRENCY", "QUEUE", "POOL", "TIMEOUT", "CALLERS")]
    rows += [_row(entry) for entry in entries]
    if len(rows) == 1:
        return []
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _row(entry: Entry) -> tuple[str, str, str, str, str, str, str, str, str]:
    spec = entry.workload.spec
    return (
        spec.name,
        "process" if spec.command else f"microvm ({spec.guest})",
        str(spec.vcpus),
        str(spec.memory_mib),
        str(spec.concurrency),
        str(spec.queue),
        str(spec.pool),
        format_duration(entry.request_timeout_s),
        "all" if entry.callers is None else str(len(entry.callers)),
    )
