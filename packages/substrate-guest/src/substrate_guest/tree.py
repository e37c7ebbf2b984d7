"""What is added to an image so that it can be a guest: our init, with an interpreter of its own.

It is copied from the machine that builds the image: the interpreter, its loader and libraries, and of the standard
library what the init imports. Nothing of the image is used to run it.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import h11

from substrate_guest.launcher import launcher

ROOT = "/.substrate"
"""Where the tree will be in the guest."""
INIT = f"{ROOT}/init"
"""What the guest's kernel is to start."""
MACHINE = "x86_64"
LOADER = Path("/lib64/ld-linux-x86-64.so.2")
"""Where the ABI of x86-64 with glibc has it."""
LEFT_OUT = ("tests", "__pycache__", "tree.py", "launcher.py", "py.typed")
NOT_NEEDED = ("ssl", "_ssl", "_hashlib", "bz2", "_bz2", "lzma", "_lzma", "zlib")
"""What others import if it is there, and what would bring large libraries with it."""
_MEASURE = """
import importlib, json, sys
names, needless, places = json.loads(sys.stdin.read())
sys.path += places
sys.modules.update(dict.fromkeys(needless))
for name, attributes in names:
    module = importlib.import_module(name)
    for attribute in attributes:
        try:
            getattr(module, attribute)
        except AttributeError:
            importlib.import_module(f"{name}.{attribute}")
files = [getattr(module, "__file__", None) for module in sys.modules.values()]
print(json.dumps([sys.executable, importlib.import_module("os").__file__, sorted(filter(None, files))]))
"""
_COMPILE = """
import json, py_compile, sys
unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
for source, shown in json.loads(sys.stdin.read()):
    py_compile.compile(source, dfile=shown, doraise=True, invalidation_mode=unchecked)
"""


class NoTree(Exception):
    """This machine can't provide a guest's interpreter; the message says why."""


def guest_tree(destination: Path, *, python: Path = Path(sys.executable)) -> None:
    """Lay out, in an empty directory, what an image gets at `/.substrate`; the same bytes each time.

    Raises `NoTree` and `OSError`.
    """
    if platform.machine() != MACHINE or not LOADER.exists():
        raise NoTree(
            "a guest's interpreter is copied from the machine that builds the image. Accepted is "
            f"{MACHINE} with {LOADER}, this is {platform.machine()}: build it on another one"
        )
    packages = [Path(__file__).parent, Path(h11.__file__).parent]
    executable, library, modules = _needed(python, packages)
    interpreter = destination / "bin/python3"
    _copy(executable, interpreter, 0o755)
    for module in modules:
        if module.is_relative_to(library):
            _copy(module, destination / "lib" / library.name / module.relative_to(library), 0o644)
    for package in packages:
        shutil.copytree(package, destination / "site" / package.name, ignore=shutil.ignore_patterns(*LEFT_OUT))
    (destination / "lib" / library.name / "lib-dynload").mkdir(exist_ok=True)  # or the interpreter complains
    _copy(LOADER, destination / "lib" / LOADER.name, 0o755)
    for name, path in _libraries([executable, *(one for one in modules if one.suffix == ".so")]).items():
        _copy(path, destination / "lib" / name, 0o644)
    _compile(python, destination)
    (destination / "init").write_bytes(launcher(command()))
    (destination / "init").chmod(0o755)


def command() -> list[str]:
    """How the init is run in the guest, there and only there."""
    loader = [f"{ROOT}/lib/{LOADER.name}", "--inhibit-cache", "--library-path", f"{ROOT}/lib"]
    program = f"import sys; sys.path.append('{ROOT}/site'); from substrate_guest import init; init.main()"
    return [*loader, f"{ROOT}/bin/python3", "-I", "-S", "-B", "-X", "utf8", "-c", program]


def imported(source: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The modules that a module names in imports, wherever they stand in it, and what it takes from each."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, tuple(alias.name for alias in node.names)


def _needed(python: Path, packages: Iterable[Path]) -> tuple[Path, Path, list[Path]]:
    """The interpreter itself, its standard library, and the files of all modules that the packages import."""
    names: set[tuple[str, tuple[str, ...]]] = {(f"encodings.{one}", ()) for one in ("ascii", "latin_1", "idna")}
    for package in packages:
        for path in sorted(package.rglob("*.py")):
            inside = path.relative_to(package)
            if not set(LEFT_OUT) & set(inside.parts):
                names |= set(imported(path.read_text(encoding="utf-8")))
                names.add((".".join([package.name, *inside.with_suffix("").parts]).removesuffix(".__init__"), ()))
    names = {one for one in names if one[0].rpartition(".")[2] != "__main__" and one[0] not in NOT_NEEDED}
    places = sorted({str(package.parent) for package in packages})
    said = _output([str(python), "-I", "-S", "-c", _MEASURE], json.dumps([sorted(names), NOT_NEEDED, places]))
    executable, landmark, files = json.loads(said)
    return Path(executable).resolve(), Path(landmark).parent, [Path(file) for file in files]


def _libraries(binaries: Iterable[Path]) -> dict[str, Path]:
    """What the loader would load for these, by the name it is asked for. Raises `NoTree`."""
    found: dict[str, Path] = {}
    for binary in binaries:
        listed = _output([str(LOADER), "--list", str(binary)])
        if "not found" in listed:
            raise NoTree(f"{binary} can't be copied, since a library of it is missing here:\n{listed}")
        found |= {name: Path(path) for name, path in re.findall(r"^\s(\S+) => (/\S+)", listed, re.MULTILINE)}
    return found


def _compile(python: Path, destination: Path) -> None:
    """Compile beforehand, for a file system that nobody can write to: a start takes a tenth of the time."""
    sources = [(str(path), f"{ROOT}/{path.relative_to(destination)}") for path in sorted(destination.rglob("*.py"))]
    _output([str(python), "-s", "-S", "-c", _COMPILE], json.dumps(sources))


def _copy(source: Path, target: Path, mode: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(mode)


def _output(command: list[str], asked: str = "") -> str:
    """What a program answers. Raises `NoTree` when it fails."""
    environ = {"PATH": os.defpath, "PYTHONHASHSEED": "0"}  # compiled sets would be in any order
    try:
        return subprocess.run(command, input=asked, env=environ, capture_output=True, text=True, check=True).stdout
    except subprocess.CalledProcessError as error:
        raise NoTree(f"{command[0]} failed: {error.stderr.strip()[-500:]}") from error
