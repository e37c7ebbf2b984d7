"""Runs a piece of Python beside some files, in an interpreter of its own, and answers with what came of it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from binascii import b2a_base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from substrate_guest.app import App, Request, Response
from substrate_guest.identity import CA_VARIABLES
from substrate_guest.problems import BadInput
from substrate_guest.workloads.results import Results
from substrate_guest.workloads.scratch import scratch_directory
from substrate_guest.workloads.snippet import Snippet, parse_snippet

STDOUT_BYTES_MAX = 512 * 1024
STDERR_BYTES_MAX = 128 * 1024
READ_BYTES = 64 * 1024
PIPE_BYTES_MAX = 1024 * 1024


class PythonWorkload:
    """The handler, and the process groups that must not outlive it."""

    def __init__(self) -> None:
        self._groups: set[int] = set()

    async def run(self, request: Request) -> dict[str, Any] | Response:
        """Run the snippet in `request`: 200 with what came of it, or 400 with every problem of the input."""
        try:
            snippet = parse_snippet(request.body)
        except BadInput as error:
            return Response(error.as_json(), status=400)
        with scratch_directory() as scratch:
            layout = laid_out(scratch, snippet)
            started_s = time.monotonic()
            with self._spawned(layout) as process:
                ended = await ending(process, timeout_s=snippet.timeout_s)
            duration_ms = round((time.monotonic() - started_s) * 1000)
            results = Results()
            results.collect(layout.work, snippet.files)
        return {
            "stdout": ended.stdout.text,
            "stderr": ended.stderr.text,
            "exit_code": ended.exit_code,
            "files": [
                {"path": path, "content_b64": b2a_base64(content, newline=False).decode()}
                for path, content in results.files.items()
            ],
            "duration_ms": duration_ms,
            "truncated": ended.stdout.truncated or ended.stderr.truncated or results.truncated,
            "error": ended.error,
        }

    @contextmanager
    def _spawned(self, layout: Layout) -> Iterator[subprocess.Popen[bytes]]:
        """An interpreter that runs the snippet; leaving the block kills its process group."""
        signal.signal(signal.SIGTERM, self._end)  # a group of its own is not killed with us
        process = subprocess.Popen(
            [sys.executable, "-s", "-P", str(layout.source)],
            cwd=layout.work,
            env=environment(layout, os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._groups.add(process.pid)
        try:
            with process:
                try:
                    yield process
                finally:
                    if process.returncode is None:  # once it is reaped, its number may be another's
                        kill_group(process.pid)
        finally:
            self._groups.discard(process.pid)

    def _end(self, *_: object) -> None:
        for group in self._groups:
            kill_group(group)
        os._exit(128 + signal.SIGTERM)


app = App(PythonWorkload().run)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a snippet finds itself: its source, the directory it works in, and where else it may write."""

    source: Path
    work: Path
    home: Path
    temporary: Path


def laid_out(scratch: Path, snippet: Snippet) -> Layout:
    """Write the files of `snippet` below `scratch`."""
    layout = Layout(scratch / "snippet.py", scratch / "work", scratch / "home", scratch / "tmp")
    for directory in (layout.work, layout.home, layout.temporary):
        directory.mkdir()
    layout.source.write_bytes(snippet.code.encode())
    for path, content in snippet.files.items():
        (layout.work / path).parent.mkdir(parents=True, exist_ok=True)
        (layout.work / path).write_bytes(content)
    return layout


def environment(layout: Layout, ours: Mapping[str, str]) -> dict[str, str]:
    """What a snippet finds in its environment: nothing of `ours` but the search path and whom to trust."""
    trusted = {name: ours[name] for name in CA_VARIABLES if name in ours}
    return trusted | {
        "PATH": ours.get("PATH", os.defpath),
        "HOME": str(layout.home),
        "TMPDIR": str(layout.temporary),
        "LANG": "C.UTF-8",
        "PYTHONUTF8": "1",
        "PYTHONPATH": str(layout.work),  # the files it came with can be imported
        "PYTHONDONTWRITEBYTECODE": "1",  # else caches would be among the results
        "PYTHONUNBUFFERED": "1",  # what was printed before a timeout is not lost
    }


class Output:
    """What a process wrote to one of its pipes: the first `bytes_max` of it, though all of it is read."""

    def __init__(self, bytes_max: int) -> None:
        self._kept = bytearray()
        self._bytes_max = bytes_max
        self.truncated = False

    @property
    def text(self) -> str:
        """What was kept; bytes that are not UTF-8 are replaced."""
        return self._kept.decode(errors="replace")

    def take(self, piece: bytes) -> None:
        """Keep of `piece` what fits."""
        room_bytes = self._bytes_max - len(self._kept)
        self._kept += piece[:room_bytes]
        self.truncated = self.truncated or len(piece) > room_bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """How a snippet ended; `exit_code` is `None` after a timeout and minus the signal's number after a signal."""

    exit_code: int | None
    error: str | None
    stdout: Output
    stderr: Output


async def ending(process: subprocess.Popen[bytes], *, timeout_s: float) -> Ended:
    """Read what `process` writes until it ends, or has run `timeout_s` seconds and is killed."""
    assert process.stdout is not None
    assert process.stderr is not None
    stdout, stderr = Output(STDOUT_BYTES_MAX), Output(STDERR_BYTES_MAX)
    with reading(process.stdout.fileno(), stdout), reading(process.stderr.fileno(), stderr):
        in_time = await exited(process.pid, within_s=timeout_s)
        kill_group(process.pid)
        exit_code = process.wait()
    if not in_time:
        return Ended(None, f"the snippet was killed after {timeout_s:g} s (timeout_seconds)", stdout, stderr)
    error = f"the snippet was ended by signal {-exit_code}: {signal.strsignal(-exit_code)}" if exit_code < 0 else None
    return Ended(exit_code, error, stdout, stderr)


async def exited(pid: int, *, within_s: float) -> bool:
    """Whether child `pid` ended within `within_s` seconds; returns as soon as that is known."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    descriptor = os.pidfd_open(pid)  # unlike asyncio's own watcher it needs no thread
    loop.add_reader(descriptor, ended.set)
    try:
        async with asyncio.timeout(within_s):
            await ended.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    return True


@contextmanager
def reading(pipe: int, output: Output) -> Iterator[None]:
    """Let the loop move what arrives in `pipe` to `output`; leaving the block takes what is still in it."""
    loop = asyncio.get_running_loop()
    os.set_blocking(pipe, False)

    def read() -> int:
        with suppress(BlockingIOError):
            if piece := os.read(pipe, READ_BYTES):
                output.take(piece)
                return len(piece)
        return 0

    def on_readable() -> None:
        if not read():
            loop.remove_reader(pipe)  # the end; a reader would be called for it again and again

    loop.add_reader(pipe, on_readable)
    try:
        yield
    finally:
        loop.remove_reader(pipe)
        left_bytes = PIPE_BYTES_MAX  # a process that escaped its group may go on writing for ever
        while left_bytes > 0 and (size_bytes := read()):
            left_bytes -= size_bytes


def kill_group(group: int) -> None:
    """Kill every process of `group`; nothing happens when there is none."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
