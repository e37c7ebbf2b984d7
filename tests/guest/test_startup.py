"""Every cold guest waits for what the shim imports."""

import subprocess
import sys

import pytest

DEAR = (
    "argparse",
    "ctypes",
    "difflib",
    "email",
    "http.client",
    "pathlib",
    "shutil",
    "tempfile",
    "urllib",
    "xml",
)


def test_the_shim_imports_nothing_that_it_may_not_need():
    """`http` and `json` are needed by the first thing a node asks; these are not."""
    loaded = "import sys, substrate_guest.shim; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-I", "-c", loaded], text=True).split()
    assert [name for name in DEAR if name in modules] == []


def test_the_shim_needs_the_standard_library_and_h11_only():
    loaded = "import sys, substrate_guest.shim, substrate_guest.asgi, substrate_guest.callables; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-I", "-c", loaded], text=True).split()
    outside = {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)
    startup = subprocess.check_output(
        [sys.executable, "-I", "-c", "import sys; print(*sys.modules)"], text=True
    ).split()
    assert outside - {name.partition(".")[0] for name in startup} == {"h11", "substrate_guest"}


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["serve", "--help"]])
def test_help_says_how_to_use_it(arguments):
    said = subprocess.run(
        [sys.executable, "-m", "substrate_guest", *arguments], capture_output=True, text=True, check=True
    )
    for word in (
        "serve MODULE:ATTRIBUTE",
        "--chdir",
        "workloads.echo:app",
        "workloads.python:app",
        "SUBSTRATE_LISTEN_FD",
    ):
        assert word in said.stdout


@pytest.mark.parametrize("arguments", [[], ["server"], ["serve"], ["serve", "a:b", "c:d"]])
def test_anything_else_exits_with_2(arguments):
    said = subprocess.run(
        [sys.executable, "-m", "substrate_guest", *arguments], capture_output=True, text=True, check=False
    )
    assert said.returncode == 2
