"""The launcher of a process guest, spoken to as the node does."""

from __future__ import annotations

import marshal
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from real_parts import needs
from substrate_guest import isolation

pytestmark = needs("pidfd")

WITHIN_S = 20
GENTLE = ["no-new-privileges", "resource-limits", "dies-with-daemon"]
"""Measures that every host allows."""


class Launched:
    """A launcher that was given a plan; `hear` and `say` speak to it, `console` is what it wrote."""

    def __init__(self, directory: Path, **members: object) -> None:
        self.console_path = directory / "console"
        self.reports, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.reports.settimeout(WITHIN_S)
        listener, dialler = socket.socketpair()
        plan = {
            "argv": ["true"],
            "env": {"PATH": "/usr/bin:/bin"},
            "cwd": None,
            "hostname": "guest",
            "boot_id": "5a1c0f6e-0000-4000-8000-000000000001",
            "measures": GENTLE,
            "user": 65_534,
            "visible": [],
            "base": str(directory),
            "writable_mib": 16,
            "zygote": False,
        }
        with theirs, listener, dialler, tempfile.TemporaryFile() as file, self.console_path.open("wb") as console:
            file.write(marshal.dumps({**plan, **members}))
            file.seek(0)
            descriptors = [file.fileno(), console.fileno(), console.fileno(), listener.fileno(), dialler.fileno()]
            lifted = [os.dup(fd) for fd in [*descriptors, theirs.fileno()]]
            high = [os.dup2(fd, 100 + number) for number, fd in enumerate(lifted)]
            actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(high)]
            argv = isolation.argv(sys.executable)
            self.pid = os.posix_spawn(argv[0], argv, {}, file_actions=actions, setpgroup=0)
            for fd in [*lifted, *high]:
                os.close(fd)

    def hear(self) -> list[str]:
        """The fields of the next message but `pid`, without pids and memory, or none when nobody is left."""
        fields = ["pid"]
        while fields[0] == "pid":
            fields = self.reports.recv(65_536).decode().split("\t")
        if fields == [""]:
            return []
        return fields[: {"up": 1, "ended": 2}.get(fields[0])]

    def hear_all(self) -> list[list[str]]:
        """All messages to the end."""
        return list(iter(self.hear, []))

    def end(self) -> None:
        """Let it see that the node is gone, and reap what it left."""
        self.reports.close()
        with suppress(ChildProcessError):
            while True:
                os.waitpid(-self.pid, 0)

    @property
    def console(self) -> str:
        return self.console_path.read_text()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[type]:
    """Launch with some members of the plan; in the end everything launched has ended by itself."""
    launched: list[Launched] = []

    def begin(**members: object) -> Launched:
        launched.append(Launched(tmp_path, **members))
        return launched[-1]

    yield begin
    for one in launched:
        one.end()


def test_a_command_runs_after_the_node_said_go(launch):
    """Isolated, go, up, ended: in this order, with the wait status of the command."""
    guest = launch(argv=["sh", "-c", "echo $HOME $PATH; exit 3"])
    kind, *_ = guest.hear()
    assert kind == "isolated"
    guest.reports.send(b"go")
    assert guest.hear_all() == [["up"], ["ended", str(3 << 8)]]
    assert guest.console == "/tmp /usr/bin:/bin\n"


def test_a_command_does_not_run_when_the_node_is_gone(launch):
    """A daemon that died during a boot must not leave a guest that begins to work."""
    guest = launch(argv=["sh", "-c", "echo ran"])
    guest.hear()
    guest.end()
    assert guest.console == ""


def test_the_first_process_reaps_orphans_and_ends_with_the_command(launch):
    """What the command left behind does not keep the guest alive, nor become a zombie in it."""
    script = (
        "import os, time\nif os.fork() == 0:\n  if os.fork(): os._exit(0)\n  time.sleep(0.1); os._exit(0)\nos.wait()"
    )
    guest = launch(argv=[sys.executable, "-c", script])
    guest.hear()
    guest.reports.send(b"go")
    assert guest.hear_all() == [["up"], ["ended", "0"]]


@needs("user-namespaces")
def test_a_required_measure_that_fails_ends_the_launch_with_its_reason(launch):
    """Nothing is run with less than was asked for."""
    measures = [*GENTLE, "user-namespace", "mount-namespace", "private-files"]
    guest = launch(measures=measures, base="/nowhere/at-all", argv=["sh", "-c", "echo ran"])
    assert guest.hear_all() == [["failed", "private-files", "mount root as /nowhere/at-all: No such file or directory"]]
    assert guest.console == ""


def test_a_required_measure_that_rests_on_another_one_is_not_forgotten(launch):
    """A private /proc without processes of its own would be the host's."""
    guest = launch(measures=[*GENTLE, "own-proc"])
    assert guest.hear_all() == [["failed", "own-proc", "what it rests on is missing"]]


def test_without_required_measures_each_one_is_tried_and_told(launch):
    """That is how the node finds out what the host allows."""
    guest = launch(measures=None)
    kind, *told = guest.hear()
    assert kind == "isolated"
    names = {line.split("\n")[-1] for line in told}
    assert {"no-new-privileges", "resource-limits", "dies-with-daemon", "user-namespace"} <= names


def test_a_broken_plan_ends_the_launch_and_says_so_on_the_console(launch):
    """A defect of ours must not look like one of the workload's."""
    guest = launch(env={"PATH": "/usr/bin", "NUL": "a\0b"})
    guest.hear()
    guest.reports.send(b"go")
    assert guest.hear_all() == []
    assert "embedded null" in guest.console


@needs("user-namespaces")
def test_links_on_the_way_to_what_is_shown_are_shown_too(launch, tmp_path: Path):
    """A path that leads over links works inside as it does outside; its neighbours stay unseen."""
    place = tmp_path / "place"
    (place / "real" / "deep").mkdir(parents=True)
    (place / "real" / "deep" / "file").write_text("found\n")
    (place / "secret").write_text("x")
    (place / "absolute").symlink_to(place / "real")
    (place / "relative").symlink_to("absolute/deep")
    tmp_path.chmod(0o755)
    script = f"cat {place}/relative/file; ls {place}"
    measures = [*GENTLE, "user-namespace", "pid-namespace", "mount-namespace", "private-files", "own-proc"]
    base = tmp_path / "base"
    base.mkdir()
    guest = launch(measures=measures, visible=[f"{place}/relative"], base=str(base), argv=["sh", "-c", script])
    assert guest.hear()[0] == "isolated"
    guest.reports.send(b"go")
    assert guest.hear_all() == [["up"], ["ended", "0"]]
    assert guest.console.split() == ["found", "absolute", "real", "relative"]


def test_the_launcher_imports_little():
    """Every cold start waits for it."""
    slow = {
        "json",
        "re",
        "enum",
        "typing",
        "socket",
        "pathlib",
        "subprocess",
        "dataclasses",
        "signal",
        "contextlib",
        "asyncio",
    }
    argv = isolation.argv(sys.executable)
    program = argv[-1].replace("isolation.main()", "print(*sys.modules)")
    loaded = subprocess.run([*argv[:-1], program], capture_output=True, text=True, timeout=WITHIN_S, check=True)
    assert "substrate_guest.isolation" in loaded.stdout.split()
    assert not slow & set(loaded.stdout.split())
