"""The examples, and what the README shows of them, run as they are shown."""

import asyncio
import re
import sys
from pathlib import Path

import pytest
import pytest_asyncio
import yaml

from e2e.system import System, lent, system, until
from real_parts import needs

ROOT = Path(__file__).parents[2]
TABLE = yaml.safe_load((ROOT / "examples" / "workloads.yaml").read_text())
WARM = sum(entry.get("warmBase", False) for entry in TABLE.values())

SHARED = pytest.mark.asyncio(loop_scope="module")

pytestmark = needs("user-namespaces", "pidfd")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(kind, tmp_path_factory):
    """A system with the example table, its paths made absolute because it is copied."""
    table = {name: dict(entry) for name, entry in TABLE.items()}
    for entry in table.values():
        if "path" in entry:
            entry["path"] = str(ROOT / "examples" / entry["path"])
    async with system(kind, tmp_path_factory.mktemp(kind), table) as started:
        await until(lambda: len(started.node.seen("base.built")) == WARM, within_s=120.0)
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def running(shared):
    """That system for one test; what a workload starts warm from stays."""
    async with lent(shared, parked=1 + WARM) as mine:
        yield mine


@SHARED
async def test_the_example_greets(running: System):
    """A session reaches the workload, and its answer comes back as JSON."""
    reply = await running.invoke("greet", session="ada")
    assert reply.json() == {"greeting": "Hello, ada!"}


@SHARED
async def test_the_example_table_runs_python(running: System):
    """The real input of this system, through either wiring."""
    reply = await running.invoke("python", body=b'{"code": "print(6*7)"}')
    assert reply.json()["stdout"] == "42\n"


@SHARED
async def test_an_agents_tool_tells_what_ran_and_what_did_not(running: System):
    """Success, failing code, late code, a refusal by the guest and one by the front, and a guest that dies."""
    tool = await asyncio.create_subprocess_exec(
        sys.executable, ROOT / "examples/agent_tool/tool.py", running.front.url, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await tool.communicate()
    shown = dict(re.split(r": +", line, maxsplit=1) for line in output.decode().splitlines())
    assert tool.returncode == 0
    assert shown["it ran"] == "counted {'out.txt': b'6'}"
    assert shown["it failed"] == "exit code 1, ZeroDivisionError: division by zero"
    assert "1" in shown["it was late"]
    assert shown["not accepted"].startswith("nothing ran: ")
    assert shown["too large"] == "nothing ran: the body is over 8388608 bytes"
    assert shown["it died"].startswith("it may have run: ")


@SHARED
async def test_a_scanner_is_primed_once_and_its_calls_start_warm(running: System):
    """The receipt tells what that saves: the whole time of the prime."""
    text = (ROOT / "examples/scanner/settings.txt").read_bytes()
    warm = await running.invoke("scan", body=text, headers={"fc-require-start": "warm"})
    cold = await running.invoke("scan-cold", body=text)
    for reply in (warm, cold):
        [found] = reply.json()["found"]
        assert (found["line"], found["begins"]) == (4, "xQ7v")
    assert (warm.headers["fc-start"], cold.headers["fc-start"]) == ("warm", "cold")
    ready_ms = [float(re.findall(r"ready;dur=([\d.]+)", reply.headers["server-timing"])[0]) for reply in (warm, cold)]
    assert ready_ms[0] * 2 < ready_ms[1]


@SHARED
async def test_each_tick_is_seen_before_the_next_is_made(running: System):
    """The guest sleeps between them, so what came together was not held back."""
    async with running.client.stream("POST", running.front.url + "/invoke/ticker/3") as reply:
        pieces = [piece async for piece in reply.aiter_bytes()]
    assert pieces == [b"tick 0\n", b"tick 1\n", b"tick 2\n"]


@SHARED
async def test_an_unmodified_asgi_application_is_served_with_its_lifespan(running: System):
    url = running.front.url + "/http/shop/items/"
    assert (await running.client.get(url + "tea?count=2")).json() == {"item": "tea", "price": 6}
    missing = await running.client.get(url + "bread")
    assert (missing.status_code, missing.json()) == (404, {"error": "no bread"})


@pytest.mark.parametrize("readme", sorted((ROOT / "examples").glob("**/README.md")), ids=lambda path: path.parent.name)
def test_the_commands_of_an_example_name_what_there_is(readme):
    """Files, workloads of the table, and targets."""
    commands = "\n".join(re.findall(r"```sh\n(.*?)```", readme.read_text(), re.DOTALL))
    files = [word.lstrip("@") for word in re.findall(r"@?examples/[\w/.]+", commands)]
    assert [file for file in files if not (ROOT / file).exists()] == []
    for name in re.findall(r"(?:/invoke/|fc-invoke invoke )(\w[\w-]*)", commands):
        assert name in TABLE or name == readme.parent.name or (readme.parent / f"{name}.py").exists()
    for module in re.findall(r"fc-invoke dev (\w+):app", commands):
        assert (readme.parent / f"{module}.py").exists()


def test_the_readme_shows_the_example_as_it_is():
    """What a newcomer copies is what is tested."""
    readme = (ROOT / "README.md").read_text()
    assert (ROOT / "examples" / "greeter" / "greeter.py").read_text() in readme
    assert "FC_INVOKE_WORKLOADS_FILE=examples/workloads.yaml" in readme
    assert "CLUSTER_AGENT_WORKLOADS_FILE=examples/workloads.yaml" in readme
