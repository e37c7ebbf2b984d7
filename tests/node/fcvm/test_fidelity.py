"""The double answers as Firecracker does: every recorded exchange again, to the byte, and to a real one on request.

With `-m firecracker` the same is said to the program that `FC_INVOKE_FIRECRACKER_BIN` names, and to a double of its
release, which must answer alike. Only the machine that is started needs KVM.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from node.fcvm.openapi import LOADER
from node.fcvm.real import rules as real_rules
from node.fcvm.rig import Double
from substrate_node.fcvm.release import Release

RECORDED: dict[str, list[dict[str, Any]]] = yaml.load(
    (Path(__file__).parent / "data" / "exchanges.yaml").read_text(), LOADER
)
RECORDED_OF = "1.16.1"
MALFORMED = "An error occurred when deserializing the json body of a request: "
WITHIN_S = 10.0


def request(asked: str) -> bytes:
    """What is sent: as it stands if it has lines of its own, else made of a method, a path and perhaps a body."""
    if "\r\n" in asked or asked == "{}":
        return asked.encode()
    method, path, *body = asked.split(" ", 2)
    length = f"Content-Length: {len(body[0].encode())}\r\n" if body else ""
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n{''.join(body)}".encode()


def answer(exchange: dict[str, Any]) -> bytes:
    """The bytes of a recorded answer."""
    head = "Server: Firecracker API\r\nConnection: keep-alive\r\n"
    if "deprecated" in exchange:
        head += "Deprecation: true\r\n"
    match exchange:
        case {"goes on": True}:
            status, body = 100, ""
        case {"done": True}:
            status, body = 204, ""
        case {"told": body}:
            status = 200
        case {"malformed": words}:
            status, body = 400, fault(f"{MALFORMED}{words}.")
        case {"refused": words}:
            status, body = 400, fault(words)
        case {"spoiled": words}:
            status, body = 400, f'{{ "error": "{words}\nAll previous unanswered requests will be dropped." }}'
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body.encode())}\r\n"
    return f"HTTP/1.1 {status} \r\n{head}\r\n{body}".encode()


def fault(words: str) -> str:
    """A refusal's body."""
    quoted = words.replace('"', '\\"')
    return f'{{"fault_message":"{quoted}"}}'


