"""What is added to an image: an interpreter of its own, started by a program of its own."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from real_parts import needs
from substrate_guest import tree
from substrate_guest.launcher import launcher

pytestmark = needs("x86-64-glibc")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    made = tmp_path_factory.mktemp("tree")
    tree.guest_tree(made)
    return made


def contents(directory):
    return {
        str(path.relative_to(directory)): (path.stat().st_mode, path.read_bytes())
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_the_tree_is_the_same_bytes_each_time(built, tmp_path):
    """Or each build of an image would be another image."""
    tree.guest_tree(tmp_path)
    assert contents(tmp_path) == contents(built)


def test_the_interpreter_runs_the_init_with_nothing_else_of_this_machine(built, tmp_path):
    """Everything the init could import while it serves can be imported, from the tree and from nowhere else."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(built, moved)
    site = built / "site"
    ours = [".".join(path.relative_to(site).with_suffix("").parts) for path in site.rglob("*.py")]
    names = [name.removesuffix(".__init__") for name in ours if not name.endswith("__main__")]
    program = (
        f"import {', '.join(names)}, json, tempfile, traceback, concurrent.futures.thread\n"
        "print(*(module.__file__ for module in sys.modules.values() if getattr(module, '__file__', None)), sep='\\n')\n"
        "print(*(line.split()[-1] for line in open('/proc/self/maps') if '.so' in line), sep='\\n')"
    )
    command = [part.replace(tree.ROOT, str(moved)) for part in tree.command()]
    said = subprocess.run(
        [*command[:-1], command[-1].partition("from ")[0] + program], capture_output=True, text=True, check=True
    )
    files = set(map(Path, said.stdout.split()))
    assert len(files) > 50
    assert {path for path in files if not path.is_relative_to(moved)} == set()


def test_it_holds_no_tests_and_no_builder(built):
    names = {path.name for path in built.rglob("*")}
    assert names.isdisjoint({"tests", "tree.py", "launcher.py"})


def test_imports_are_found_wherever_they_stand():
    source = "import a.b, c\nfrom d import e as f\nfrom . import g\ndef late():\n    from h.i import j, k\n"
    assert list(tree.imported(source)) == [("a.b", ()), ("c", ()), ("d", ("e",)), ("h.i", ("j", "k"))]


@pytest.mark.parametrize(("machine", "loader"), [("aarch64", "/"), ("x86_64", "/no/such/loader")])
def test_another_kind_of_machine_is_refused(machine, loader, monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(tree, "LOADER", Path(loader))
    with pytest.raises(tree.NoTree, match="Accepted is x86_64"):
        tree.guest_tree(tmp_path)


def test_an_interpreter_that_does_not_run_is_refused_with_what_it_said(tmp_path):
    with pytest.raises(tree.NoTree, match="failed: "):
        tree.guest_tree(tmp_path, python=Path("/bin/false"))


def test_a_launcher_becomes_its_program_with_fixed_arguments_and_the_environment_it_got(tmp_path):
    """What is written behind it on a command line, as a kernel does with words it does not know, changes nothing."""
    program = tmp_path / "launcher"
    program.write_bytes(launcher(["/bin/sh", "-c", 'echo "$0 $# $A"', "zero", "one"]))
    program.chmod(0o755)
    said = subprocess.check_output([program, "more", "and more"], env={"A": "passed on"}, text=True)
    assert said == "zero 1 passed on\n"
    assert len(program.read_bytes()) < 512


def test_a_launcher_without_its_program_fails_with_127(tmp_path):
    program = tmp_path / "launcher"
    program.write_bytes(launcher(["/no/such/program"]))
    program.chmod(0o755)
    assert subprocess.run([program], check=False).returncode == 127
