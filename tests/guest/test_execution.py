"""The `exec` adapter: a program of any kind, run once for each request."""

import http.client
import os
import sys

import pytest

from guest.host import PATIENCE_S, read_reply, request_bytes
from substrate_guest.app import Request
from substrate_guest.execution import told


@pytest.fixture
def program(start):
    """A guest that runs a Python program for each request."""
    return lambda source: start(command=["exec", sys.executable, "-c", source])


UPPER = "import sys; sys.stdout.write(sys.stdin.read().upper())"


def test_a_program_reads_the_body_and_writes_the_reply(program):
    guest = program(UPPER)
    assert guest.restored().status == 200
    first, second = guest.ask(body=b"hello"), guest.ask(body=b"again")
    assert (first.status, first.body) == (200, b"HELLO")
    assert (second.status, second.body) == (200, b"AGAIN")


def test_it_is_told_about_the_request():
    request = Request("PUT", "/invoke/a%2Fb/c?x=1")
    assert told(request) == {
        "SUBSTRATE_METHOD": "PUT",
        "SUBSTRATE_TARGET": "/invoke/a%2Fb/c?x=1",
        "SUBSTRATE_SESSION": "a/b/c",
    }
    assert "SUBSTRATE_SESSION" not in told(Request("GET", "/"))


def test_its_environment_tells_it_of_the_request(program):
    guest = program("import os; print(os.environ['SUBSTRATE_METHOD'], os.environ['SUBSTRATE_SESSION'], end='')")
    guest.restored()
    assert guest.ask("POST", "/invoke/mine").body == b"POST mine"


@pytest.mark.parametrize(
    ("source", "how"),
    [
        ("import sys; print('half'); sys.exit('it is broken')", "exit status 1"),
        (
            "import os, sys; sys.stderr.write('it is broken'); sys.stderr.flush(); os.kill(os.getpid(), 9)",
            "killed by SIGKILL",
        ),
    ],
)
def test_a_program_that_fails_is_a_500_with_how_it_ended_and_what_it_complained_of(program, source, how):
    guest = program(source)
    guest.restored()
    reply = guest.ask()
    assert (reply.status, reply.text.strip()) == (500, f"{how}\nit is broken")


def test_a_program_that_fails_after_64_kib_cuts_the_reply(program):
    guest = program("import sys; sys.stdout.write('x' * 100_000); sys.stdout.flush(); sys.exit(3)")
    guest.restored()
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        guest.ask()


def test_output_streams_from_64_kib_on(program, tmp_path):
    """The caller reads the beginning while the program still waits for what only the caller's test can give it."""
    go_on = tmp_path / "go-on"
    os.mkfifo(go_on)
    guest = program(
        f"import sys\nsys.stdout.write('x' * 65536); sys.stdout.flush()\nprint(open({str(go_on)!r}).read(), end='')"
    )
    guest.restored()
    with guest.connection() as sock:
        sock.sendall(request_bytes())
        with http.client.HTTPResponse(sock) as reply:
            reply.begin()
            assert reply.read(65536) == b"x" * 65536
            go_on.write_text("the rest")
            assert reply.read() == b"the rest"


def test_a_program_need_not_read_its_body(program):
    guest = program("print('enough', end='')")
    guest.restored()
    assert guest.ask(body=bytes(4 * 1024 * 1024)).body == b"enough"


def test_what_a_program_leaves_behind_does_not_hold_the_reply_open(program):
    guest = program("import os, signal\nif os.fork() == 0:\n    signal.pause()\nprint('done', end='')")
    guest.restored()
    assert guest.ask().body == b"done"


@pytest.mark.parametrize("shown", ["", "x" * 100_000], ids=["before the head", "after it"])
def test_a_program_ends_when_its_caller_leaves(program, tmp_path, shown):
    """The pipe that only the program holds open is at its end once the program is gone."""
    held = tmp_path / "held"
    os.mkfifo(held)
    guest = program(
        "import os, signal, sys\n"
        f"sys.stdout.write({shown!r}); sys.stdout.flush()\n"
        f"held = open({str(held)!r}, 'w'); held.write('here'); held.flush(); signal.pause()"
    )
    guest.restored()
    with guest.connection() as sock:
        sock.sendall(request_bytes())
        reading = os.open(held, os.O_RDONLY)
        assert os.read(reading, 4) == b"here"
    assert os.read(reading, 1) == b""
    os.close(reading)
    assert guest.control("GET", "/shim/ready").status == 200


def test_a_guest_without_its_program_is_not_ready_and_says_why(start):
    guest = start(command=["exec", "/no/such/program"])
    with guest.connection(1028) as sock:
        sock.sendall(request_bytes("GET", "/shim/ready"))
        reply = read_reply(sock)
    assert (reply.status, guest.process.wait(PATIENCE_S)) == (503, 1)
    assert "there is no program '/no/such/program'" in reply.text
