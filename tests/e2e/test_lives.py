"""How daemons end, and what of them is left: nothing."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

import pytest

from e2e.system import System, stop, system, until
from real_parts import SYSTEM_PYTHON, is_full, needs

pytestmark = needs("user-namespaces", "pidfd")


async def test_a_drain_lets_running_calls_finish_and_leaves_nothing(start, tmp_path):
    """SIGTERM in the middle of a call: unready, no new calls, the call ends well, exit status 0."""
    async with start() as running, asyncio.TaskGroup() as calls:
        call = calls.create_task(running.invoke("narrow?linger"))
        await running.acted()
        for process in running.processes:
            stop(process)
            assert await process.ended() == 0
        assert call.result().status_code == 200
        assert running.guests() == []
        assert list((running.state_root / "run").iterdir()) == []
        for process in running.processes:
            assert [event["clean"] for event in process.seen("daemon.stopped")] == [True]


async def test_a_second_signal_ends_it_now(start):
    """Whoever asks twice does not want to wait; still nothing is left."""
    async with start() as running, asyncio.TaskGroup() as calls:
        call = calls.create_task(refused_or_cut(running, "flows?sleep"))
        await running.acted()
        for process in running.processes:
            stop(process)
            await until(lambda process=process: process.seen("daemon.stopping"))  # or two signals may come as one
            stop(process)
            await process.ended(within_s=10)
        await call
        assert running.guests() == []


async def test_the_drain_deadline_ends_what_still_runs(start):
    """After the drain timeout a call is cut short, and told so."""
    async with start(DRAIN_TIMEOUT="300ms") as running, asyncio.TaskGroup() as calls:
        call = calls.create_task(refused_or_cut(running, "flows?sleep"))
        await running.acted()
        for process in running.processes:
            stop(process)
        for process in running.processes:
            await process.ended(within_s=15)
        assert call.result() in {"502", "cut"}
        assert running.guests() == []


async def refused_or_cut(running: System, what: str) -> str:
    try:
        return str((await running.invoke(what)).status_code)
    except Exception as error:  # noqa: BLE001  # whatever the client makes of a cut connection
        return "cut" if "disconnect" in str(error).lower() or "closed" in str(error).lower() else repr(error)


@pytest.mark.parametrize("seed", range(20 if is_full() else 3))
async def test_a_killed_daemon_leaves_nothing_that_its_successor_keeps(kind, tmp_path, table, seed):
    """SIGKILL at a seeded moment under load: guests die with it, and the next daemon removes the rest."""
    dice = Random(seed)
    del table["flows"], table["narrow"]
    async with system(kind, tmp_path, table) as running, asyncio.TaskGroup() as calls:
        for number in range(8):
            calls.create_task(refused_or_cut(running, ("echo", "python", "parked")[number % 3]))
        await asyncio.sleep(dice.random() * 0.4)
        running.node.signal(signal.SIGKILL)
        await running.node.ended()
        if running.front is not running.node:
            running.front.signal(signal.SIGKILL)
            await running.front.ended()
    await until(lambda: not running.guests())
    once = [invocation_id for invocation_id, _ in running.journal()]
    assert len(once) == len(set(once))
    async with system(kind, tmp_path, table) as following:
        assert (await following.invoke("echo", body=b"again")).content == b"again"
        await following.at_rest(parked=2)


async def test_a_reload_affects_new_calls_only(start, tmp_path):
    """SIGHUP: a running call keeps its workload, new ones see the new table, a bad table changes nothing."""
    async with start() as running:
        path = tmp_path / "table.json"
        table = json.loads(path.read_text())
        async with asyncio.TaskGroup() as calls:
            call = calls.create_task(running.invoke("narrow?linger"))
            await running.acted()
            del table["narrow"]
            path.write_text(json.dumps(table))
            loaded = len(running.front.seen("catalog.loaded"))
            running.front.signal(signal.SIGHUP)
            await until(lambda: len(running.front.seen("catalog.loaded")) > loaded)
            assert (await running.invoke("narrow")).status_code == 404
        assert call.result().status_code == 200
        path.write_text('{"echo": {"concurency": 1}}')
        running.front.signal(signal.SIGHUP)
        await until(lambda: running.front.seen("catalog.refused"))
        assert (await running.invoke("echo", body=b"x")).content == b"x"


async def test_the_audit_finds_no_lie(start, table):
    """The truth audit that users run: callers that misbehave, answers held against the guests' journal."""
    table["parked"]["warmBase"] = True
    async with start() as running:
        audit = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "fc_invoke",
            "audit",
            "parked",
            "--calls=60",
            "--at-once=8",
            f"--url={running.front.url}",
            f"--journal={running.node.admin_url}",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output, _ = await audit.communicate()
        assert audit.returncode == 0, output.decode()
        assert b"60 calls, 0 answers that were not the truth" in output


AS_AN_ORDINARY_USER = """
import asyncio, json, pathlib, sys
from e2e.system import system, workload

async def main():
    table = {"python": workload("substrate_guest.workloads.python:app")}
    async with system("single", pathlib.Path.home(), table) as running:
        reply = await running.invoke("python", body=json.dumps({"code": "print(6*7)"}).encode())
        print(reply.json()["stdout"])
        await running.at_rest()

asyncio.run(main())
"""


@pytest.fixture
def everybodys():
    """A directory that everybody may pass through; pytest closes its own to others whenever a run starts."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o711)
        yield Path(directory)


@needs("root", "system-python")
def test_an_ordinary_user_can_run_it(everybodys):
    """Everything works without being root: process guests need no privilege of the host's."""
    home = everybodys / "home"
    home.mkdir(mode=0o700)
    os.chown(home, 65534, 65534)
    python = environment_for_others(everybodys / "venv")
    done = subprocess.run(
        [python, "-c", AS_AN_ORDINARY_USER],
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
        cwd=home,
    )
    assert done.stdout.split() == ["42"], done.stderr


def environment_for_others(directory: Path) -> Path:
    """A virtual environment with all that this one has, over an interpreter that everybody may run."""
    subprocess.run([SYSTEM_PYTHON, "-m", "venv", "--without-pip", directory], check=True)
    packages = next(directory.glob("lib/python3*/site-packages"))
    (packages / "all.pth").write_text("\n".join(path for path in sys.path if Path(path).is_dir()))
    return directory / "bin" / "python"
