"""The real daemons as processes of this machine: in one process (`single`), or agent and node (`split`)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import uuid4

import httpx

STARTED_WITHIN_S = 30.0

Table = dict[str, dict[str, object]]

_SERVE = ["python", "-m", "substrate_guest", "serve"]


def workload(module: str, **fields: object) -> dict[str, object]:
    """An entry of a table that serves `module:attribute`, small and without parked guests unless told otherwise."""
    return {"command": [*_SERVE, module], "memMib": 64, "requestTimeout": "10s", **fields}


@dataclass
class Process:
    """One daemon: what it logged, all of it and since `forget`, and the addresses it said it listens on."""

    name: str
    child: asyncio.subprocess.Process
    logged: list[dict[str, object]] = field(default_factory=list)
    events: list[dict[str, object]] = field(default_factory=list)
    other_lines: list[str] = field(default_factory=list)
    started: bool = False
    url: str = ""
    admin_url: str = ""

    def take(self, line: bytes) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            self.other_lines.append(line.decode("utf-8", "replace"))
            return
        self.logged.append(event)
        self.events.append(event)
        if event["event"] == "daemon.started":
            self.url, self.admin_url = f"http://{event['listen']}", f"http://{event['admin']}"
            self.started = True

    def seen(self, name: str) -> list[dict[str, object]]:
        """The events of that name so far."""
        return [event for event in self.events if event["event"] == name]

    def forget(self) -> None:
        """Begin a new story; only `logged` knows of what was before."""
        self.events.clear()

    def is_idle(self) -> bool:
        """Whether, by what it logged, every call has ended and every slot is free again."""
        counts = Counter(event["event"] for event in self.logged)
        pairs = (("invocation.accepted", "invocation.ended"), ("slot.taken", "slot.freed"))
        return all(counts[begun] == counts[ended] for begun, ended in pairs)

    def signal(self, sig: int) -> None:
        self.child.send_signal(sig)

    async def ended(self, *, within_s: float = 30.0) -> int:
        """Wait for its end; the exit status."""
        async with asyncio.timeout(within_s):
            return await self.child.wait()


@dataclass
class System:
    """A running system: `front` takes calls, `node` runs guests. They are one process, or two."""

    front: Process
    node: Process
    state_root: Path
    journal_path: Path
    mark: str
    client: httpx.AsyncClient
    entries_before: int = 0

    @property
    def processes(self) -> list[Process]:
        return [self.front] if self.front is self.node else [self.front, self.node]

    async def invoke(self, name: str, *, body: bytes = b"", session: str = "", **options: object) -> httpx.Response:
        """One call, its reply read whole."""
        path = f"/invoke/{name}" + (f"/{session}" if session else "")
        return await self.client.post(self.front.url + path, content=body, **options)  # type: ignore[arg-type]

    def journal(self) -> list[tuple[str, int]]:
        """Who acted: invocation id and attempt, in order."""
        lines = self.journal_path.read_text().splitlines() if self.journal_path.exists() else []
        return [(line.split()[0], int(line.split()[1])) for line in lines[self.entries_before :]]

    def guests(self) -> list[int]:
        """The processes of this machine that belong to guests of this system."""
        return processes_marked(self.mark)

    async def acted(self) -> None:
        """Wait until some guest has acted."""
        await until(self.journal)

    async def at_rest(self, *, parked: int = 0) -> None:
        """Wait until no guest is left but `parked` ones: no process, no run directory; and no call, and no slot."""
        run = self.state_root / "run"
        await until(lambda: len(list(run.iterdir())) <= parked and (parked or not self.guests()))
        await until(lambda: all(process.is_idle() for process in self.processes))


async def until(condition: Callable[[], object], *, within_s: float = 10.0) -> None:
    """Wait until `condition` holds; what other processes do can only be looked at."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110  # see above
            await asyncio.sleep(0.01)


def processes_marked(mark: str) -> list[int]:
    """Processes with `mark` in their environment: guests inherit nothing else that we could know them by."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@asynccontextmanager
async def process(
    name: str, *arguments: str, env: dict[str, str], cwd: Path, script: Path | None = None
) -> AsyncIterator[Process]:
    """Run a daemon for the length of the block, by a script of its own or by its name; at the end it is killed."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *((str(script),) if script is not None else ("-m", name.replace("-", "_"))),
        *arguments,
        env={"PATH": os.environ["PATH"], "HOME": str(cwd), **env},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=cwd,
    )
    running = Process(name=name, child=child)
    async with asyncio.TaskGroup() as duties:
        duties.create_task(_read(running), name=f"read {name}")
        try:
            yield running
        finally:
            if child.returncode is None:
                child.kill()


