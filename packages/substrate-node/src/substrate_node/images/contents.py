"""The contents of files on their way from a layer to the file system: kept in blocks, holes left out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO

from substrate_node.images.ext4.records import BLOCK
from substrate_node.images.problems import EntryUnusable
from substrate_node.images.tar import CHUNK, Piece
from substrate_node.images.tree import Run

_FILE_BLOCKS_MAX = 2**32 - 2


class Contents:
    """A file that holds the blocks of many, each beginning with a block of its own. `file` is empty at first."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self._blocks = 0
        self._at = 0

    def keep(self, size: int, ranges: Iterable[tuple[int, int]], data: Iterable[Piece]) -> tuple[Run, ...]:
        """Keep a file of `size` bytes; `ranges` are its parts that are no holes, as (offset, length), ascending.

        Raises `EntryUnusable` for a file over ext4's bound, and `OSError`.
        """
        if size > _FILE_BLOCKS_MAX * BLOCK:
            raise EntryUnusable(f"it is {size} bytes long; ext4 holds files of {_FILE_BLOCKS_MAX * BLOCK}")
        runs = tuple(self._runs(ranges))
        following = iter(runs)
        run = next(following, None)
        for piece in data:
            while run is not None and piece.offset >= (run.logical + run.blocks) * BLOCK:
                run = next(following, None)
            assert run is not None  # the runs were made of the ranges that the pieces fill
            self._write(piece.data, (run.stored - run.logical) * BLOCK + piece.offset)
        return runs

    def keep_file(self, source: IO[bytes], size: int) -> tuple[Run, ...]:
        """Keep so many bytes of an open file. Raises `OSError`."""
        offsets = range(0, size, CHUNK)
        pieces = (Piece(offset, source.read(min(CHUNK, size - offset))) for offset in offsets)
        return self.keep(size, [(0, size)] if size else [], pieces)

    def seal(self) -> None:
        """Fill up the last block: from now on the file is read only."""
        self.file.write(bytes(self._blocks * BLOCK - self._at))
        self.file.flush()

    def _runs(self, ranges: Iterable[tuple[int, int]]) -> Iterable[Run]:
        """The blocks that the ranges touch, those that touch each other in one run."""
        first = end = 0
        for offset, length in ranges:
            if end and offset // BLOCK > end:
                yield self._run(first, end)
                end = 0
            if not end:
                first = offset // BLOCK
            end = -(-(offset + length) // BLOCK)
        if end:
            yield self._run(first, end)

    def _run(self, first: int, end: int) -> Run:
        run = Run(first, end - first, self._blocks)
        self._blocks += run.blocks
        return run

    def _write(self, data: bytes, at: int) -> None:
        ahead = at - self._at
        if 0 < ahead < BLOCK:  # cheaper than to seek, which would empty the buffer
            self.file.write(bytes(ahead))
        elif ahead:
            self.file.seek(at)
        self.file.write(data)
        self._at = at + len(data)
