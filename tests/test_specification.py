"""Every promise of the specification names tests that exist, and every file of tests keeps a promise."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROMISE = re.compile(r"^- \*\*(\d+)\.(\d+)\*\* (.+?)(?=\n\n|\n- |\Z)", re.MULTILINE | re.DOTALL)
TEST = re.compile(r"`(tests/[\w/.-]+\.py)::(\w+)`")


def names_in(file: Path) -> set[str]:
    """The names of the tests in a file."""
    functions = (
        node
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return {function.name for function in functions if function.name.startswith("test_")}


def all_names(root: Path) -> Mapping[str, set[str]]:
    """The names of all tests, by file, as the specification names it."""
    return {str(file.relative_to(root)): names_in(file) for file in sorted(root.glob("tests/**/test_*.py"))}


def orphans(specification: str, tests: Mapping[str, set[str]]) -> Iterator[str]:
    """What is wrong between a specification and its tests, either way."""
    last, kept = (0, 0), set()
    for chapter, number, words in PROMISE.findall(specification):
        place = (int(chapter), int(number))
        if place not in {(last[0], last[1] + 1), (last[0] + 1, 1)}:
            yield f"{chapter}.{number} does not follow {last[0]}.{last[1]}"
        last = place
        named = TEST.findall(words)
        if not named:
            yield f"{chapter}.{number} names no test"
        yield from (f"{chapter}.{number}: no {file}::{name}" for file, name in named if name not in tests.get(file, ()))
        kept |= {file for file, _ in named}
    yield from (f"{file} keeps no promise" for file in tests if file not in kept)


def test_every_promise_has_its_tests_and_every_file_of_tests_its_promise():
    specification = (ROOT / "docs/SPECIFICATION.md").read_text()
    found = list(orphans(specification, all_names(ROOT)))
    assert not found, "\n".join(["docs/SPECIFICATION.md and the tests disagree:", *found])
    assert len(PROMISE.findall(specification)) == specification.count("\n- **"), (
        "a promise is not in the form of the others"
    )


WHOLE = """
- **1.1** One thing.
  `tests/test_a.py::test_one`
- **1.2** Another, in
  two lines. `tests/test_a.py::test_two`, `tests/test_b.py::test_three`

## 2
- **2.1** A third. `tests/test_b.py::test_three`
"""
TESTS = {"tests/test_a.py": {"test_one", "test_two"}, "tests/test_b.py": {"test_three"}}


def test_a_whole_specification_has_no_orphan():
    assert list(orphans(WHOLE, TESTS)) == []


@pytest.mark.parametrize(
    ("specification", "tests", "said"),
    [
        (WHOLE.replace("::test_two", "::test_too"), TESTS, ["1.2: no tests/test_a.py::test_too"]),
        (
            WHOLE.replace("tests/test_a.py::test_two", "tests/test_c.py::test_two"),
            TESTS,
            ["1.2: no tests/test_c.py::test_two"],
        ),
        (WHOLE.replace("`tests/test_a.py::test_one`", "Trust us."), TESTS, ["1.1 names no test"]),
        (WHOLE, TESTS | {"tests/test_d.py": {"test_four"}}, ["tests/test_d.py keeps no promise"]),
        (WHOLE.replace("**1.2**", "**1.3**"), TESTS, ["1.3 does not follow 1.1"]),
        (WHOLE.replace("**2.1**", "**1.2**"), TESTS, ["1.2 does not follow 1.2"]),
    ],
)
def test_an_orphan_is_found_either_way(specification, tests, said):
    assert list(orphans(specification, tests)) == said


def test_tests_are_found_wherever_they_stand(tmp_path):
    (tmp_path / "tests/deep").mkdir(parents=True)
    (tmp_path / "tests/deep/test_x.py").write_text("async def test_a(): ...\nclass TestB:\n    def test_b(self): ...\n")
    assert all_names(tmp_path) == {"tests/deep/test_x.py": {"test_a", "test_b"}}
