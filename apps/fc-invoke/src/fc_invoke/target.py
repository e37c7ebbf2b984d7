"""What can be said of a developer's `module:attribute` by reading its file, before any of it runs."""

from __future__ import annotations

import ast
import difflib
import re
import sys
from collections.abc import Collection, Iterator
from importlib.machinery import PathFinder
from pathlib import Path

ACCEPTED = "MODULE:ATTRIBUTE, for example app:app"
_TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_DATA = (ast.Constant, ast.Dict, ast.List, ast.Set, ast.Tuple, ast.JoinedStr, ast.ListComp, ast.DictComp, ast.SetComp)
_HIDING = {"exec", "globals", "setattr", "__getattr__"}
"""Names in whose presence a module may have more attributes than its text shows."""


def mistakes(target: str, directory: Path) -> list[str]:
    """Everything that is surely wrong with a target below `directory`, a line each; the rest only running it shows."""
    found = []
    if not directory.is_dir():
        found.append(f"--path: {directory} is no directory")
    if not _TARGET.fullmatch(target):
        return [*found, f"found {target!r}, accepted is {ACCEPTED}"]
    if not found:
        module, _, attribute = target.partition(":")
        file = _source(module, directory)
        found += _of_module(module, directory) if file is None else _of_attribute(attribute.partition(".")[0], file)
    return found


def _source(module: str, directory: Path) -> Path | None:
    place = directory.joinpath(*module.split("."))
    return next((file for file in (place / "__init__.py", place.with_name(f"{place.name}.py")) if file.is_file()), None)


def _of_module(module: str, directory: Path) -> Iterator[str]:
    top = module.partition(".")[0]
    local = PathFinder.find_spec(top, [str(directory)])
    installed = local is None and (top in sys.builtin_module_names or PathFinder.find_spec(top) is not None)
    compiled = local is not None and local.origin is not None and not local.origin.endswith(".py")
    if not installed and not compiled:
        there = {file.stem for file in directory.glob("*.py")} | {file.parent.name for file in directory.glob("*/*.py")}
        yield f"no module {module!r} in {directory}{_nearest(top, there)}"


def _of_attribute(name: str, file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError, OSError):
        return  # the guest shows where
    names = dict(_names(tree))
    if names.keys() & _HIDING or "*" in names:
        return
    if name not in names:
        yield f"{file} has no {name!r}{_nearest(name, names)}"
    elif isinstance(names[name], _DATA):
        yield f"{name!r} of {file} is data; accepted is a function, an App or an ASGI application"


def _names(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Every name that the module gives itself or uses, anywhere, and what it is made of as far as that can be seen."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0], node
        elif isinstance(node, ast.Name):
            yield node.id, node
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value


def _nearest(name: str, among: Collection[str]) -> str:
    near = difflib.get_close_matches(name, sorted(among), n=1)
    return f"; the nearest is {near[0]!r}" if near else ""
