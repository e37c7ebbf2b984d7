"""The catalog: the workload table in force, and the digests that calls of earlier ones may still name."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from substrate_cluster.catalog.document import MOST_BYTES
from substrate_cluster.catalog.findings import Finding, TableInvalid, refused
from substrate_cluster.catalog.table import Entry, ParsedTable, parse_table
from substrate_seam.events import CatalogLoaded, CatalogRefused, Emit, WarningRaised
from substrate_seam.workload import Workload

MOST_REMEMBERED = 1_024
"""How many workloads of earlier tables `by_digest` still knows."""


class TableSource(Struct, frozen=True, kw_only=True):
    """Where a table comes from: `label` names it, `read` gets its bytes, relative paths are below `directory`."""

    label: str
    read: Callable[[], bytes]
    directory: str | None = None

    def parsed(self) -> ParsedTable:
        """Read and check the table; raises `TableInvalid`. Blocks, so an event loop does it in a thread."""
        return parse_table(self.read(), source=self.label, directory=self.directory)


def table_in_file(path: Path) -> TableSource:
    """A table in a file, read again at each reload; a file that cannot be read is an invalid table."""

    def read() -> bytes:
        try:
            with path.open("rb") as file:
                return file.read(MOST_BYTES + 1)
        except OSError as error:
            raise refused(str(path), f"it cannot be read: {error.strerror}") from error

    return TableSource(label=str(path), read=read, directory=str(path.absolute().parent))


def table_in_text(text: str, *, label: str) -> TableSource:
    """A table in a setting named `label`; it has no directory, so its paths are absolute."""
    raw = text.encode("utf-8", "surrogateescape")  # the environment holds bytes; the parser says which are wrong
    return TableSource(label=label, read=lambda: raw)


class Change(Struct, frozen=True):
    """What a new table means for nodes: workloads to make known, and digests nobody will call by any more."""

    added: tuple[Workload, ...]
    removed: tuple[str, ...]


class Catalog:
    """The workloads by name, as they are now."""

    def __init__(self, table: ParsedTable, *, source: TableSource, emit: Emit) -> None:
        self._source = source
        self._emit = emit
        self._listeners: list[Callable[[Change], None]] = []
        self._reloading = asyncio.Lock()
        self._warned: frozenset[Finding] = frozenset()
        self._remembered: OrderedDict[str, Workload] = OrderedDict()
        self._entries: dict[str, Entry] = {}
        self._by_digest: dict[str, Workload] = {}
        self.replace(table)

    @classmethod
    def load(cls, source: TableSource, *, emit: Emit) -> Catalog:
        """A catalog with the table of `source`; raises `TableInvalid`. For the start of a daemon: it blocks."""
        return cls(source.parsed(), source=source, emit=emit)

    def get(self, name: str, /) -> Entry | None:
        """The workload of that very name, or None."""
        return self._entries.get(name)

    def by_digest(self, digest: str, /) -> Workload | None:
        """The workload of that digest, of this table or of a recent one, or None."""
        return self._by_digest.get(digest) or self._remembered.get(digest)

    def workloads(self) -> tuple[Workload, ...]:
        """The workloads of the table in force, which every node should know."""
        return tuple(self._by_digest.values())

    def entries(self) -> tuple[Entry, ...]:
        """What the table in force says of each workload."""
        return tuple(self._entries.values())

    def on_change(self, listener: Callable[[Change], None]) -> None:
        """Have `listener` hear of each change of the table; like `Emit` it never raises and never waits."""
        self._listeners.append(listener)

    def replace(self, table: ParsedTable) -> Change:
        """Put a table in force for new calls; those that run keep the workload they named."""
        before = self._by_digest
        now = {entry.workload.digest: entry.workload for entry in table.entries.values()}
        change = Change(
            added=tuple(workload for digest, workload in now.items() if digest not in before),
            removed=tuple(digest for digest in before if digest not in now),
        )
        self._entries, self._by_digest = dict(table.entries), now
        self._remember([before[digest] for digest in change.removed])
        self._tell(table, change)
        return change

    async def reload(self) -> bool:
        """Read the source again; an invalid table is refused whole and the one before stays. Says which it was."""
        async with self._reloading:
            try:
                table = await asyncio.to_thread(self._source.parsed)
            except TableInvalid as error:
                self._emit(CatalogRefused(source=self._source.label, message=str(error)))
                return False
            self.replace(table)
            return True

    def _remember(self, gone: list[Workload]) -> None:
        """Keep what has gone for calls that still name it; the oldest are forgotten first."""
        for workload in gone:
            self._remembered[workload.digest] = workload
            self._remembered.move_to_end(workload.digest)
        while len(self._remembered) > MOST_REMEMBERED:
            self._remembered.popitem(last=False)

    def _tell(self, table: ParsedTable, change: Change) -> None:
        """Say what is in force; a warning is said once, not again at each reload."""
        self._emit(CatalogLoaded(source=self._source.label, workloads=len(table.entries)))
        for warning in table.warnings:
            if warning not in self._warned:
                self._emit(WarningRaised(message=f"{self._source.label}: {warning}"))
        self._warned = frozenset(table.warnings)
        if change.added or change.removed:
            for listener in self._listeners:
                listener(change)
