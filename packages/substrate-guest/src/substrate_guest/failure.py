"""What went wrong: a short text for the caller, the whole traceback for the guest's console."""

import sys

TEXT_CHARS_MAX = 500


def describe(error: BaseException) -> str:
    """`error` in one short line that names the exception; those of a group joined with `; `."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(map(describe, error.exceptions))
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return text if len(text) <= TEXT_CHARS_MAX else text[: TEXT_CHARS_MAX - 1] + "…"


def log(error: BaseException) -> None:
    """Write the traceback of `error` to stderr, which is the guest's console."""
    import traceback

    traceback.print_exception(error, file=sys.stderr)
    sys.stderr.flush()
