"""The processes that are measured: on which cores they run, what they use, and that they end."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

STARTED_WITHIN_S = 60.0
_LOOK_EVERY_S = 0.01


class DidNotStart(Exception):
    """A server did not come up; the message has what it said."""


class Process:
    """A program that runs; its figures are the kernel's."""

    def __init__(self, child: subprocess.Popen[bytes], log: Path) -> None:
        self.child = child
        self.log = log

    @property
    def cpu_s(self) -> float:
        """Processor time of all its threads so far, in seconds; of its children none."""
        tasks = Path(f"/proc/{self.child.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    @property
    def resident_kib(self) -> int:
        return self._status("VmRSS")

    @property
    def peak_kib(self) -> int:
        """The most that was resident since `forget_peak`."""
        return self._status("VmHWM")

    def forget_peak(self) -> None:
        Path(f"/proc/{self.child.pid}/clear_refs").write_text("5")

    def ask(self, line: str) -> str:
        """Write a line to its standard input; the line it answers with."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(f"{line}\n".encode())
        self.child.stdin.flush()
        return self.child.stdout.readline().decode().strip()

    def until(self, what: str, found) -> None:
        """Wait until `found` says something. Raises `DidNotStart`."""
        ends_s = time.monotonic() + STARTED_WITHIN_S
        while not found():
            if self.child.poll() is not None or time.monotonic() > ends_s:
                said = self.log.read_text(errors="replace")[-2000:]
                raise DidNotStart(f"{what}: {self.child.args!r} said: {said}")
            time.sleep(_LOOK_EVERY_S)

    def _status(self, field: str) -> int:
        for line in Path(f"/proc/{self.child.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1])
        raise KeyError(field)


@contextmanager
def running(
    argv: Sequence[str | Path], *, core: int | None, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Process]:
    """Run a program, on one core if it is told which, for the length of the block; afterwards it is gone."""
    pinned = [*(("taskset", "-c", str(core)) if core is not None else ()), *map(str, argv)]
    with log.open("wb") as said:
        child = _started(pinned, said, environment)
        try:
            yield Process(child, log)
        finally:
            child.terminate()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            for pipe in (child.stdin, child.stdout):
                assert pipe is not None
                pipe.close()


def _started(argv: list[str], said: IO[bytes], environment: Mapping[str, str] | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=said,
        env=None if environment is None else {"PATH": os.environ["PATH"], **environment},
    )
