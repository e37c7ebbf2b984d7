"""Clean rooms: each wheel, installed with nothing but what it declares, is complete and knows only what it may."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from email import message_from_string
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
UV = os.environ.get("UV", "uv")
CORES = 2
LOOK_AROUND = Path(__file__).with_name("look_around.py")

MAY_USE: Mapping[str, set[str]] = {
    "substrate-seam": set(),
    "substrate-cluster": {"substrate-seam"},
    "substrate-node": {"substrate-seam"},
    "substrate-guest": set(),
    "substrate-service": {"substrate-seam"},
    "substrate-cluster-agent": {"substrate-seam", "substrate-cluster", "substrate-service"},
    "substrate-node-daemon": {"substrate-seam", "substrate-node", "substrate-guest", "substrate-service"},
    "fc-invoke": {"substrate-seam", "substrate-cluster", "substrate-node", "substrate-guest", "substrate-service"},
}
"""What each wheel may use of ours: the law, of which import contracts and dependencies are only the spelling."""

PROJECTS = {
    project["name"]: project
    for path in sorted(ROOT.glob("packages/*/pyproject.toml")) + sorted(ROOT.glob("apps/*/pyproject.toml"))
    for project in [tomllib.loads(path.read_text())["project"] | {"directory": path.parent}]
}
SCRIPTS = [(name, script) for name, project in PROJECTS.items() for script in project.get("scripts", {})]


def module_of(name: str) -> str:
    """The package that a wheel of ours holds."""
    (marker,) = (PROJECTS[name]["directory"] / "src").glob("*/py.typed")
    return marker.parent.name


class Wheel:
    """A built wheel: its path and what its metadata says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with ZipFile(path) as archive:
            (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            self.metadata = message_from_string(archive.read(metadata).decode())
        self.name: str = self.metadata["Name"]
        declared = map(Requirement, self.metadata.get_all("Requires-Dist", []))
        self.requires = {needed.name.lower() for needed in declared if "extra" not in str(needed.marker)}


ONLY_WITH_EXTRA = {"substrate-service": {"substrate_service.tracing.otlp": {"grpc", "opentelemetry"}}}
"""By wheel: the modules that only one of its extras makes usable, and what they borrow. The rooms have no extras."""


class Room(NamedTuple):
    """An environment with one wheel and what it declares, and what can be seen in there."""

    path: Path
    wheel: Wheel
    seen: Mapping[str, object]


def run(*argv: object) -> str:
    """Run a program to its end; what it prints. A failure shows what it said."""
    done = subprocess.run(
        [str(arg) for arg in argv], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{argv} failed:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def wheels(tmp_path_factory) -> Mapping[str, Wheel]:
    """Every wheel of the workspace, built."""
    dist = tmp_path_factory.mktemp("dist")
    run(UV, "build", "--quiet", "--all-packages", "--wheel", "--out-dir", dist)
    return {wheel.name: wheel for wheel in map(Wheel, dist.glob("*.whl"))}


@pytest.fixture(scope="session")
def rooms(wheels, tmp_path_factory) -> Mapping[str, Room]:
    """A clean room for each wheel; the versions of what is not ours are those of the lock file."""
    locked = tmp_path_factory.mktemp("locked") / "constraints.txt"
    only_foreign = ("--all-packages", "--no-emit-workspace", "--no-dev", "--no-hashes")
    run(UV, "export", "--quiet", "--frozen", *only_foreign, "--output-file", locked)
    modules = [module_of(name) for name in PROJECTS]

    def closure(name: str) -> Iterator[Wheel]:
        yield wheels[name]
        for needed in wheels[name].requires & wheels.keys():
            yield from closure(needed)

    def furnished(name: str) -> Room:
        path = tmp_path_factory.mktemp(name)
        ours = {wheel.path for wheel in closure(name)}
        run(UV, "venv", "--quiet", "--python", sys.executable, "--allow-existing", path)
        run(UV, "pip", "install", "--quiet", "--python", path, "--constraint", locked, *ours)
        seen = json.loads(run(path / "bin/python", "-I", LOOK_AROUND, name, *modules))
        return Room(path, wheels[name], seen)

    with ThreadPoolExecutor(CORES) as pool:
        return dict(zip(MAY_USE, pool.map(furnished, MAY_USE), strict=True))


def test_every_wheel_is_in_the_table_and_built(wheels):
    assert MAY_USE.keys() == PROJECTS.keys() == wheels.keys()


@pytest.mark.parametrize("name", MAY_USE)
def test_a_wheel_declares_exactly_what_it_may_use_of_ours(name, wheels):
    assert wheels[name].requires & PROJECTS.keys() == MAY_USE[name]


@pytest.mark.parametrize("name", MAY_USE)
def test_a_wheel_alone_is_complete_and_reaches_no_other_plane(name, rooms):
    """Every module of it has been imported in its room, and of ours nothing else can be."""
    seen = rooms[name].seen
    assert seen["modules"]
    assert set(seen["failures"]) == ONLY_WITH_EXTRA.get(name, {}).keys()
    assert set(seen["importable"]) == {module_of(other) for other in {name} | MAY_USE[name]}


@pytest.mark.parametrize("name", MAY_USE)
def test_a_wheel_declares_itself_whatever_it_imports_even_late(name, rooms):
    """Nothing is borrowed from the dependency of a dependency."""
    declared = {name} | rooms[name].wheel.requires
    undeclared = {
        module: lenders for module, lenders in rooms[name].seen["lenders"].items() if not declared & {*lenders}
    }
    of_extras = {borrowed for each in ONLY_WITH_EXTRA.get(name, {}).values() for borrowed in each}
    assert set(undeclared) == of_extras, "an extra that is not installed lends nothing, and nothing else is missing"


@pytest.mark.parametrize("name", MAY_USE)
def test_a_wheel_carries_its_papers(name, rooms):
    metadata, files = rooms[name].wheel.metadata, rooms[name].seen["files"]
    assert metadata["Version"] == PROJECTS[name]["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Summary"] == PROJECTS[name]["description"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (PROJECTS[name]["directory"] / "README.md").read_text().strip()
    assert f"{module_of(name)}/py.typed" in files
    assert any(file.endswith("licenses/LICENSE") for file in files)


@pytest.mark.parametrize("name", MAY_USE)
def test_the_newest_entry_of_a_changelog_is_the_version_of_its_wheel(name):
    log = (PROJECTS[name]["directory"] / "CHANGELOG.md").read_text()
    newest = next(line for line in log.splitlines() if line.startswith("## "))
    assert PROJECTS[name]["version"] in newest


@pytest.mark.parametrize(("name", "script"), SCRIPTS)
def test_a_command_says_how_it_is_used(name, script, rooms):
    assert "usage" in run(rooms[name].path / "bin" / script, "--help").lower()
