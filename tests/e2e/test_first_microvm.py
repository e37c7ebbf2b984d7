"""The guide from a bare KVM host to a restored microVM: every command of it, taken from the page and run.

Over the double of Firecracker everywhere, and with a real one on request (`-m firecracker`). Of the page only the two
ports are changed, because those may be taken.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.images import FakeImage, file, folder, layer, write_saved
from node.fcvm.real import BOOTS_WITHIN_S, rules
from node.fcvm.rig import Double
from real_parts import needs

GUIDE = Path(__file__).parents[2] / "docs" / "first-microvm.md"
PROGRAM = Path(__file__).parents[1] / "guest" / "image_program.c"
RUN_AS = "import sys; from fc_invoke.main import main; sys.argv[0] = 'fc-invoke'; main()"
OVER_THE_DOUBLE = """\
from substrate_node.doctor import examination
from substrate_node.doctor.sight import Kvm, Tried
from substrate_node.fcvm import MicroVmRules
MicroVmRules.possible = lambda self: True
examination._kvm = lambda path: Kvm(
    path=str(path), present=True, opened=Tried(), api=12, created=Tried(), modules=frozenset({"kvm_amd"})
)
"""
"""The double needs no KVM, which may be missing where this runs."""
PATIENTLY = """\
from functools import partial; import substrate_node.host as host
host.NodeTimes = partial(host.NodeTimes, restore_within_s=120.0)
"""
"""An emulated machine restores a guest in ten seconds and more; so may any that is busy with other tests."""
VERIFY = "fc-invoke verify-clones hello --clones 3 --clock-ms 50"
ELF = b"\x7fELF" + bytes(14) + b"\x3e\x00" + bytes(44)

pytestmark = needs("curl", "x86-64-glibc", "pidfd")


def commands() -> str:
    """All that the guide tells to type, in its order."""
    return "\n".join(re.findall(r"^```sh\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL))


def hello(path: Path, program: bytes, *arguments: str) -> None:
    """An image, as `docker save` writes it, whose program is run for each request."""
    layers = layer(folder("bin"), file("bin/hello", program, mode=0o755))
    write_saved(path, FakeImage(layers, process={"Entrypoint": ["/bin/hello", *arguments]}), "hello:latest")


def follow(where: Path, prelude: str, *, within_s: float, then: str = "", **settings: str) -> str:
    """Do as the guide says in a directory with the files that it asks for, `then` something else; what was printed."""
    (where / "bin").mkdir()
    command = where / "bin" / "fc-invoke"
    command.write_text(f"#!{sys.executable}\n{PATIENTLY}{prelude}{RUN_AS}\n")
    command.chmod(0o755)
    script = f"set -euo pipefail\ntrap 'jobs -p | xargs -r kill' EXIT\n{commands()}{then}"
    for port in ("8080", "8081"):
        script = script.replace(f"127.0.0.1:{port}", f"127.0.0.1:{free_port()}")
    environment = {"PATH": f"{command.parent}:{os.environ['PATH']}", "HOME": str(where), **settings}
    child = subprocess.Popen(
        ["bash", "-c", script],
        cwd=where,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        told, _ = child.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        told = "it took too long"
    finally:
        if child.returncode != 0:
            os.killpg(child.pid, signal.SIGTERM)
            child.wait()
    log = where / "daemon.log"
    assert child.returncode == 0, f"{told}\n{log.read_text() if log.exists() else 'no daemon'}"
    return told


def free_port() -> int:
    """A port that nobody had a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def check(told: str, where: Path) -> None:
    """A call was answered by a restored microVM, its story told, and nothing but its base left."""
    assert re.search(r"^microVMs: +yes", told, re.MULTILINE)
    assert "fc-start: warm" in told
    assert f"fc-isolation: {'microvm-jailed' if os.geteuid() == 0 else 'microvm'}" in told
    assert told.lower().count("hello") >= 2
    assert "invocation." in told
    assert list((where / "state" / "run").iterdir()) == []
    assert list((where / "state" / "bases").glob("*/current"))


def test_the_guide_ends_with_a_restored_microvm(tmp_path: Path):
    """Over the double, which answers in the guest's place; the image is built all the same."""
    Double(tmp_path)
    (tmp_path / "vmlinux").write_bytes(ELF)
    hello(tmp_path / "hello.tar", b"#!/bin/sh\necho hello\n")
    told = follow(tmp_path, OVER_THE_DOUBLE, within_s=120.0)
    check(told, tmp_path)


@pytest.mark.firecracker
@needs("gcc")
def test_the_guide_ends_with_a_real_restored_microvm(tmp_path: Path):
    """The image is one static program, which says in capitals what it is told. Its clones differ and know the time."""
    real = rules()
    for name, source in (
        ("firecracker", real.firecracker),
        ("jailer", real.firecracker.with_name("jailer")),
        ("vmlinux", real.kernel),
    ):
        shutil.copy(source, tmp_path / name)
    subprocess.run(["gcc", "-static", "-O1", "-o", tmp_path / "program", PROGRAM], check=True)
    hello(tmp_path / "hello.tar", (tmp_path / "program").read_bytes(), "upper")
    settings = {"FC_INVOKE_BOOT_READY_TIMEOUT": "5m", "FC_INVOKE_WORKLOADS_FILE": "workloads.yaml"}
    told = follow(tmp_path, "", within_s=BOOTS_WITHIN_S, then=VERIFY, **settings)
    check(told, tmp_path)
    assert "HELLO" in told
    assert "3 clones of hello" in told
