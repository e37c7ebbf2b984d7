"""The client of Firecracker's API: every way in which an answer can be wrong, late or missing has its words."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from node.fcvm.rig import Double
from node.fcvm.test_double import running
from substrate_node.fcvm.api import (
    Api,
    ApiError,
    CreateSnapshot,
    LoadSnapshot,
    MachineConfig,
    MemoryBackend,
    Pause,
    RootDrive,
    Start,
    VsockOverride,
)
from substrate_node.fcvm.release import OLDEST, Release

RELEASE = Release(1, 17, 0)
SIZE = MachineConfig(vcpu_count=1, mem_size_mib=16)
LOAD = LoadSnapshot(snapshot_path="state", mem_backend=MemoryBackend(backend_path="memory"))


@asynccontextmanager
async def connected(double: Double, directory: Path, release: Release = RELEASE) -> AsyncIterator[Api]:
    """A client of a double that has just been started."""
    with running(double, directory) as process:
        process.connect().close()
        api = Api(directory / "api.sock", release)
        yield api
        api.close()


@asynccontextmanager
async def answering(directory: Path, *answers: bytes) -> AsyncIterator[Api]:
    """A client of somebody who gives these answers, one to a request, whatever was asked; the last one again and again.

    An empty one hangs up.
    """
    left = list(answers)

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65_536):
            answer = left.pop(0) if len(left) > 1 else left[0]
            if not answer:
                break
            writer.write(answer)
        writer.close()

    server = await asyncio.start_unix_server(converse, directory / "api.sock")
    api = Api(directory / "api.sock", RELEASE)
    async with server:
        yield api
        api.close()
        await asyncio.sleep(0)  # its connections see the end


def refusal(text: str) -> bytes:
    """An answer of 400 with a fault."""
    body = json.dumps({"fault_message": text}).encode()
    return b"HTTP/1.1 400 \r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


async def refused(api: Api, request: object = SIZE) -> ApiError:
    """The error of a request."""
    with pytest.raises(ApiError) as caught:
        await api.send(request)
    return caught.value


async def test_requests_follow_each_other_on_one_connection(tmp_path: Path):
    """And the state is known without asking."""
    double = Double(tmp_path / "bin")
    async with connected(double, tmp_path / "g1") as api:
        assert (await api.get("/"))["state"] == api.state == "Not started"
        await api.send(SIZE)
        first = api._connection
        await api.send(SIZE)
        assert api._connection is first
        assert (await api.get("/machine-config"))["mem_size_mib"] == 16


async def test_a_refusal_says_what_was_asked_in_which_state_why_and_what_to_do(tmp_path: Path):
    """The process lives on, and so does the connection."""
    async with connected(Double(tmp_path / "bin"), tmp_path / "g1") as api:
        error = await refused(api, RootDrive(path_on_host="nowhere"))
        assert str(error).startswith("PUT /drives/rootfs (Not started) answered 400: Drive config error: ")
        assert str(error).endswith("nowhere Put the file back, or name the right one.")
        assert (error.status, error.going) == (400, False)
        first = api._connection
        await api.send(SIZE)
        assert api._connection is first


async def test_a_load_that_fails_is_known_to_end_the_process(tmp_path: Path):
    """The words of the answer tell."""
    async with connected(Double(tmp_path / "bin"), tmp_path / "g1") as api:
        error = await refused(api, LOAD)
        assert error.going
        assert "os error 2" in error.fault
        assert "the process has ended" in str(await refused(api))


async def test_a_field_that_the_release_does_not_know_is_not_sent(tmp_path: Path):
    """To leave it out would restore something else than what was wanted."""
    double = Double(tmp_path / "bin", version="1.15.1")
    async with connected(double, tmp_path / "g1", Release(1, 15, 1)) as api:
        other = LoadSnapshot(
            snapshot_path="s",
            mem_backend=MemoryBackend(backend_path="m"),
            vsock_override=VsockOverride(uds_path="v"),
            clock_realtime=True,
        )
        assert "Firecracker 1.15.1 does not know 'vsock_override'" in str(await refused(api, other))
        assert double.calls() == []


@pytest.mark.parametrize("cut", range(1, 60, 7))
async def test_an_answer_may_arrive_in_pieces(cut: int, tmp_path: Path):
    """However it is cut."""
    whole = b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65_536):
            for start in range(0, len(whole), cut):
                writer.write(whole[start : start + cut])
                await asyncio.sleep(0)
        writer.close()

    async with await asyncio.start_unix_server(converse, tmp_path / "api.sock"):
        api = Api(tmp_path / "api.sock", RELEASE)
        for request in (SIZE, Start(), Pause()):
            await api.send(request)
        assert api.state == "Paused"
        api.close()
        await asyncio.sleep(0.01)


async def test_the_second_kind_of_error_costs_the_connection_and_not_the_client(tmp_path: Path):
    """Its JSON has a raw newline in it, and what follows on that connection would be lost."""
    body = b'{ "error": "Invalid request.\nAll previous unanswered requests will be dropped." }'
    spoiled = b"HTTP/1.1 400 \r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    async with answering(tmp_path, spoiled, b"HTTP/1.1 204 \r\n\r\n") as api:
        error = await refused(api)
        assert "Invalid request. All previous unanswered requests will be dropped." in str(error)
        first = api._connection
        await api.send(SIZE)
        assert api._connection is not first


async def test_too_many_connections_are_a_defect_of_ours_and_told_so(tmp_path: Path):
    """The status line of this answer ends without a blank."""
    answer = b"HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n"
    async with answering(tmp_path, answer + b'{ "error": "Too many open connections" }') as api:
        assert "answered 503: Too many open connections This is a defect of ours" in str(await refused(api))


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200 \r\n\r\n{}"])
async def test_an_answer_that_is_none_is_an_error(answer: bytes, tmp_path: Path):
    """No answer, another protocol, a body of unknown length."""
    async with answering(tmp_path, answer, b"") as api:
        with pytest.raises(ApiError, match="PUT /machine-config"):
            async with asyncio.timeout(1):
                await api.send(SIZE)


async def test_no_answer_is_an_error_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The late answer is never taken for that to the next request."""
    monkeypatch.setattr(MachineConfig, "within_s", 0.1)
    double = Double(tmp_path / "bin")
    double.set({"on": "PUT /machine-config", "do": "sleep", "seconds": 0.3, "times": 1})
    async with connected(double, tmp_path / "g1") as api:
        assert "got no answer within 0 s" in str(await refused(api))
        await asyncio.sleep(0)
        assert (await api.get("/version"))["firecracker_version"] == "1.17.0"


