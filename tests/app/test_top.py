"""`fc-invoke top` draws what a daemon is at, on a terminal of any size or into a pipe, and says where there is none."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from datetime import UTC
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import pytest

from browser.scene import FAILED, Scene
from fc_invoke.drawing import drawn

TROUBLE = Scene(trouble=True).snapshot()
PATIENCE_S = 30.0


@pytest.fixture
def daemon():
    """Something that answers as an admin listener whose operators have a token; `silent` ends that."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.headers.get("authorization") == "Bearer good"
            body = msgspec.json.encode(TROUBLE) if known and self.path == "/v1/live" else b"no"
            self.send_response(503 if silent.is_set() else 200 if known else 401)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    silent = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", silent
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def token(tmp_path):
    (tmp_path / "token").write_text("good\n")
    return str(tmp_path / "token")


def command(*arguments):
    return [sys.executable, "-m", "fc_invoke", "top", *arguments]


def run(*arguments):
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_one_snapshot_is_printed_plain_for_whoever_reads_a_pipe(daemon, token):
    url, _ = daemon
    done = run("--once", "--admin", url, "--admin-token-file", token)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert FAILED in done.stdout
    assert all(word in done.stdout for word in ("thumbnail", "queue-timeout", "node-3", "not heard", "p50"))


def test_a_pipe_gets_one_snapshot_after_another(daemon, token):
    """Until whoever reads has seen enough."""
    url, _ = daemon
    arguments = command("--admin", url, "--admin-token-file", token, "--every", "0.1")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        heads = 0
        for line in child.stdout:
            heads += line.startswith(b"cluster-agent")
            if heads == 3:
                break
        child.stdout.close()
        assert child.wait(PATIENCE_S) == 1
        assert child.stderr.read() == b""


def test_no_daemon_is_one_line_with_its_address_and_what_to_do():
    done = run("--once", "--admin", "http://127.0.0.1:1")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "http://127.0.0.1:1" in done.stderr
    assert "--admin" in done.stderr


def test_a_daemon_that_wants_a_token_says_so(daemon):
    url, _ = daemon
    done = run("--once", "--admin", url)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "--admin-token-file" in done.stderr


class Terminal:
    """A terminal with `top` on it."""

    def __init__(self, master, child):
        self.master, self.child = master, child
        self.shown = b""

    def until(self, condition):
        """Read what is drawn until a condition on everything since the last call holds."""
        seen, ends_s = b"", time.monotonic() + PATIENCE_S
        while not condition(seen):
            assert time.monotonic() < ends_s, seen
            if select.select([self.master], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # the other end is closed: the child has ended
                    seen += os.read(self.master, 65536)
        self.shown += seen
        return seen

    def resize(self, columns, lines):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


@pytest.fixture
def terminal(daemon, token):
    url, _ = daemon
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    before = termios.tcgetattr(slave)
    env = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES"}}
    arguments = command("--admin", url, "--admin-token-file", token, "--every", "0.2")
    # A terminal tells of its size whoever it controls.
    child = subprocess.Popen(["setsid", "--ctty", *arguments], stdin=slave, stdout=slave, stderr=slave, env=env)
    try:
        yield Terminal(master, child)
        assert termios.tcgetattr(slave) == before, "the terminal is not as it was"
    finally:
        child.kill()
        child.wait()
        os.close(master)
        os.close(slave)


def test_a_terminal_is_redrawn_and_left_as_it_was(terminal):
    """On its other screen, in colour, until `q`."""
    first = terminal.until(lambda seen: b"q quits" in seen)
    assert first.startswith(b"\x1b[?1049h")
    assert b"\x1b[31m" in first
    terminal.until(lambda seen: seen.count(b"q quits") >= 2)
    os.write(terminal.master, b"q")
    terminal.until(lambda seen: b"\x1b[?1049l" in seen)
    assert terminal.child.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_whoever_ends_it_finds_the_terminal_as_it_was(terminal, sent):
    terminal.until(lambda seen: b"q quits" in seen)
    terminal.child.send_signal(sent)
    terminal.until(lambda seen: b"\x1b[?1049l" in seen)  # a terminal that reads nothing holds up whoever writes to it
    assert terminal.child.wait(PATIENCE_S) == 130


def test_a_terminal_that_changes_its_size_is_drawn_to_its_size(terminal):
    terminal.until(lambda seen: b"q quits" in seen)
    terminal.resize(44, 12)
    drawing = terminal.until(lambda seen: seen.rpartition(b"\x1b[H")[0].rpartition(b"\x1b[H")[2].count(b"\r\n") == 11)
    last = drawing.rpartition(b"\x1b[H")[0].rpartition(b"\x1b[H")[2].decode()
    assert max(len(line) for line in plain(last).split("\r\n")) <= 44
    os.write(terminal.master, b"q")
    assert terminal.child.wait(PATIENCE_S) == 0


def test_a_daemon_that_falls_silent_is_waited_for(terminal, daemon):
    """What was last known stays, under a word that it is old."""
    _, silent = daemon
    terminal.until(lambda seen: b"q quits" in seen)
    silent.set()
    assert b"thumbnail" in terminal.until(lambda seen: b"this is the last known" in seen)
    silent.clear()
    terminal.until(lambda seen: b"q quits" in seen)
    os.write(terminal.master, b"q")
    assert terminal.child.wait(PATIENCE_S) == 0


def plain(text):
    """What stands there when it is drawn."""
    parts = text.split("\x1b[")
    return parts[0] + "".join(
        part[next(n for n, letter in enumerate(part) if letter.isalpha()) + 1 :] for part in parts[1:]
    )


@pytest.mark.parametrize(("columns", "lines"), [(200, 60), (100, 30), (80, 24), (40, 10), (10, 3), (1, 1)])
def test_a_drawing_fits_whatever_the_size(columns, lines):
    drawing = drawn(TROUBLE, columns=columns, lines=lines, colour=True, zone=UTC)
    assert len(drawing) <= lines
    assert max(len(plain(line)) for line in drawing) <= columns
    uncoloured = drawn(TROUBLE, columns=columns, lines=lines, zone=UTC)
    assert [plain(line).rstrip() for line in drawing] == uncoloured


def test_nothing_that_a_guest_said_reaches_the_terminal_but_as_text():
    """No escape sequence, no line break."""
    (failure, *_) = TROUBLE.failures
    hostile = msgspec.structs.replace(failure, message="a\x1b]0;owned\x07\nb\r\x9bc", workload="w\x1b[2J")
    text = "\n".join(drawn(msgspec.structs.replace(TROUBLE, failures=[hostile]), columns=200, colour=False, zone=UTC))
    assert "a·]0;owned··b··c" in text
    assert all(letter.isprintable() for letter in text if letter != "\n")
