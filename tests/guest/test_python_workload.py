"""Running a snippet: 200 whenever it ran, whatever became of it."""

import json
import os
import select
import signal
import stat
from base64 import b64decode, b64encode
from contextlib import suppress

import pytest

from guest.host import PATIENCE_S, request_bytes
from substrate_guest.identity import CA_VARIABLES
from substrate_guest.workloads import results
from substrate_guest.workloads.python import STDERR_BYTES_MAX, STDOUT_BYTES_MAX, app
from substrate_guest.workloads.results import Results


@pytest.fixture
def run(ask_of, tmp_path, monkeypatch):
    """Run code in this process's workload; what came of it, after seeing that nothing is left of it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    previous = signal.getsignal(signal.SIGTERM)

    async def ran(code, files=None, **members):
        members["files"] = [
            {"path": path, "content_b64": b64encode(content).decode()} for path, content in (files or {}).items()
        ]
        async with ask_of(app) as ask:
            reply = await ask(body=json.dumps({"code": code} | members).encode())
        assert reply.status == 200
        assert list(tmp_path.glob("snippet-*")) == []
        came = reply.json()
        assert list(came) == ["stdout", "stderr", "exit_code", "files", "duration_ms", "truncated", "error"]
        came["files"] = {file["path"]: b64decode(file["content_b64"]) for file in came["files"]}
        return came

    yield ran
    signal.signal(signal.SIGTERM, previous)


def dies(pid):
    """Whether process `pid` is dead, or is within the patience of a test; a kill takes a moment to arrive."""
    try:
        process = os.pidfd_open(int(pid))
    except ProcessLookupError:
        return True
    ended, _, _ = select.select([process], [], [], PATIENCE_S)
    os.close(process)
    return bool(ended)


async def test_output_and_exit_code_come_back(run):
    came = await run("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert (came["stdout"], came["stderr"], came["exit_code"]) == ("out\n", "err\n", 3)
    assert (came["files"], came["truncated"], came["error"]) == ({}, False, None)
    assert came["duration_ms"] > 0


async def test_a_traceback_names_the_lines_of_the_snippet(run):
    came = await run("def f():\n    return 1 / 0\nf()")
    assert came["exit_code"] == 1
    assert "return 1 / 0" in came["stderr"]
    assert 'snippet.py", line 2, in f' in came["stderr"]


async def test_files_are_there_to_be_read_and_imported(run):
    files = {"data/in.bin": b"\x00\xff", "helper.py": b"def double(x): return 2 * x"}
    came = await run("import helper; print(helper.double(4), open('data/in.bin', 'rb').read())", files)
    assert came["stdout"] == "8 b'\\x00\\xff'\n"
    assert came["files"] == {}


async def test_changed_and_new_files_come_back_and_untouched_ones_do_not(run):
    code = "import pathlib as p; p.Path('new/deep').mkdir(parents=True); p.Path('new/deep/a').write_text('n')\n"
    code += "p.Path('changed').write_text('after'); p.Path('same').write_text('same'); p.Path('gone').unlink()"
    came = await run(code, {"changed": b"before", "same": b"same", "gone": b"", "untouched": b"x"})
    assert came["files"] == {"changed": b"after", "new/deep/a": b"n"}
    assert not came["truncated"]


async def test_a_snippet_stands_alone(run, monkeypatch):
    """It finds a minimal environment, no input, no descriptors of ours and its own directory."""
    monkeypatch.setenv("SUBSTRATE_AUDIT", "1")
    monkeypatch.setenv("SECRET", "ours")
    for variable in CA_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", "/ca.pem")
    code = (
        "import os, sys, json; print(json.dumps([dict(os.environ), sys.stdin.read(), os.listdir('/proc/self/fd')]))\n"
    )
    code += "assert os.listdir() == [] and os.path.samefile(os.environ['PYTHONPATH'], '.')"
    came = await run(code)
    environ, given, descriptors = json.loads(came["stdout"])
    assert came["exit_code"] == 0
    assert environ.keys() <= {
        *("PATH", "HOME", "TMPDIR", "LANG", "SSL_CERT_FILE", "LC_CTYPE"),
        *("PYTHONPATH", "PYTHONUTF8", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"),
    }
    assert environ["SSL_CERT_FILE"] == "/ca.pem"
    assert given == ""
    assert descriptors == ["0", "1", "2", "3"]  # the fourth lists the directory


async def test_home_and_temporary_files_are_not_results(run):
    code = "import os, tempfile; open(os.path.expanduser('~/.cache'), 'w').close(); tempfile.mkstemp()"
    came = await run(code)
    assert (came["exit_code"], came["files"]) == (0, {})


async def test_a_timeout_kills_the_whole_group_and_keeps_what_was_printed(run):
    code = "import subprocess, time, os; p = subprocess.Popen(['sleep', '600'])\n"
    code += "print(os.getpid(), p.pid); time.sleep(600)"
    came = await run(code, timeout_seconds=0.5)
    assert came["exit_code"] is None
    assert came["error"] == "the snippet was killed after 0.5 s (timeout_seconds)"
    assert 400 < came["duration_ms"] < 10_000
    pids = came["stdout"].split()
    assert len(pids) == 2
    assert all(map(dies, pids))


async def test_what_a_snippet_leaves_running_dies_with_it(run):
    came = await run("import subprocess; print(subprocess.Popen(['sleep', '600']).pid)")
    assert came["exit_code"] == 0
    assert dies(came["stdout"])


async def test_a_process_that_escapes_does_not_hold_the_reply_up(run):
    """It left the group and keeps the pipe open, and writes to it for ever."""
    code = "import subprocess, sys; print(subprocess.Popen(['yes'], start_new_session=True).pid, file=sys.stderr)"
    came = await run(code, timeout_seconds=10)
    with suppress(ProcessLookupError):
        os.kill(int(came["stderr"]), signal.SIGKILL)
    assert came["exit_code"] == 0
    assert came["duration_ms"] < 9000


async def test_a_snippet_ended_by_a_signal_says_which(run):
    came = await run("import os; os.kill(os.getpid(), 11)")
    assert came["exit_code"] == -11
    assert came["error"] == "the snippet was ended by signal 11: Segmentation fault"


async def test_output_is_read_without_deadlock_and_cut_at_its_bound(run):
    """Both pipes fill up by turns, far beyond what is kept."""
    code = "import sys\nfor _ in range(40):\n    print('o' * 65535); print('e' * 65535, file=sys.stderr)"
    came = await run(code)
    assert came["exit_code"] == 0
    assert (len(came["stdout"]), len(came["stderr"])) == (STDOUT_BYTES_MAX, STDERR_BYTES_MAX)
    assert came["truncated"]


async def test_output_exactly_at_its_bound_is_not_called_truncated(run):
    came = await run(f"import sys; sys.stdout.write('x' * {STDOUT_BYTES_MAX})")
    assert (len(came["stdout"]), came["truncated"]) == (STDOUT_BYTES_MAX, False)


async def test_output_that_is_not_text_is_replaced(run):
    assert (await run("import os; os.write(1, b'a\\xffb')"))["stdout"] == "a\ufffdb"


async def test_files_beyond_their_bounds_are_left_out_and_said_to_be(run):
    came = await run("open('big', 'wb').write(bytes(2 * 1024 * 1024 + 1)); open('small', 'w').close()")
    assert (came["files"], came["truncated"]) == ({"small": b""}, True)
    came = await run("for n in 'abc': open(n, 'wb').write(bytes(2 * 1024 * 1024))")
    assert (sorted(came["files"]), came["truncated"]) == (["a", "b"], True)


async def test_links_and_special_files_are_never_followed(run):
    code = "import os, socket\nos.symlink('/etc/passwd', 'link'); os.symlink('/etc', 'dir'); os.mkfifo('pipe')\n"
    code += "socket.socket(socket.AF_UNIX).bind('socket'); os.symlink('loop', 'loop')"
    came = await run(code)
    assert (came["stderr"], came["exit_code"], came["files"]) == ("", 0, {})


async def test_a_directory_nested_without_end_is_neither_collected_nor_left_behind(run):
    """Deeper than Python recurses, and than a path can name."""
    came = await run("import os\nfor _ in range(1100):\n    os.mkdir('deeper'); os.chdir('deeper')")
    assert (came["exit_code"], came["files"], came["truncated"]) == (0, {}, True)


async def test_what_a_snippet_locks_away_is_removed_all_the_same(run):
    """Read-only directories, links to elsewhere and files put beside the working directory."""
    code = "import os; os.makedirs('a/b'); os.symlink('/', 'a/b/root'); os.chmod('a/b', 0); os.chmod('a', 0o500)\n"
    came = await run(code + "open('../beside', 'w').close()")
    assert came["exit_code"] == 0


@pytest.mark.parametrize(
    ("body", "paths"),
    [(b"nonsense", ["body"]), (b"{}", ["code"]), (b'{"code": 1, "files": 2, "timeout_seconds": 0}', None)],
)
async def test_malformed_input_is_a_400_with_every_problem(ask_of, body, paths):
    async with ask_of(app) as ask:
        reply = await ask(body=body)
    assert (reply.status, reply.headers["content-type"]) == (400, "application/json")
    problems = reply.json()["problems"]
    assert [problem["path"] for problem in problems] == (paths or ["code", "timeout_seconds", "files"])
    assert all(problem.keys() == {"path", "found", "accepted"} for problem in problems)


def test_results_are_bounded_in_entries(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ENTRIES_MAX", 5)
    for name in "abcdef":
        (tmp_path / name).touch()
    found = Results()
    found.collect(tmp_path, {})
    assert (found.files, found.truncated) == ({}, True)


def test_a_name_that_becomes_a_link_is_not_followed(tmp_path):
    """Even when it was a file a moment ago."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "link").symlink_to("secret")
    directory = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(OSError, match="symbolic links"):
        results._content(directory, "link")
    os.mkfifo(tmp_path / "pipe")
    assert results._content(directory, "pipe") is None
    os.close(directory)


def test_sigterm_takes_the_snippet_along(start):
    guest = start("substrate_guest.workloads.python:app")
    guest.restored()
    pids = guest.path.parent / "pids"
    os.mkfifo(pids)
    code = f"import os, time; open({str(pids)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    with guest.connection() as sock:
        sock.sendall(request_bytes(body=json.dumps({"code": code}).encode()))
        pid = pids.read_text()
        guest.process.send_signal(signal.SIGTERM)
        assert guest.ended()[0] == 128 + signal.SIGTERM
    assert dies(pid)


def test_the_workload_is_served_like_any_other(start):
    guest = start("substrate_guest.workloads.python:app")
    guest.restored()
    reply = guest.ask(body=b"{\"code\": \"open('x', 'w').write(str(6 * 7))\"}")
    assert reply.json()["files"] == [{"path": "x", "content_b64": "NDI="}]
    assert stat.S_ISSOCK(guest.path.stat().st_mode)