async def test_a_process_that_dies_instead_of_answering_is_an_error_at_once(tmp_path: Path):
    """Nobody waits for the deadline."""
    double = Double(tmp_path / "bin")
    double.set({"on": "PUT /machine-config", "do": "die", "signal": 9})
    async with connected(double, tmp_path / "g1") as api, asyncio.timeout(3):
        assert "the process has ended" in str(await refused(api))


async def test_a_request_given_up_costs_the_connection(tmp_path: Path):
    """The next one has its own."""
    double = Double(tmp_path / "bin")
    double.set({"on": "PUT /machine-config", "do": "sleep", "seconds": 0.2, "times": 1})
    async with connected(double, tmp_path / "g1") as api:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await api.send(SIZE)
        assert (await api.get("/"))["state"] == "Not started"


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        ("unknown field `clock_realtime`", "install a newer one"),
        ("Invalid data version: 9.0.0", "built again"),
        ("An error occurred during bitcode serialization: bitcode error", "built again"),
        ("CRC64 validation failed", "built again"),
        ("IO Error: File too short to contain CRC", "built again"),
        ("Permission denied (os error 13)", "read the file"),
        ("No space left on device (os error 28)", "free some space"),
        ("Address in use (os error 98)", "remove the guest's directory"),
        ("Error creating KVM object: /dev/kvm", "access to /dev/kvm"),
    ],
)
async def test_what_is_known_of_a_fault_is_said_with_it(fault: str, advice: str, tmp_path: Path):
    """By a part of its words, since others depend on the C library."""
    async with answering(tmp_path, refusal(fault)) as api:
        error = await refused(api, CreateSnapshot(snapshot_path="state", mem_file_path="memory"))
        assert advice in str(error)
        assert error.fault == fault


# Releases.


@pytest.mark.parametrize(
    ("said", "release"),
    [
        ("Firecracker v1.16.1\n\n", (1, 16, 1)),
        ("Firecracker v1.17.0-dev\n\n2026-11-24T11:11:46.076 [x:main] Firecracker exiting successfully.", (1, 17, 0)),
        ("1.14.4", (1, 14, 4)),
    ],
)
def test_a_release_is_read_from_what_the_program_says(said: str, release: tuple[int, ...]):
    """A line of its log may follow."""
    assert Release.parse(said) == release


@pytest.mark.parametrize("said", ["", "Firecracker", "v1.2"])
def test_what_names_no_release_is_refused(said: str):
    """With what was said."""
    with pytest.raises(ValueError, match="names no release"):
        Release.parse(said)


@pytest.mark.parametrize(
    ("field", "first", "never"),
    [
        ("vsock_override", ["1.16.0", "1.17.0", "2.0.0"], ["1.15.9", "1.14.4"]),
        ("clock_realtime", ["1.14.4", "1.15.1", "1.16.0", "2.0.0"], ["1.14.3", "1.15.0", "1.13.9"]),
        ("huge_pages", ["1.17.0", "1.18.0"], ["1.16.2"]),
        ("resume_vm", ["1.14.0"], []),
    ],
)
def test_each_release_is_known_to_know_its_fields(field: str, first: list[str], never: list[str]):
    """Some were added to older lines too."""
    assert all(Release.parse(release).knows(field) for release in first)
    assert not any(Release.parse(release).knows(field) for release in never)


def test_a_broken_or_an_old_release_is_refused_by_name():
    """And what to install instead is said."""
    assert "Firecracker 1.16.0 is broken" in Release(1, 16, 0).objection()
    assert "Install 1.17.0" in Release(1, 16, 0).objection()
    assert "older than 1.14.0" in Release(1, 13, 9).objection()
    assert all(
        release.objection() is None for release in (OLDEST, Release(1, 16, 1), Release(1, 17, 0), Release(2, 0, 0))
    )