async def _read(running: Process) -> None:
    assert running.child.stdout is not None
    async for line in running.child.stdout:
        running.take(line)
    await running.child.wait()


async def started(*running: Process) -> None:
    """Wait until all of them listen; whichever ends instead fails with what it said."""
    for each in running:
        await until(lambda each=each: each.started or each.child.returncode is not None, within_s=STARTED_WITHIN_S)
        assert each.started, f"{each.name} ended with {each.child.returncode}: {each.other_lines}"


@asynccontextmanager
async def system(
    kind: str, directory: Path, table: Table, *, daemon: Path | None = None, **settings: str
) -> AsyncIterator[System]:
    """Start a system of `kind` on free ports with a table; `settings` are variables without their prefix.

    `daemon` is a script that is run in place of `fc-invoke`.
    """
    mark = uuid4().hex
    for entry in (entry for entry in table.values() if "command" in entry):
        entry["env"] = {**dict(entry.get("env", {})), "MARK": mark}  # type: ignore[call-overload]
    journal_path, state_root = directory / "journal", directory / "state"
    (directory / "table.json").write_text(json.dumps(table))
    front_env = {"WORKLOADS_FILE": str(directory / "table.json")}
    node_env = {"STATE_ROOT": str(state_root), "AUDIT_JOURNAL": str(journal_path), "NODE": "node-1"}
    listening = {"LISTEN_ADDR": "127.0.0.1:0", "ADMIN_LISTEN_ADDR": "127.0.0.1:0", "LOG_LEVEL": "debug"}
    async with AsyncExitStack() as stack:
        if kind == "single":
            env = _prefixed("FC_INVOKE_", {**listening, **front_env, **node_env, **settings})
            front = node = await stack.enter_async_context(process("fc-invoke", env=env, cwd=directory, script=daemon))
            await started(front)
        else:
            front, node = await _split(stack, directory, listening, front_env, node_env, settings)
        client = await stack.enter_async_context(opened_client())
        yield System(front, node, state_root, journal_path, mark, client)


def opened_client() -> httpx.AsyncClient:
    """A client that waits as long as a test may have to on a busy machine."""
    return httpx.AsyncClient(timeout=60.0, trust_env=False)


@asynccontextmanager
async def lent(shared: System, *, parked: int) -> AsyncIterator[System]:
    """A running system for one test: with a client of its own, and told only of what happens within the block.

    It is given back as it was lent: at rest but for `parked` guests, and content.
    """
    for process in shared.processes:
        process.forget()
    async with opened_client() as client:
        mine = replace(shared, client=client, entries_before=shared.entries_before + len(shared.journal()))
        yield mine
        await mine.at_rest(parked=parked)
    for process in shared.processes:
        assert not process.other_lines, process.other_lines
        assert not process.seen("defect.found")
        assert not process.seen("cleanup.failed")


async def _split(
    stack: AsyncExitStack,
    directory: Path,
    listening: dict[str, str],
    front_env: dict[str, str],
    node_env: dict[str, str],
    settings: dict[str, str],
) -> tuple[Process, Process]:
    """A node-daemon, and a cluster-agent that knows it. Each setting goes to whoever has it."""
    of_node = {name: value for name, value in settings.items() if name in _NODE_SETTINGS or _is_of_both(name)}
    of_front = {name: value for name, value in settings.items() if name not in _NODE_SETTINGS or _is_of_both(name)}
    env = _prefixed("NODE_DAEMON_", {**listening, **node_env, **of_node})
    node = await stack.enter_async_context(process("node-daemon", env=env, cwd=directory))
    await started(node)
    env = _prefixed("CLUSTER_AGENT_", {**listening, **front_env, **of_front, "NODES": f"node-1={node.url}"})
    front = await stack.enter_async_context(process("cluster-agent", env=env, cwd=directory))
    await started(front)
    return front, node


_NODE_SETTINGS = {"STATE_ROOT", "MEMORY_MIB", "BOOT_READY_TIMEOUT", "AUDIT_JOURNAL", "NODE", "DRAIN_TIMEOUT"}
_OF_BOTH = {"DRAIN_TIMEOUT"}


def _is_of_both(name: str) -> bool:
    return name in _OF_BOTH or name.startswith("OTEL_")


def _prefixed(prefix: str, settings: dict[str, str]) -> dict[str, str]:
    return {name if name.startswith("OTEL_") else prefix + name: value for name, value in settings.items()}


def stop(running: Process) -> None:
    """Ask a daemon to stop, as an operator would."""
    running.signal(signal.SIGTERM)
