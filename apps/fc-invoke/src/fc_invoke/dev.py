"""`fc-invoke dev`: one workload served from a developer's own files, as they are at each call."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

from msgspec import Struct

from fc_invoke.files import Sight, seen
from fc_invoke.screen import Screen
from fc_invoke.serving import MISTAKES
from fc_invoke.settings import Settings, read_settings
from fc_invoke.target import mistakes
from fc_invoke.wiring import assembled, both_planes
from substrate_node.host import clear_abandoned
from substrate_node.node import LocalNode
from substrate_seam.events import Emit, WarningRaised
from substrate_seam.workload import Workload
from substrate_service.address import Address, ListenFailed, TcpAddress, bound
from substrate_service.daemon import Assembled, run_from_environment
from substrate_service.exchange import App, Message, Scope
from substrate_service.observing import Observed, Observing, observed, told_to
from substrate_service.signals import Stopping
from substrate_service.sinks import all_to

HOST = "127.0.0.1"
PORT_MAX = 65535
OPEN_TO_OTHERS = 0o005
PAUSE_S, SHARE = 0.3, 20
RESTLESS, DOUBLINGS_MAX = 4, 7
"""Files are looked at so often, and for at most one part in so many of the time. A file that is another
at so many looks in a row is told, and each such look doubles the pause, so many times at most."""
_CALLS = ("/invoke/", "/http/")
_STATE_PREFIX = "fc-invoke-dev-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Work(Struct, frozen=True, kw_only=True):
    """What a developer wants served: `target` is `module:attribute` below `path`; ports of 0 are any that are free.

    With `lifeline` standard input is a pipe, and its end is a wish to stop: whoever holds the other end may be killed.
    """

    target: str
    path: Path
    name: str
    port: int
    admin_port: int
    memory_mib: int
    timeout: str
    env: tuple[str, ...]
    as_json: bool = False
    lifeline: bool = False


def dev(work: Work, environment: Mapping[str, str]) -> int:
    """Serve until asked to stop; the exit status. What can't be served is told at once, all of it, with status 2."""
    wrong = list(_mistakes(work, environment))
    if wrong:
        for line in wrong:
            print(f"fc-invoke dev: {line}", file=sys.stderr)
        return 2
    screen = Screen(work.target)
    observing: Observing = observed if work.as_json else lambda tracing, _: told_to(all_to(screen), tracing)
    # Not the place of a daemon: one may run on this machine, and other developers' too.
    # Who starts at the same moment may already clear it away.
    with tempfile.TemporaryDirectory(prefix=_STATE_PREFIX, ignore_cleanup_errors=True) as state:
        return run_from_environment(
            "fc-invoke dev",
            version("fc-invoke"),
            _settings(work, environment, state),
            read=read_settings,
            assemble=partial(_developing, work, screen),
            mistakes=MISTAKES,
            observing=observing,
        )


def _mistakes(work: Work, environment: Mapping[str, str]) -> Iterator[str]:
    yield from mistakes(work.target, work.path)
    if os.geteuid() == 0 and work.path.is_dir() and work.path.stat().st_mode & OPEN_TO_OTHERS != OPEN_TO_OTHERS:
        yield f"--path: {work.path} is closed to others, and root's guests are others. Run `chmod o+rx {work.path}`"
    if not _NAME.fullmatch(work.name):
        yield f"--name: found {work.name!r}, accepted are letters, digits, '.', '_' and '-'"
    for given in work.env:
        if "=" not in given and given not in environment:
            yield f"--env: found {given!r}, accepted is NAME=VALUE, or the name of a variable that is set here"
    for option, port in (("--port", work.port), ("--admin-port", work.admin_port)):
        if not 0 <= port <= PORT_MAX:
            yield f"{option}: found {port}, accepted is a number up to {PORT_MAX}"
            continue
        try:
            with bound(TcpAddress(HOST, port), setting=option):
                pass
        except ListenFailed as error:
            yield str(error)


