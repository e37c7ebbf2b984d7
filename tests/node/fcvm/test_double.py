"""The double says what Firecracker says, byte for byte, where our facts about Firecracker give the bytes."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from node.fcvm.rig import Double

NO_CONTENT = b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"
BEFORE = "The requested operation is not supported before starting the microVM."
AFTER = "The requested operation is not supported after starting the microVM."
WITHIN_S = 10.0


class Process:
    """A double that runs in `cwd`."""

    def __init__(self, double: Double, cwd: Path) -> None:
        self.cwd = cwd
        self.popen = subprocess.Popen(
            [double.firecracker, "--id", "g1", "--api-sock", "api.sock", "--log-path", "log"],
            cwd=cwd,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def connect(self, name: str = "api.sock") -> socket.socket:
        """A connection, as soon as there is somebody to connect to."""
        deadline_s = time.monotonic() + WITHIN_S
        while True:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(WITHIN_S)
            try:
                sock.connect(str(self.cwd / name))
            except OSError:
                sock.close()
                if time.monotonic() > deadline_s:
                    raise
            else:
                return sock

    def say(self, data: bytes) -> bytes:
        """Send something on a new connection, and hear what is answered at once."""
        with self.connect() as sock:
            sock.sendall(data)
            return sock.recv(65_536)

    def call(self, method: str, path: str, body: object = None) -> tuple[int, dict | None]:
        """Make a request; returns status and answer."""
        raw = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
        head, _, answer = self.say(head + raw).partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(answer) if answer else None

    def fault(self, method: str, path: str, body: object = None) -> str:
        """Make a request that is refused; returns why."""
        status, answer = self.call(method, path, body)
        assert status == 400
        return answer["fault_message"]

    def configure(self, rootfs: Path) -> None:
        """Set up what a guest of ours has."""
        (self.cwd / "kernel").touch()
        for path, body in {
            "/machine-config": {"vcpu_count": 1, "mem_size_mib": 16},
            "/boot-source": {"kernel_image_path": "kernel"},
            "/drives/rootfs": {"drive_id": "rootfs", "is_root_device": True, "path_on_host": str(rootfs)},
            "/vsock": {"guest_cid": 3, "uds_path": "v.sock"},
        }.items():
            assert self.call("PUT", path, body) == (204, None)


@contextmanager
def running(double: Double, cwd: Path) -> Iterator[Process]:
    """A double that is killed at the end."""
    cwd.mkdir(exist_ok=True)
    process = Process(double, cwd)
    try:
        yield process
    finally:
        process.popen.kill()
        process.popen.wait()


@pytest.fixture
def double(tmp_path: Path) -> Double:
    """The programs."""
    return Double(tmp_path / "bin")


@pytest.fixture
def firecracker(double: Double, tmp_path: Path) -> Iterator[Process]:
    """A double that has just been started."""
    with running(double, tmp_path / "g1") as process:
        yield process


@pytest.fixture
def booted(firecracker: Process, double: Double) -> Process:
    """One whose machine runs; the double itself answers in the place of a guest."""
    firecracker.configure(double.rootfs(argv=None))
    assert firecracker.call("PUT", "/actions", {"action_type": "InstanceStart"}) == (204, None)
    return firecracker


# The API.


def test_the_golden_exchanges(booted: Process, double: Double, tmp_path: Path):
    """The start of a machine, and a pause before it."""
    request = b'PATCH /vm HTTP/1.1\r\nHost: localhost\r\nContent-Length: 18\r\n\r\n{"state":"Paused"}'
    assert booted.say(request) == NO_CONTENT
    with running(double, tmp_path / "other") as fresh:
        assert fresh.say(request) == (
            b"HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n"
            b"Content-Type: application/json\r\nContent-Length: 89\r\n\r\n"
            b'{"fault_message":"' + BEFORE.encode() + b'"}'
        )


def test_success_with_content(firecracker: Process):
    """Compact JSON, and no reason behind the status."""
    about = b'{"id":"g1","state":"Not started","vmm_version":"1.17.0","app_name":"Firecracker"}'
    assert firecracker.say(b"GET / HTTP/1.1\r\n\r\n") == (
        b"HTTP/1.1 200 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(about), about)
    )


def test_what_is_no_request_gets_json_that_is_none(firecracker: Process):
    """A raw newline stands in the string of the second kind of error."""
    assert firecracker.say(b"BREW /pot HTTP/1.1\r\n\r\n").endswith(
        b'{ "error": "Invalid HTTP Method: Unsupported HTTP method.\n'
        b'All previous unanswered requests will be dropped." }'
    )
    assert b"larger than the limit of 51200" in firecracker.say(b"PUT /mmds HTTP/1.1\r\nContent-Length: 51201\r\n\r\n")


def test_the_eleventh_connection_is_turned_away(firecracker: Process):
    """With a status line that has no blank at its end."""
    socks = [firecracker.connect() for _ in range(11)]
    assert socks[10].recv(1024) == (
        b"HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n"
        b'{ "error": "Too many open connections" }'
    )
    assert socks[10].recv(1) == b""
    for sock in socks:
        sock.close()


@pytest.mark.parametrize(
    ("method", "path", "body", "fault"),
    [
        ("PUT", "/foo", {}, "Invalid request method and/or path: PUT foo."),
        ("PUT", "/snapshot", {}, "Missing snapshot operation type."),
        ("PUT", "/vsock", None, "Empty PUT request."),
        ("PATCH", "/vm", None, "Empty PATCH request."),
        ("GET", "/version", {}, "GET request cannot have a body."),
        ("PUT", "/drives/a-b", {}, "API Resource IDs can only contain alphanumeric characters and underscores."),
        (
            "PUT",
            "/drives/a",
            {"drive_id": "b", "is_root_device": True},
            "The id from the path does not match the id from the body!",
        ),
        (
            "PUT",
            "/actions",
            {"action_type": "InstanceStart"},
            "Start microvm error: Cannot start microvm without kernel",
        ),
        ("PUT", "/snapshot/create", {"snapshot_path": "s", "mem_file_path": "m"}, BEFORE),
        (
            "PUT",
            "/boot-source",
            {"kernel_image_path": "x"},
            "kernel file cannot be opened: No such file or directory (os e",
        ),
        ("PUT", "/machine-config", {"vcpu_count": 1}, "missing field `mem_size_mib` at line 1 column"),
        (
            "PUT",
            "/vsock",
            {"guest_cid": 3, "uds_path": "v", "x": 1},
            "unknown field `x`, expected one of `vsock_id`, `guest_cid`, `uds_path`",
        ),
        ("PUT", "/snapshot/load", {"snapshot_path": "s"}, "either `mem_backend` or `mem_file_path` is required"),
        (
            "PUT",
            "/snapshot/load",
            {"snapshot_path": "s", "mem_file_path": "m", "mem_backend": {"backend_type": "File", "backend_path": "m"}},
            "either `mem_backend` or `mem_file_path` exclusively is required",
        ),
    ],
)
def test_what_is_refused_before_the_start(method, path, body, fault, firecracker: Process):
    """With the words that clients may look for."""
    assert fault in firecracker.fault(method, path, body)


def test_what_is_refused_after_the_start(booted: Process):
    """And what succeeds twice."""
    assert booted.fault("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 8}) == AFTER
    assert booted.fault("PUT", "/actions", {"action_type": "InstanceStart"}) == AFTER
    create = {"snapshot_path": "state", "mem_file_path": "memory"}
    assert "save/restore unavailable while running" in booted.fault("PUT", "/snapshot/create", create)
    for state in ("Paused", "Paused", "Resumed", "Resumed"):
        assert booted.call("PATCH", "/vm", {"state": state}) == (204, None)


def test_a_load_after_configuration_is_refused_and_the_process_lives(firecracker: Process):
    """The attempt itself counts for nothing."""
    assert firecracker.call("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 8}) == (204, None)
    load = {"snapshot_path": "s", "mem_backend": {"backend_type": "File", "backend_path": "m"}}
    assert "not allowed after configuring boot-specific" in firecracker.fault("PUT", "/snapshot/load", load)
    assert firecracker.call("GET", "/")[0] == 200


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda cwd: (cwd / "state").unlink(), "Failed to open snapshot file: No such file or directory (os error 2)"),
        (lambda cwd: (cwd / "state").write_bytes(b"x"), "IO Error: File too short to contain CRC"),
        (lambda cwd: (cwd / "state").write_bytes(bytes(range(256))), "bitcode serialization: bitcode error"),
        (lambda cwd: (cwd / "state").write_bytes(b"FCDOUBLE9.0.0\n{}12345678"), "Invalid data version: 9.0.0"),
        (lambda cwd: (cwd / "state").write_bytes(b"FCDOUBLE12.0.0\n{}12345678"), "CRC64 validation failed"),
        (lambda cwd: (cwd / "memory").unlink(), "Failed to load guest memory: No such file or directory (os error 2)"),
        (
            lambda cwd: (cwd / "v.sock").touch(),
            "Error binding to the host-side Unix socket: Address in use (os error 98)",
        ),
    ],
)
def test_a_load_that_fails_is_answered_and_ends_the_process(
    spoil, fault, booted: Process, double: Double, tmp_path: Path
):
    """With exit status 1."""
    assert booted.call("PATCH", "/vm", {"state": "Paused"}) == (204, None)
    clone = tmp_path / "c1"
    clone.mkdir()
    create = {"snapshot_path": str(clone / "state"), "mem_file_path": str(clone / "memory")}
    assert booted.call("PUT", "/snapshot/create", create) == (204, None)
    assert (clone / "memory").stat().st_size == 16 * 2**20
    spoil(clone)
    with running(double, clone) as process:
        load = {"snapshot_path": "state", "mem_backend": {"backend_type": "File", "backend_path": "memory"}}
        message = process.fault("PUT", "/snapshot/load", load)
        assert message.startswith("Load snapshot error: Failed to restore from snapshot: ")
        assert fault in message
        assert process.popen.wait(WITHIN_S) == 1


@pytest.mark.parametrize(
    ("version", "known"),
    [
        ("1.14.3", set()),
        ("1.14.4", {"clock_realtime"}),
        ("1.15.0", set()),
        ("1.15.1", {"clock_realtime"}),
        ("1.16.2", {"clock_realtime", "vsock_override"}),
        ("1.17.0", {"clock_realtime", "vsock_override", "huge_pages"}),
    ],
)
def test_each_release_knows_its_own_fields(version: str, known: set[str], double: Double, tmp_path: Path):
    """Another field is an unknown one."""
    double.set(version=version)
    fields = {"clock_realtime": True, "vsock_override": {"uds_path": "v"}, "huge_pages": "None"}
    with running(double, tmp_path / "g1") as process:
        assert process.call("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 8}) == (204, None)
        load = {"snapshot_path": "s", "mem_backend": {"backend_type": "File", "backend_path": "m"}}
        faults = {field: process.fault("PUT", "/snapshot/load", load | {field: fields[field]}) for field in fields}
    assert {field for field, fault in faults.items() if "unknown field" not in fault} == known


def test_a_stale_api_socket_ends_the_next_process(firecracker: Process, double: Double):
    """It stays behind, whatever the end."""
    firecracker.connect().close()
    firecracker.popen.kill()
    firecracker.popen.wait()
    with running(double, firecracker.cwd) as second:
        assert second.popen.wait(WITHIN_S) == 1
    assert "Check that it is not already used." in (firecracker.cwd / "log").read_text()


# The vsock.


def test_a_stream_begins_with_ok_and_a_number(booted: Process):
    """One more for each CONNECT that was understood, served or not."""
    with booted.connect("v.sock") as sock:
        sock.sendall(b"CONNECT 1027\nGET / HTTP/1.1\r\n\r\n")
        assert sock.recv(14, socket.MSG_WAITALL) == b"OK 1073741824\n"
    with booted.connect("v.sock") as sock:
        sock.sendall(b"connect   1028 and more\n")
        assert sock.recv(14, socket.MSG_WAITALL) == b"OK 1073741825\n"


@pytest.mark.parametrize(
    "line", [b"CONNECT 5", b"HELLO 1027\n", b"CONNECT x1027\n", b"CONNECT 99999999999\n", b"\xff" * 32]
)
def test_a_line_that_is_not_whole_or_none_ends_the_stream_in_silence(line: bytes, booted: Process):
    """Nine bytes are too few to be read at all."""
    with booted.connect("v.sock") as sock:
        sock.sendall(line)
        assert sock.recv(1) == b""


def test_a_paused_machine_takes_no_stream_until_it_is_resumed(booted: Process):
    """Established ones are gone by then."""
    with booted.connect("v.sock") as old, booted.connect("v.sock") as new:
        old.sendall(b"CONNECT 1027\n")
        assert old.recv(14, socket.MSG_WAITALL)
        assert booted.call("PATCH", "/vm", {"state": "Paused"}) == (204, None)
        new.sendall(b"CONNECT 1027\n")
        new.settimeout(0.2)
        with pytest.raises(TimeoutError):
            new.recv(14, socket.MSG_WAITALL)
        assert booted.call("PATCH", "/vm", {"state": "Resumed"}) == (204, None)
        assert old.recv(1) == b""
        new.settimeout(WITHIN_S)
        assert new.recv(14, socket.MSG_WAITALL) == b"OK 1073741825\n"


def test_the_defect_of_two_releases_after_a_pause_without_a_snapshot(double: Double, tmp_path: Path):
    """Streams from the host hang for ever."""
    double.set(version="1.16.1")
    with running(double, tmp_path / "g1") as process:
        process.configure(double.rootfs(argv=None))
        for method, path, body in (
            ("PUT", "/actions", {"action_type": "InstanceStart"}),
            ("PATCH", "/vm", {"state": "Paused"}),
            ("PATCH", "/vm", {"state": "Resumed"}),
        ):
            assert process.call(method, path, body) == (204, None)
        with process.connect("v.sock") as sock:
            sock.sendall(b"CONNECT 1027\n")
            sock.settimeout(0.2)
            with pytest.raises(TimeoutError):
                sock.recv(1)


# The page-fault handler.


def test_a_handler_gets_one_message_and_one_descriptor(booted: Process, double: Double, tmp_path: Path):
    """Then nothing more, until the end."""
    clone = tmp_path / "c1"
    clone.mkdir()
    assert booted.call("PATCH", "/vm", {"state": "Paused"}) == (204, None)
    create = {"snapshot_path": str(clone / "state"), "mem_file_path": str(clone / "memory")}
    assert booted.call("PUT", "/snapshot/create", create) == (204, None)
    with socket.socket(socket.AF_UNIX) as handler, running(double, clone) as process:
        handler.bind(str(clone / "uffd.sock"))
        handler.listen()
        load = {"snapshot_path": "state", "mem_backend": {"backend_type": "Uffd", "backend_path": "uffd.sock"}}
        assert process.call("PUT", "/snapshot/load", load) == (204, None)
        connection, _ = handler.accept()
        with connection:
            message, descriptors, _, _ = socket.recv_fds(connection, 4096, 4)
            (region,) = json.loads(message)
            assert list(region) == ["base_host_virt_addr", "size", "offset", "page_size", "page_size_kib"]
            assert (region["size"], len(descriptors)) == (16 * 2**20, 1)
            socket.close(descriptors[0])
            process.popen.kill()
            assert connection.recv(1) == b""
