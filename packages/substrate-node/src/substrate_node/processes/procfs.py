"""Reading `/proc` often: a `Path` costs more than all the rest of it."""

from __future__ import annotations

import os

_PIECE_BYTES = 65_536


def read(path: str) -> bytes:
    """All that a small file says. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = []
        while piece := os.read(descriptor, _PIECE_BYTES):
            pieces.append(piece)
    finally:
        os.close(descriptor)
    return b"".join(pieces)
