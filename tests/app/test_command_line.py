"""What people type, and what they are told when it is wrong: words and an exit status, never a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

UPSTREAM = Path(__file__).parents[1] / "cluster" / "data" / "upstream-table.json"


def run(module, *arguments, cwd, **environment):
    """Run a command of ours in an environment with nothing but `environment`."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={"PATH": os.environ["PATH"], "HOME": str(cwd), **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_the_go_projects_own_table_passes_the_check(tmp_path):
    """Its fields and defaults mean what they meant there."""
    done = run("fc_invoke", "check", str(UPSTREAM), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("semgrep", "agent", "sandbox"))


def test_a_bad_table_lists_everything_that_is_wrong(tmp_path):
    """With the place, what was found and what is accepted."""
    table = tmp_path / "t.yaml"
    table.write_text("a:\n  comand: [x]\n  memMib: much\nb:\n  requestTimeout: 90\n")
    done = run("fc_invoke", "check", str(table), cwd=tmp_path)
    assert done.returncode == 1
    assert all(place in done.stderr for place in ("a.comand", "command", "a.memMib", "b.requestTimeout"))


def test_only_check_host_looks_at_the_host(tmp_path):
    """The plain check can run anywhere."""
    assert run("fc_invoke", "check", str(UPSTREAM), cwd=tmp_path).returncode == 0
    done = run("fc_invoke", "check", "--host", str(UPSTREAM), cwd=tmp_path)
    assert done.returncode == 1
    assert "semgrep.rootfsPath" in done.stderr


def test_a_rootfs_without_firecracker_ends_the_start_naming_the_cure(tmp_path):
    """Isolation is never downgraded in silence."""
    settings = {
        "FC_INVOKE_WORKLOADS": json.dumps({"scan": {"rootfsPath": "/images/scan.ext4"}}),
        "FC_INVOKE_FIRECRACKER_BIN": "/nowhere/firecracker",
    }
    done = run("fc_invoke", "serve", cwd=tmp_path, FC_INVOKE_STATE_ROOT=str(tmp_path / "s"), **settings)
    assert done.returncode == 2
    assert "'scan'" in done.stderr
    assert "Firecracker" in done.stderr
    assert "/dev/kvm" in done.stderr


@pytest.mark.parametrize(
    ("module", "prefix"),
    [("fc_invoke", "FC_INVOKE_"), ("cluster_agent", "CLUSTER_AGENT_"), ("node_daemon", "NODE_DAEMON_")],
)
def test_all_settings_that_are_wrong_are_told_at_once(module, prefix, tmp_path):
    """One start, one list, with what is accepted."""
    wrong = {f"{prefix}LISTEN_ADDR": "nowhere", f"{prefix}BODY_LIMIT": "much", f"{prefix}LISEN_ADDR": "x"}
    done = run(module, cwd=tmp_path, **wrong)
    assert done.returncode == 2
    assert all(name in done.stderr for name in wrong)


@pytest.mark.parametrize(
    ("module", "settings", "cure"),
    [
        ("fc_invoke", {"FC_INVOKE_LISTEN_ADDR": "0.0.0.0:0"}, "FC_INVOKE_TOKENS_FILE"),
        ("fc_invoke", {"FC_INVOKE_ADMIN_LISTEN_ADDR": "0.0.0.0:0"}, "FC_INVOKE_ADMIN_TOKEN_FILE"),
        ("fc_invoke", {"FC_INVOKE_ALLOWED_CALLERS": "x"}, "FC_INVOKE_TOKENS_FILE"),
        ("node_daemon", {"NODE_DAEMON_LISTEN_ADDR": "0.0.0.0:0"}, "NODE_DAEMON_TLS_CERT_FILE"),
        ("cluster_agent", {"CLUSTER_AGENT_NODES": "a=http://10.0.0.1:1"}, "CLUSTER_AGENT_INSECURE_WIRE"),
        ("cluster_agent", {"CLUSTER_AGENT_NODES": "a=https://10.0.0.1:1"}, "CLUSTER_AGENT_TLS_CERT_FILE"),
        ("cluster_agent", {}, "CLUSTER_AGENT_NODES"),
    ],
)
def test_what_would_be_open_to_strangers_is_refused_with_the_cure(module, settings, cure, tmp_path):
    """Unauthenticated and half-configured modes do not start."""
    prefix = module.upper() + "_"
    table = {f"{prefix}WORKLOADS": json.dumps({"echo": {"command": ["x"]}})} if module == "cluster_agent" else {}
    root = {f"{prefix}STATE_ROOT": str(tmp_path / "s")} if module != "cluster_agent" else {}
    done = run(module, cwd=tmp_path, **table, **root, **settings)
    assert done.returncode == 2
    assert cure in done.stderr


def test_more_workers_than_one_are_refused(tmp_path):
    """A node has one queue and one ledger."""
    done = run("fc_invoke", "serve", "--workers=2", cwd=tmp_path)
    assert (done.returncode, "--workers" in done.stderr) == (2, True)


@pytest.mark.parametrize("module", ["fc_invoke", "cluster_agent", "node_daemon"])
def test_help_and_version_answer_without_any_setting(module, tmp_path):
    """Also where the daemon itself could not start."""
    assert run(module, "--help", cwd=tmp_path).returncode == 0
    assert "0.1.0" in run(module, "--version", cwd=tmp_path).stdout


def test_a_daemon_starts_without_what_only_other_commands_need(tmp_path):
    """What it loads it keeps: time of each start, and memory for as long as it runs."""
    look = "import sys, fc_invoke.main, fc_invoke.serving\nfc_invoke.main.parser()\nassert 'httpx' not in sys.modules"
    subprocess.run([sys.executable, "-c", look], cwd=tmp_path, timeout=60, check=True)


@pytest.mark.parametrize("command", [["invoke", "echo"], ["explain", "0" * 32], ["audit", "--calls=1"]])
def test_a_daemon_that_cannot_be_reached_is_told_with_its_address(command, tmp_path):
    """Status 1 and one line."""
    done = run("fc_invoke", *command, "--url=http://127.0.0.1:1", "--admin-url=http://127.0.0.1:1", cwd=tmp_path)
    assert done.returncode == 1
    assert "http://127.0.0.1:1" in done.stderr
    assert len(done.stderr.splitlines()) == 1
