"""A newcomer who does what the README says gets what it says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from real_parts import needs

ROOT = Path(__file__).parents[2]
CHAPTERS = ("The first call", "The first hour", "Your own workloads")

pytestmark = needs("root", "user-namespaces", "pidfd", "curl")


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What each command of the chapters printed, in order, in something that looks like a fresh clone."""
    home = tmp_path_factory.mktemp("home")
    for directory in (home.parent, home):
        directory.chmod(0o755)
    shutil.copytree(ROOT / "examples", home / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(home),
        "FC_INVOKE_STATE_ROOT": str(home / "state"),
    }
    newcomer = [sys.executable, Path(__file__).with_name("newcomer.py"), ROOT / "README.md", *CHAPTERS]
    done = subprocess.run(
        ["unshare", "--net", *newcomer], cwd=home, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def test_every_command_of_the_readme_does_what_it_says(printed):
    """In order: call, receipt, explanation, top, a workload of one's own, its test, its measure, a table."""
    assert [command for command in printed if command["status"] != 0] == []
    call, receipt, explained, top, mine, changed, tested, measured, checked, greeted = printed
    assert json.loads(call["out"])["stdout"] == "42\n"
    assert '"42' in receipt["out"]
    assert "guest.claimed" in receipt["err"]
    assert "fc-ran: maybe" in explained["out"] or "ran=maybe" in explained["out"]
    assert "exit status 143" in explained["out"]
    assert "guest-failed" in top["out"]
    assert json.loads(mine["out"]) == {"greeting": "Hello, ada!"}
    assert json.loads(changed["out"]) == {"greeting": "Welcome, ada!"}
    assert "1 passed" in tested["out"]
    assert measured["out"].startswith("p50 ")
    assert "greet" in checked["out"]
    assert json.loads(greeted["out"]) == {"greeting": "Hello, ada!"}
