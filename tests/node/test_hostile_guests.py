"""What a guest does to harm the host, its daemon or other guests comes to nothing, and nothing of it is left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from tempfile import TemporaryDirectory

import pytest

from node.hostile import ATTACKS, Attack, attacked
from node.test_procvm import SYSTEM_PYTHON, TESTS
from real_parts import needs

each_attack = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)

pytestmark = needs("user-namespaces", "pidfd")


@pytest.mark.parametrize("cloned", [False, True], ids=["booted", "cloned"])
@each_attack
async def test_it_comes_to_nothing(attack: Attack, cloned: bool, tmp_path: Path):
    """Of a guest of whoever runs the tests, which is root where it counts."""
    await attacked(attack, tmp_path / "run", cloned=cloned)


@pytest.fixture(scope="module")
def nobody():
    """A process of an ordinary user that makes attacks: told their names, it says what has come of them."""
    with TemporaryDirectory() as home:  # not below pytest's, which is root's alone
        command = [sys.executable, "-m", "node.hostile", home, SYSTEM_PYTHON]
        with subprocess.Popen(command, cwd=TESTS, stdin=PIPE, stdout=PIPE, text=True) as process:
            yield process


@needs("root", "system-python")
@each_attack
def test_it_comes_to_nothing_in_a_guest_of_an_ordinary_user(attack: Attack, nobody: subprocess.Popen[str]):
    """Without any privilege of the host's to isolate it."""
    print(attack.__name__, file=nobody.stdin, flush=True)
    assert (came_to := nobody.stdout.readline()), "it harmed the process that is its daemon"
    assert json.loads(came_to) == ""
