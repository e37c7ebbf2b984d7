"""What went wrong: a short text for the caller, the author's part of the traceback for the guest's console."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from traceback import FrameSummary, TracebackException

TEXT_CHARS_MAX = 500
_OURS = __file__.rpartition("/")[0] + "/"
_WORKLOADS = _OURS + "workloads/"
_IMPORT = "<frozen importlib"
_WAYS_IN = ("asyncio", "concurrent", "importlib")
"""Packages of the standard library through which a workload is imported and called."""


def describe(error: BaseException) -> str:
    """`error` in one short line that names the exception; those of a group joined with `; `."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(map(describe, error.exceptions))
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return text if len(text) <= TEXT_CHARS_MAX else text[: TEXT_CHARS_MAX - 1] + "…"


def log(error: BaseException) -> None:
    """Write the traceback of `error` to stderr, which is the guest's console, from the author's first line on.

    How the workload was imported or called is left out; a failure that reached no line of its author is shown whole.
    """
    import traceback

    told = traceback.TracebackException.from_exception(error, compact=True)
    _begin_with_the_author(told)
    print(*told.format(), sep="", end="", file=sys.stderr, flush=True)  # noqa: T201  # the console is the guest's log


def _begin_with_the_author(told: TracebackException) -> None:
    importing = bool(told.stack) and told.stack[-1].filename.startswith(_IMPORT)
    frames = [frame for frame in told.stack if not frame.filename.startswith(_IMPORT)]
    first = next((place for place, frame in enumerate(frames) if not _is_way_in(frame)), None)
    if first is not None:
        told.stack[:] = frames[first:]
    elif importing:
        del told.stack[:]  # of a file that can't be read or understood there is no line to begin with
    for other in (told.__cause__, told.__context__, *(told.exceptions or ())):
        if other is not None:
            _begin_with_the_author(other)


def _is_way_in(frame: FrameSummary) -> bool:
    if frame.filename.startswith(_OURS):
        return not frame.filename.startswith(_WORKLOADS)
    import asyncio

    library = asyncio.__file__.removesuffix("asyncio/__init__.py")
    return frame.filename.startswith(tuple(f"{library}{package}/" for package in _WAYS_IN))
