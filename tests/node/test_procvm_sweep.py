"""What a daemon finds of an earlier one: it removes what is provably its own, and touches nobody else's."""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from node.procvm_rig import ProcessRig
from real_parts import needs
from substrate_node.procvm import Orphan
from substrate_node.procvm.record import Record, RunDirectory

pytestmark = needs("pidfd")


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, as a guest's is."""
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        yield process
        process.kill()


@pytest.fixture
def rig(tmp_path: Path) -> ProcessRig:
    return ProcessRig(tmp_path / "run")


def left_by(rig: ProcessRig, guest_id: str, process: subprocess.Popen[bytes]) -> RunDirectory:
    """The directory of a guest whose daemon was killed, and whose process somehow was not."""
    directory = RunDirectory(rig.run, guest_id)
    directory.make().close()
    directory.record(process.pid)
    return directory


def runs(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has not ended; it may not have been reaped."""
    pidfd = os.pidfd_open(process.pid)
    try:
        return not select.select([pidfd], [], [], 0)[0]
    finally:
        os.close(pidfd)


async def test_an_orphan_is_killed_and_its_directory_removed(rig: ProcessRig, sleeper: subprocess.Popen[bytes]):
    """And told, so that an operator hears of it."""
    left_by(rig, "g1", sleeper)
    assert await rig.vmm.sweep() == (Orphan("g1", sleeper.pid),)
    assert not runs(sleeper)
    assert await rig.vmm.sweep() == ()


async def test_a_process_that_only_has_the_orphans_number_lives(rig: ProcessRig, sleeper: subprocess.Popen[bytes]):
    """Numbers are given again; a start time is not."""
    directory = left_by(rig, "g1", sleeper)
    path = directory.path / "guest.json"
    record = msgspec.json.decode(path.read_bytes(), type=Record)
    path.write_bytes(msgspec.json.encode(Record(record.pid, record.start_ticks - 1, record.run)))
    assert await rig.vmm.sweep() == (Orphan("g1", None),)
    assert runs(sleeper)


async def test_a_record_that_was_copied_from_elsewhere_proves_nothing(
    rig: ProcessRig, tmp_path: Path, sleeper: subprocess.Popen[bytes]
):
    """Another daemon's guest is not ours to kill."""
    theirs = left_by(ProcessRig(tmp_path / "theirs"), "g1", sleeper)
    ours = RunDirectory(rig.run, "g1")
    ours.make().close()
    (ours.path / "guest.json").write_bytes((theirs.path / "guest.json").read_bytes())
    assert await rig.vmm.sweep() == (Orphan("g1", None),)
    assert runs(sleeper)


@pytest.mark.parametrize("record", [None, b"", b"{", b'{"pid": 1}', b'{"pid": 0, "start_ticks": 0, "run": ""}'])
async def test_a_directory_without_a_whole_record_is_removed(rig: ProcessRig, record: bytes | None):
    """A daemon may be killed at any moment of a boot."""
    directory = RunDirectory(rig.run, "g1")
    directory.make().close()
    if record is not None:
        (directory.path / "guest.json").write_bytes(record)
    assert await rig.vmm.sweep() == (Orphan("g1", None),)
    assert not rig.left()


async def test_what_is_no_guests_directory_stays(rig: ProcessRig, tmp_path: Path):
    """A file, a link: nothing that a daemon made."""
    (rig.run / "notes").write_text("x")
    (rig.run / "link").symlink_to(tmp_path)
    assert await rig.vmm.sweep() == ()
    assert {path.name for path in rig.run.iterdir()} == {"notes", "link"}


def test_the_state_of_a_guest_is_its_daemons_alone(rig: ProcessRig):
    """Nobody else may connect to it, or look."""
    directory = RunDirectory(rig.run, "g1")
    directory.make().close()
    assert directory.path.stat().st_mode & 0o777 == 0o700
    assert (directory.path / "v.sock").stat().st_mode & 0o777 == 0o600