class Talk:
    """A program that serves the API in a directory with files to name, and one connection to it."""

    def __init__(self, program: Path, cwd: Path, kernel: Path | None = None) -> None:
        cwd.mkdir()
        (cwd / "rootfs").write_bytes(b"{}" + bytes(2**20 - 2))
        if kernel is None:
            (cwd / "kernel").touch()
        else:
            (cwd / "kernel").symlink_to(kernel)
        argv = [program, "--id", "x-1", "--api-sock", "api.sock"]
        self.process = subprocess.Popen(
            argv, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._sock = connected(cwd / "api.sock")

    def say(self, asked: str) -> bytes:
        """Send something, and hear one whole answer."""
        self._sock.sendall(request(asked))
        said = b""
        while not said.endswith(b"\r\n\r\n") and (heard := self._sock.recv(1)):
            said += heard
        length = re.search(rb"Content-Length: (\d+)", said)
        whole = len(said) + (int(length[1]) if length else 0)
        while len(said) < whole and (heard := self._sock.recv(whole - len(said))):
            said += heard
        return said.replace(b"Content-Length: 160", b"Content-Length: 152").replace(*BUSY) if BUSY[0] in said else said

    def go_through(self, case: str) -> list[bytes | int | None]:
        """Every answer of a recorded conversation, and the exit status of a process that ends with it."""
        heard: list[bytes | int | None] = []
        for exchange in RECORDED[case]:
            if "ends" in exchange:
                heard.append(self.process.wait(WITHIN_S))
            else:
                heard.append(self.say(exchange["ask"]))
        return heard

    def end(self) -> None:
        """Kill it."""
        self._sock.close()
        self.process.kill()
        self.process.wait()


BUSY = (b"Address already in use", b"Address in use")
"""What another C library says than that of Firecracker's releases."""


def connected(path: Path) -> socket.socket:
    """A connection, as soon as there is somebody to connect to."""
    deadline_s = time.monotonic() + WITHIN_S
    while True:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(WITHIN_S)
        try:
            sock.connect(str(path))
        except OSError:
            sock.close()
            if time.monotonic() > deadline_s:
                raise
        else:
            return sock


@contextmanager
def talking(program: Path, cwd: Path, kernel: Path | None = None) -> Iterator[Talk]:
    """A program that is killed at the end."""
    talk = Talk(program, cwd, kernel)
    try:
        yield talk
    finally:
        talk.end()


def changes_nothing(case: str) -> bool:
    """Whether the process is afterwards as it was before."""
    return len(RECORDED[case]) == 1 and not RECORDED[case][0].keys().isdisjoint({"malformed", "refused"})


def expected(case: str) -> list[bytes | int]:
    """What was recorded of a conversation."""
    return [exchange["ends"] if "ends" in exchange else answer(exchange) for exchange in RECORDED[case]]


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Double:
    """One of the release that was recorded."""
    return Double(tmp_path_factory.mktemp("bin"), version=RECORDED_OF, snapshot_version="10.0.0")


@pytest.fixture(scope="module")
def lasting(double: Double, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    """A process for all conversations that change nothing."""
    with talking(double.firecracker, tmp_path_factory.mktemp("lasting") / "cwd") as talk:
        yield talk


@pytest.mark.parametrize("case", [case for case in RECORDED if changes_nothing(case)])
def test_the_double_refuses_as_recorded(case: str, lasting: Talk):
    """One process hears them all, and lives."""
    assert lasting.go_through(case) == expected(case)
    assert lasting.process.poll() is None


@pytest.mark.parametrize("case", [case for case in RECORDED if not changes_nothing(case)])
def test_the_double_converses_as_recorded(case: str, double: Double, tmp_path: Path):
    """From its start on; some of it ends the process."""
    with talking(double.firecracker, tmp_path / "cwd") as talk:
        assert talk.go_through(case) == expected(case)


def started(program: Path, cwd: Path, kernel: Path | None) -> list[bytes]:
    """What is answered when a machine is started that has a kernel and no root drive, and once more."""
    start = 'PUT /actions {"action_type": "InstanceStart"}'
    with talking(program, cwd, kernel) as talk:
        return [
            talk.say(asked) for asked in ('PUT /boot-source {"kernel_image_path": "kernel"}', start, "GET /", start)
        ]


def test_a_machine_without_a_root_drive_starts(double: Double, tmp_path: Path):
    """What its kernel does then is its own affair."""
    _, done, about, again = started(double.firecracker, tmp_path / "cwd", None)
    assert done == answer({"done": True})
    assert b'"state":"Running"' in about
    assert again == answer({"refused": "The requested operation is not supported after starting the microVM."})


@pytest.fixture(scope="module")
def real() -> Path:
    """The program that the environment names."""
    named = os.environ.get("FC_INVOKE_FIRECRACKER_BIN", "")
    if not Path(named).is_file():
        pytest.fail("there is no Firecracker to compare: FC_INVOKE_FIRECRACKER_BIN names no file", pytrace=False)
    return Path(named).absolute()


@pytest.fixture(scope="module")
def twin(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Double:
    """A double of its release."""

    def told(question: str) -> str:
        return subprocess.run([real, question], capture_output=True, text=True, check=True).stdout

    version = str(Release.parse(told("--version")))
    formats = told("--snapshot-version").split()[0].removeprefix("v")
    return Double(tmp_path_factory.mktemp("twin"), version=version, snapshot_version=formats)


@pytest.mark.firecracker
@pytest.mark.parametrize("case", RECORDED)
def test_a_real_firecracker_answers_as_its_double(case: str, real: Path, twin: Double, tmp_path: Path):
    """Whatever its release; nothing of this needs KVM."""
    with talking(real, tmp_path / "real") as one, talking(twin.firecracker, tmp_path / "twin") as other:
        assert one.go_through(case) == other.go_through(case)


@pytest.mark.firecracker
def test_a_real_machine_without_a_root_drive_starts_as_its_double(twin: Double, tmp_path: Path):
    """This one needs KVM and a kernel."""
    rules = real_rules()
    assert started(rules.firecracker, tmp_path / "real", rules.kernel) == started(
        twin.firecracker, tmp_path / "twin", None
    )
