"""A command that is somebody else's program: what is run, where and as whom, and how it ended."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator, Iterable, Mapping


@dataclass(frozen=True, slots=True)
class Account:
    """Whom a command runs as."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    home: str = "/"


@dataclass(frozen=True, slots=True)
class Command:
    """What to run; its environment is ours at the time, so that it sees the certificates of the latest restore."""

    argv: tuple[str, ...]
    directory: str | None = None
    account: Account | None = None
    """None: whoever we are."""

    def check(self) -> None:
        """See that there is such a program. Raises `FileNotFoundError`."""
        name = self.argv[0]
        candidates = [name] if "/" in name else [f"{place}/{name}" for place in os.get_exec_path()]
        start = self.directory or "."
        if not any(os.access(os.path.join(start, one), os.X_OK) for one in candidates):  # noqa: PTH118  # see `_trust`
            raise FileNotFoundError(f"there is no program {name!r}; PATH is {os.environ.get('PATH')!r}")

    @asynccontextmanager
    async def running(
        self,
        *,
        environ: Mapping[str, str] | None = None,
        descriptors: Iterable[int] = (),
        stdin: int = asyncio.subprocess.DEVNULL,
        output: int | IO[bytes] | None = None,
    ) -> AsyncIterator[Process]:
        """Run it for the length of the block; nothing of its process group is left afterwards. Raises `OSError`."""
        account = self.account
        process = await asyncio.create_subprocess_exec(
            *self.argv,
            stdin=stdin,
            stdout=output,
            stderr=output,
            cwd=self.directory,
            env={**os.environ, **(environ or {})},
            pass_fds=tuple(descriptors),
            start_new_session=True,
            user=None if account is None else account.uid,
            group=None if account is None else account.gid,
            extra_groups=None if account is None else account.groups,
        )
        try:
            yield process
        finally:
            end_group(process.pid)
            process._transport.close()  # type: ignore[attr-defined]  # noqa: SLF001  # nothing else lets go of unread pipes
            await process.wait()


def end_group(pid: int) -> None:
    """End what a command started and left in its process group, and the command."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


async def ended(process: Process) -> None:
    """Return when the command itself has ended, even if something it started still holds its output open."""
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:  # it ended and was reaped
        return
    loop.add_reader(descriptor, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def words(status: int) -> str:
    """How a command ended, from its return code as `subprocess` spells it."""
    if status >= 0:
        return f"exit status {status}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-status).name}"
    return f"killed by signal {-status}"
