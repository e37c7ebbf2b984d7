"""A Python interpreter, and which directories a guest must see to run it."""

from __future__ import annotations

import asyncio
import subprocess

import msgspec
from msgspec import Struct

from substrate_node.processes.family import exit_in_words
from substrate_node.vmm import VmmError

_ANSWER_WITHIN_S = 20.0
_QUESTION = """
import json, os, sys
prefixes = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix]
executables = [sys.executable, getattr(sys, "_base_executable", sys.executable)]
places = [os.path.abspath(place) for place in [*prefixes, *sys.path, *executables] if place]
print(json.dumps(list(dict.fromkeys(place for place in places if place != "/" and os.path.exists(place)))))
"""


class Interpreter(Struct, frozen=True):
    """An interpreter by its path, and the files and directories that it loads from: prefixes and import paths."""

    executable: str
    places: tuple[str, ...]


class Interpreters:
    """What each interpreter needs, asked of it once."""

    def __init__(self) -> None:
        self._known: dict[str, Interpreter] = {}

    async def get(self, executable: str) -> Interpreter:
        """Ask the interpreter, if it was never asked before. Raises `VmmError` if it does not answer."""
        if executable not in self._known:
            loop = asyncio.get_running_loop()  # a thread, but never on the way of a second guest
            self._known[executable] = await loop.run_in_executor(None, _asked, executable)
        return self._known[executable]


def _asked(executable: str) -> Interpreter:
    try:
        answer = subprocess.run(
            [executable, "-I", "-c", _QUESTION], env={}, capture_output=True, check=True, timeout=_ANSWER_WITHIN_S
        )
        places = msgspec.json.decode(answer.stdout, type=tuple[str, ...])
    except (OSError, subprocess.SubprocessError, msgspec.MsgspecError) as error:
        raise VmmError(f"boot: the interpreter {executable} does not run: {_words(error)}") from error
    return Interpreter(executable, places)


def _words(error: Exception) -> str:
    """What went wrong, without our question: whoever reads this did not ask it."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"it said nothing for {error.timeout:.0f} s"
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    last_line = error.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    ended = f"it ended with {exit_in_words(error.returncode)}"
    return f"{ended}, after saying: {last_line}" if last_line else ended
