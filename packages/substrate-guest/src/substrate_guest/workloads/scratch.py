"""Directories for a while, whatever their tenant builds in them."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A new directory for the length of the block."""
    scratch = Path(tempfile.mkdtemp(prefix="snippet-"))
    try:
        yield scratch
    finally:
        remove(scratch)


def remove(top: Path) -> None:
    """Remove the directory `top` and what is in it; what refuses to go stays, because the guest goes with it.

    A snippet can nest directories deeper than `shutil.rmtree` can recurse and than a path can name, so every inner one
    is moved up to `top` before it is looked into.
    """
    moved = count()
    unique = os.urandom(8).hex()
    pending = [top]
    while pending:
        directory = pending.pop()
        with suppress(OSError):
            for path in list(directory.iterdir()):
                with suppress(OSError):
                    if path.is_symlink() or not path.is_dir():
                        path.unlink()
                    else:
                        path.chmod(0o700)
                        pending.append(path.rename(top / f"{unique}-{next(moved)}"))
        if directory != top:
            with suppress(OSError):
                directory.rmdir()
    with suppress(OSError):
        top.rmdir()
