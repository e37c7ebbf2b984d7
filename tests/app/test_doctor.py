"""`fc-invoke doctor`: what an operator reads, what a program reads, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from app.test_command_line import run
from fc_invoke import doctor
from node.fcvm.rig import Double
from node.test_doctor import SOUND
from real_parts import needs
from substrate_node.doctor import diagnosed
from substrate_node.doctor.sight import Sight, Tried

NO_KVM = replace(SOUND, kvm=replace(SOUND.kvm, present=False))
NO_NAMESPACES = Tried(why_not="unshare: Operation not permitted")


@pytest.mark.parametrize(
    ("seen", "status"),
    [
        (SOUND, 0),
        (replace(NO_KVM, process_trial=NO_NAMESPACES), 1),
        (NO_KVM, 3),
        (replace(SOUND, process_trial=NO_NAMESPACES), 4),
    ],
)
def test_the_exit_status_says_which_guests_there_can_be(seen: Sight, status: int):
    """0 for both kinds; 2 is kept for what makes no sense."""
    assert doctor.STATUS[doctor.ready(diagnosed(seen))] == status


def test_a_cure_stands_below_what_it_cures_and_the_verdict_last():
    """In lines that a terminal holds; colours are for terminals only."""
    diagnosis = diagnosed(replace(NO_KVM, processor=replace(SOUND.processor, name="x" * 200)))
    told = list(doctor.lines(diagnosis, colourful=False))
    at = next(number for number, line in enumerate(told) if line.startswith("problem  kvm"))
    assert told[at + 1].strip().startswith("Cure: ")
    assert [" ".join(line.split()) for line in told[-2:]] == ["process guests: yes", "microVMs: no: see kvm"]
    assert not any("\x1b" in line for line in told)
    assert "\x1b[31mproblem" in "\n".join(doctor.lines(diagnosis, colourful=True))


def test_a_program_reads_the_same_findings():
    """Levels, cures, and what each of them stops."""
    data = json.loads(json.dumps(doctor.as_data(diagnosed(NO_KVM))))
    assert data["ready"] == {"process": True, "microvm": False}
    (kvm,) = [finding for finding in data["findings"] if finding["check"] == "kvm"]
    assert (kvm["level"], kvm["stops"], bool(kvm["cure"])) == ("problem", ["microvm"], True)


@needs("user-namespaces")
def test_the_command_looks_with_the_settings_that_serve_reads(tmp_path: Path):
    """The double has the place of Firecracker; its kernel is none."""
    double = Double(tmp_path / "bin")
    rules = double.rules()
    settings = {
        "FC_INVOKE_FIRECRACKER_BIN": str(rules.firecracker),
        "FC_INVOKE_KERNEL_IMAGE": str(rules.kernel),
        "FC_INVOKE_STATE_ROOT": str(tmp_path / "state"),
        "FC_INVOKE_MEMORY_MIB": "300",
    }
    done = run("fc_invoke", "doctor", "--json", cwd=tmp_path, **settings)
    found = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert done.returncode == 3, done.stderr
    assert found["firecracker"]["says"] == "release 1.17.0, snapshots of format v12.0.0"
    assert found["kernel"]["level"] == "problem"
    assert found["memory"]["says"].startswith("300 MiB")
    assert not (tmp_path / "state").exists()
    told = run("fc_invoke", "doctor", cwd=tmp_path, **settings)
    assert told.stdout.splitlines()[-1].startswith("microVMs:                 no: see ")


def test_settings_that_serve_would_refuse_are_refused_alike(tmp_path: Path):
    """All of them at once, and status 2."""
    done = run("fc_invoke", "doctor", cwd=tmp_path, FC_INVOKE_JAILER="perhaps", FC_INVOKE_FIRECRAKER_BIN="x")
    assert done.returncode == 2
    assert "FC_INVOKE_JAILER" in done.stderr
    assert "FC_INVOKE_FIRECRAKER_BIN" in done.stderr
