"""`fc-invoke verify-clones`: what it finds, what it says of it, and that nothing is left."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from fc_invoke.main import main
from real_parts import needs
from substrate_node import host
from substrate_node.clones import FACTS, ClonesReport
from substrate_node.node import NodeTimes

CANNOT = 2
pytestmark = needs("user-namespaces", "pidfd")


@pytest.fixture
def verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run the command on a table of one workload, `w`, with a file `w.py`: its status, and what it printed."""

    def run(source: str, *arguments: str, **members: object) -> tuple[int, str, str]:
        home = tmp_path / "home"
        home.mkdir()
        (home / "w.py").write_text(source)
        for directory in (home, tmp_path, tmp_path.parent, tmp_path.parent.parent):
            directory.chmod(directory.stat().st_mode | 0o055)
        command = ["python", "-m", "substrate_guest", "serve", "w:app"]
        table = {"w": {"command": command, "path": str(home), "memMib": 64, "warmBase": True} | members}
        monkeypatch.setenv("FC_INVOKE_WORKLOADS", json.dumps(table))
        monkeypatch.setenv("FC_INVOKE_STATE_ROOT", str(tmp_path / "state" / "fc-invoke"))
        with pytest.raises(SystemExit) as ended:
            main(["verify-clones", *(arguments or ("w", "--clones", "5"))])
        assert list((tmp_path / "state").glob("*")) == [], "nothing is left"
        return (int(ended.value.code or 0), *capfd.readouterr())

    return run


APP = "from substrate_guest import App\napp = App(lambda request: '')\n"
PRIMED = f"{APP}@app.prime\ndef prime():\n    "


@pytest.mark.parametrize("warm", [True, False])
def test_clones_of_a_process_are_guests_of_their_own(verify, warm: bool):
    """Whether or not the table wants warm starts of it."""
    status, out, err = verify(PRIMED + "import random, uuid, ssl; random.seed(1); uuid.uuid1()", warmBase=warm)
    assert (status, err) == (0, "")
    assert out.startswith("5 clones of w\n")
    assert out.count("all 5 differ") == len(FACTS)
    assert "yes  wall clock" in out


def test_a_host_that_restores_slowly_is_given_the_time(verify, monkeypatch: pytest.MonkeyPatch):
    """As long as a start from nothing: how fast they are is not the question."""
    monkeypatch.setattr(host, "NodeTimes", partial(NodeTimes, restore_within_s=0.0))
    status, out, err = verify(PRIMED + "pass")
    assert (status, err) == (0, "")
    assert out.startswith("5 clones of w\n")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (PRIMED + "1 / 0", "division by zero"),
        (
            PRIMED + "import threading, time; threading.Thread(target=time.sleep, args=(99,), name='poller').start()",
            "poller",
        ),
        ("nonsense", "name 'nonsense' is not defined"),
    ],
)
def test_what_has_no_clones_is_told_and_why(verify, source: str, says: str):
    """At once, although a daemon would go on trying."""
    status, out, err = verify(source)
    assert (status, out) == (CANNOT, "")
    assert says in err
    assert "no clone of 'w' can be asked" in err


def test_what_nobody_can_clone_is_told(verify):
    """A program that is not served by our shim."""
    status, _, err = verify(APP, command=["python", "w.py"])
    assert status == CANNOT
    assert "there is no warm start" in err


def test_a_workload_that_is_not_in_the_table_is_told_with_those_that_are(verify):
    status, _, err = verify(APP, "v")
    assert status == CANNOT
    assert "there is no workload 'v'; the table has w" in err


def test_one_clone_is_nothing_to_compare(verify, tmp_path: Path):
    (tmp_path / "state").mkdir()
    status, _, err = verify(APP, "w", "--clones", "1")
    assert status == CANNOT
    assert "found '1'; accepted are numbers from 2 on" in err


def test_the_report_says_what_is_not_well():
    """What several have in common, what no clone has, and a clock that is off."""
    shared = {**dict.fromkeys(FACTS, 0), "hostname": 3, "machine_id": None}
    report = ClonesReport(clones=4, shared=shared, clock_ms=12.3, clock_ms_max=10.0)
    assert not report.good
    lines = [" ".join(line.split()) for line in str(report).splitlines()]
    assert "NO host name 3 of 4 have one that another has too" in lines
    assert "yes /etc/machine-id no clone has one" in lines
    assert "NO wall clock at most 12.3 ms from the host's; 10 ms are accepted" in lines
    assert ClonesReport(clones=4, shared=dict.fromkeys(FACTS, 0), clock_ms=9.9, clock_ms_max=10.0).good