def _settings(work: Work, environment: Mapping[str, str], state: str) -> dict[str, str]:
    """The environment of a daemon that serves this and nothing else."""
    workload = {
        "command": ["python", "-m", "substrate_guest", "serve", work.target],
        "path": str(work.path),
        "memMib": work.memory_mib,
        "requestTimeout": work.timeout,
        "warmBase": True,
        "env": {
            name: value if given else environment[name]
            for name, given, value in (item.partition("=") for item in work.env)
        },
    }
    return {
        "FC_INVOKE_LISTEN_ADDR": f"{HOST}:{work.port}",
        "FC_INVOKE_ADMIN_LISTEN_ADDR": f"{HOST}:{work.admin_port}",
        "FC_INVOKE_STATE_ROOT": state,
        "FC_INVOKE_DRAIN_TIMEOUT": "2s",
        "FC_INVOKE_LOG_LEVEL": "debug",  # who reads JSON wants every step
        "FC_INVOKE_WORKLOADS": json.dumps({work.name: workload}),
    }


@asynccontextmanager
async def _developing(
    work: Work, screen: Screen, settings: Settings, observations: Observed, stopping: Stopping
) -> AsyncIterator[Assembled]:
    """The daemon for the length of the block, and somebody who looks at the files."""
    announce = partial(screen.welcome, work.name, work.path) if not work.as_json else _say_nothing
    await clear_abandoned(Path(tempfile.gettempdir()), _STATE_PREFIX, emit=observations.emit)
    async with both_planes(settings, observations, stopping) as both, asyncio.TaskGroup() as duties:
        [workload] = both.catalog.workloads()
        newest = Newest(both.host.node, workload, work.path, emit=observations.emit)
        watching = duties.create_task(newest.watch(), name="watch the files")
        try:
            public = newest.before(both.plane.public)
            with _lifeline(stopping, held=work.lifeline):
                yield assembled(settings, both, public=public, announce=announce, emit=observations.emit)
        finally:
            watching.cancel()


@contextmanager
def _lifeline(stopping: Stopping, *, held: bool) -> Generator[None]:
    """Ask to stop when standard input ends, if it is `held`: nobody writes to it."""
    loop = asyncio.get_running_loop()

    def ended() -> None:
        loop.remove_reader(sys.stdin)
        stopping.ask("end of standard input")

    if held:
        loop.add_reader(sys.stdin, ended)
    try:
        yield
    finally:
        if held:
            loop.remove_reader(sys.stdin)


def _say_nothing(_: list[Address]) -> None:
    pass


class Newest:
    """Sees to it that a workload is what its files say now.

    Files are looked at before every call, so that no call can be served by what was there before a save; and every now
    and then, so that a mistake is told when it is saved. That needs no library, no watches of the kernel's, which
    network and container file systems do not have, and has no moment in which a notice is still on its way.
    """

    def __init__(self, node: LocalNode, workload: Workload, path: Path, *, emit: Emit) -> None:
        self._node = node
        self._workload = workload
        self._path = str(path)
        self._emit = emit
        self._seen: Sight | None = None
        self._looking = asyncio.Lock()

    async def current(self) -> float:
        """Return when the node has what the files are now, warm if that can be; the seconds that looking took."""
        async with self._looking:
            began_s = time.monotonic()
            sight = await asyncio.to_thread(seen, self._path)
            took_s = time.monotonic() - began_s
            if sight != self._seen:
                await self._node.ensure(self._workload)
                self._seen = sight
        await self._node.warmed(self._workload.digest)
        return took_s

    async def watch(self) -> None:
        """Look at the files again and again, and less often while some file changes all the time."""
        restless: set[str] = set()
        looks, told = 0, False
        took_s = await self.current()
        while True:
            await asyncio.sleep(max(PAUSE_S, took_s * SHARE) * 2 ** min(looks, DOUBLINGS_MAX))
            before = self._seen or {}
            took_s = await self.current()
            changed = {path for path, what in (self._seen or {}).items() if before.get(path) != what}
            restless = restless & changed if looks else changed
            looks = looks + 1 if restless else 0
            if looks >= RESTLESS and not told:
                told = True
                self._emit(
                    WarningRaised(
                        message=f"{min(restless)} changes all the time, and each change costs a new priming",
                        hint="Write it outside of the directory that is served.",
                    )
                )

    def before(self, app: App) -> App:
        """`app`, where each call of a guest first waits until it would run what the files are now."""

        async def served(
            scope: Scope, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
        ) -> None:
            if scope["type"] == "http" and scope["path"].startswith(_CALLS):
                await self.current()
            await app(scope, receive, send)

        return served
