"""One daemon at a time owns a state root, and nobody else can look into it."""

import os
import subprocess
import sys

import pytest

from real_parts import needs
from substrate_node.state import StateRootUnusable, default_state_root, locked_state_root


def test_a_state_root_is_made_locked_and_closed_to_others(tmp_path):
    """Its parts are there, its mode is 0700, and it says which start of the daemon it serves."""
    with locked_state_root(tmp_path / "state", boot_id="b1", setting="ROOT") as root:
        assert root.path.stat().st_mode & 0o777 == 0o700
        assert (root.path / "boot-id").read_text() == "b1\n"
        assert all(part.is_dir() for part in (root.run, root.bases, root.images))


def test_a_second_daemon_is_refused_with_the_pid_of_the_first(tmp_path):
    """Two daemons on one root would sweep each other's guests."""
    with (
        locked_state_root(tmp_path / "s", boot_id="b", setting="ROOT"),
        pytest.raises(StateRootUnusable, match=rf"ROOT: another daemon \(pid {os.getpid()}\)"),
        locked_state_root(tmp_path / "s", boot_id="c", setting="ROOT"),
    ):
        pass


def test_a_killed_daemon_holds_no_lock(tmp_path):
    """The lock is the kernel's, so it ends with its holder however that ends."""
    code = (
        "import os, pathlib, signal, sys\n"
        "from substrate_node.state import locked_state_root\n"
        "with locked_state_root(pathlib.Path(sys.argv[1]), boot_id='b', setting='ROOT'):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], check=False, timeout=30)
    assert done.returncode == -9
    with locked_state_root(tmp_path / "s", boot_id="c", setting="ROOT") as root:
        assert root.boot_id == "c"


def test_a_directory_that_others_can_read_is_refused_with_the_cure(tmp_path):
    """What lies in it is for the daemon alone."""
    (tmp_path / "open").mkdir(mode=0o755)
    with (
        pytest.raises(StateRootUnusable, match="chmod 700"),
        locked_state_root(tmp_path / "open", boot_id="b", setting="ROOT"),
    ):
        pass


def test_a_file_in_the_way_is_an_error_in_words(tmp_path):
    """Not a traceback."""
    (tmp_path / "file").touch()
    with (
        pytest.raises(StateRootUnusable, match=r"ROOT: .*Choose another"),
        locked_state_root(tmp_path / "file", boot_id="b", setting="ROOT"),
    ):
        pass


def test_each_daemon_has_its_own_usual_place(monkeypatch):
    """Root's is the system's, an ordinary user's their own."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert str(default_state_root("d", {"HOME": "/root"})) == "/var/lib/d"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert str(default_state_root("d", {"HOME": "/home/u"})) == "/home/u/.local/state/d"
    assert str(default_state_root("d", {"XDG_STATE_HOME": "/x", "HOME": "/home/u"})) == "/x/d"


@needs("root")
def test_a_full_disk_is_an_error_in_words(tmp_path):
    """Not a traceback, and the lock is not kept."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=3", "full", tmp_path], check=True)
    try:
        with (
            pytest.raises(StateRootUnusable, match=r"ROOT: .*No space left"),
            locked_state_root(tmp_path / "s", boot_id="b", setting="ROOT"),
        ):
            pass
    finally:
        subprocess.run(["umount", tmp_path], check=True)
