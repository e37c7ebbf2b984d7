"""What the README shows runs as it is shown."""

from pathlib import Path

import pytest
import yaml

from e2e.system import System, system
from real_parts import needs

ROOT = Path(__file__).parents[2]
TABLE = yaml.safe_load((ROOT / "examples" / "workloads.yaml").read_text())

pytestmark = needs("user-namespaces", "pidfd")


@pytest.fixture
async def running(kind, tmp_path):
    """A system with the example table, its paths made absolute because it is copied."""
    table = {name: dict(entry) for name, entry in TABLE.items()}
    table["greet"]["path"] = str(ROOT / "examples" / table["greet"]["path"])
    async with system(kind, tmp_path, table) as started:
        yield started
        await started.at_rest(parked=1)


async def test_the_example_greets(running: System):
    """A session reaches the workload, and its answer comes back as JSON."""
    reply = await running.invoke("greet", session="ada")
    assert reply.json() == {"greeting": "Hello, ada!"}


async def test_the_example_table_runs_python(running: System):
    """The real input of this system, through either wiring."""
    reply = await running.invoke("python", body=b'{"code": "print(6*7)"}')
    assert reply.json()["stdout"] == "42\n"


def test_the_readme_shows_the_example_as_it_is():
    """What a newcomer copies is what is tested."""
    readme = (ROOT / "README.md").read_text()
    assert (ROOT / "examples" / "greeter" / "greeter.py").read_text() in readme
    assert "FC_INVOKE_WORKLOADS_FILE=examples/workloads.yaml" in readme
    assert "CLUSTER_AGENT_WORKLOADS_FILE=examples/workloads.yaml" in readme
