"""The import contracts hold, and each of them bites: a planted violation breaks exactly its contract."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
NAMES = {contract["id"]: contract["name"] for contract in CONTRACTS}

PLANTS = [
    ("planes", "substrate_cluster/auth.py", "import substrate_node.slots"),
    ("planes", "substrate_node/node.py", "import substrate_cluster.auth"),
    ("planes", "substrate_node/node.py", "import substrate_guest.failure"),
    ("planes", "substrate_cluster/auth.py", "import substrate_service.serving"),
    ("planes", "substrate_node/reaper.py", "import substrate_service.serving"),
    ("planes", "substrate_seam/executor.py", "import substrate_node"),
    ("planes", "cluster_agent/__init__.py", "import fc_invoke"),
    ("guest", "substrate_guest/shim.py", "import substrate_seam.errors"),
    ("agent", "cluster_agent/__init__.py", "import substrate_node.node"),
    ("agent", "cluster_agent/__init__.py", "import substrate_guest.shim"),
    ("daemon", "node_daemon/__init__.py", "import substrate_cluster.auth"),
    ("pure", "substrate_seam/durations.py", "import socket"),
    ("pure", "substrate_cluster/placement/policy.py", "import os"),
    ("pure", "substrate_node/slots.py", "from substrate_node import reaper"),
    ("simulated", "substrate_node/reaper.py", "from time import monotonic"),
]


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of all sources, side by side, with the contracts."""
    for package in [*ROOT.glob("packages/*/src/*"), *ROOT.glob("apps/*/src/*")]:
        shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def broken(tree: Path, *options: str) -> set[str]:
    """The ids of the contracts that a tree breaks."""
    program = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    linted = subprocess.run(
        [*program, "--no-cache", "--no-logo", *options],
        cwd=tree,
        env=os.environ | {"COLUMNS": "1000", "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    verdicts = dict(re.findall(r"^(.+) (KEPT|BROKEN)", linted.stdout, re.MULTILINE))
    assert verdicts.keys() <= set(NAMES.values()), linted.stdout
    assert verdicts, linted.stdout + linted.stderr
    return {key for key, name in NAMES.items() if verdicts.get(name) == "BROKEN"}


def test_the_sources_keep_every_contract(tree):
    assert broken(tree) == set()


@pytest.mark.parametrize(("contract", "file", "line"), PLANTS)
def test_a_planted_violation_breaks_exactly_its_contract(contract, file, line, tree):
    planted = tree / file
    planted.write_text(f"{planted.read_text()}\n{line}\n")
    assert broken(tree) == {contract}


def test_every_contract_has_been_shown_to_bite():
    assert {contract for contract, _, _ in PLANTS} == NAMES.keys()


def test_not_even_a_type_crosses_a_boundary(tree):
    """Types may be named where their module may not be imported, except across planes."""
    config = tree / "pyproject.toml"
    text = config.read_text()
    assert "exclude_type_checking_imports = true" in text
    config.write_text(text.replace("exclude_type_checking_imports = true", "exclude_type_checking_imports = false"))
    structural = [option for key in ("planes", "guest", "agent", "daemon") for option in ("--contract", key)]
    assert broken(tree, *structural) == set()
    planted = tree / "substrate_cluster/auth.py"
    planted.write_text(f"{planted.read_text()}\nif TYPE_CHECKING:\n    from substrate_node.slots import Slots\n")
    assert broken(tree, *structural) == {"planes"}
