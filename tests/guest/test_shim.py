"""The shim as a node meets it: a process behind a socket."""

import http.client
import json
import os
import signal
import time
from base64 import b64encode

import pytest

from guest.host import CONTROL, IDENTITY, PATIENCE_S, read_reply, request_bytes

ECHO = "substrate_guest.workloads.echo:app"


def test_an_exchange_is_a_connect_line_and_one_http_request(start):
    guest = start(ECHO)
    guest.restored()
    reply = guest.ask(body=b"hello", headers=[("content-type", "text/x")])
    assert (reply.status, reply.body, reply.headers["content-type"]) == (200, b"hello", "text/x")
    assert (reply.headers["content-length"], reply.headers["connection"]) == ("5", "close")


def test_echo_says_how_it_was_asked(start):
    guest = start(ECHO)
    guest.restored()
    seen = guest.ask("GET", "/invoke/a/b%20c?inspect", headers=[("x-a", "1")]).json()
    assert (seen["method"], seen["target"], seen["session"]) == ("GET", "/invoke/a/b%20c?inspect", "a/b c")
    assert ["x-a", "1"] in seen["headers"]
    assert seen["pid"] == guest.process.pid


def test_the_whole_request_may_come_with_the_connect_line(start):
    import socket

    guest = start(ECHO)
    guest.restored()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(str(guest.path))
        sock.sendall(b"CONNECT 1027\n" + request_bytes(body=b"x" * 300_000))
        received = b"".join(iter(lambda: sock.recv(65536), b""))
    assert received.startswith(b"OK 1027\nHTTP/1.1 200 ")
    assert received.endswith(b"\r\n\r\n" + b"x" * 300_000)


@pytest.mark.parametrize(
    ("method", "target"), [("GET", "/"), ("POST", "/shim/ready"), ("GET", "/shim/restored"), ("POST", "/invoke")]
)
def test_control_answers_nothing_else(start, method, target):
    assert start(ECHO).control(method, target).status == 404


def test_control_is_out_of_a_callers_reach(start):
    """On the data port every path belongs to the workload."""
    guest = start(ECHO)
    guest.restored()
    assert guest.ask("POST", "/shim/restored", b"mine").body == b"mine"


WAITS = """
import os
from pathlib import Path
from substrate_guest import App

def prime():
    with open("gate") as gate:  # a pipe: until the test opens its other end
        gate.read()

def restored(identity):
    Path("restored").write_text(f"{identity.guest_id} {identity.restored}")

app = App(lambda request: "served", prime=prime, restored=[restored])
"""


def test_ready_waits_for_prime_and_restored_for_both(start, tmp_path):
    import os
    import socket

    gate = tmp_path / "gate"
    os.mkfifo(gate)
    guest = start(source=WAITS.replace('"gate"', repr(str(gate))))
    assert guest.control("GET", "/shim/healthz").status == 200
    assert guest.control("GET", "/shim/ready").status == 503
    assert guest.ask().status == 503
    with guest.connection(CONTROL) as sock:
        sock.sendall(request_bytes(target="/shim/restored", body=json.dumps(IDENTITY).encode()))
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(1, socket.MSG_PEEK)
        gate.write_text("go")
        sock.settimeout(PATIENCE_S)
        assert sock.recv(12) == b"HTTP/1.1 200"
    assert (guest.path.parent / "restored").read_text() == "inv-0123456789abcdef True"
    assert guest.control("GET", "/shim/ready").status == 200
    assert guest.ask().text == "served"


def test_a_failed_prime_is_told_and_then_a_death(start):
    guest = start(source="from substrate_guest import App\ndef prime(): 1 / 0\napp = App(print, prime=prime)")
    reply = guest.restored()
    assert (reply.status, reply.text) == (
        503,
        "the workload failed to get ready: ZeroDivisionError: division by zero\n",
    )
    status, console = guest.ended()
    assert status == 1
    assert "ZeroDivisionError" in console


def test_a_failed_prime_that_nobody_asks_about_is_a_death_too(start):
    guest = start(source="from substrate_guest import App\ndef prime(): exit()\napp = App(print, prime=prime)")
    assert guest.ended()[0] == 1


def test_a_failing_restored_hook_is_a_500_with_its_reason(start):
    guest = start(
        source="from substrate_guest import App\n"
        "def no(identity): raise OSError('no database')\n"
        "app = App(print, restored=[no])"
    )
    reply = guest.restored()
    assert (reply.status, reply.text) == (500, "not restored: OSError: no database\n")


def test_a_wrong_identity_is_a_400_with_every_problem(start):
    reply = start(ECHO).restored(epoch_ns="now", restored=1)
    assert reply.status == 400
    assert [problem["path"] for problem in reply.json()["problems"]] == ["epoch_ns", "restored"]


def test_two_guests_told_apart_draw_different_numbers(start):
    source = "import random, tempfile\ndef app(request): return [random.random(), random.random()]\nrandom.seed(7)"
    drawn = []
    for entropy in (b"a" * 64, b"b" * 64):
        guest = start(source=source)
        assert guest.restored(entropy_b64=b64encode(entropy).decode()).status == 200
        drawn.append(guest.ask().json())
    assert drawn[0] != drawn[1]


def test_a_process_guest_touches_neither_clock_nor_host_name_of_the_host(start):
    before_s = time.time()
    reply = start(ECHO).restored(epoch_ns=1, hostname="stolen").json()
    assert (reply["clock"], reply["hostname"], reply["entropy"]) == ("the host's",) * 3
    assert time.time() >= before_s


SLOW = """
import time
def app(request):
    yield b"begun"
    time.sleep(600)
"""


def test_sigterm_ends_the_shim_in_the_middle_of_a_request(start):
    guest = start(source=SLOW)
    guest.restored()
    with guest.connection() as sock:
        sock.sendall(request_bytes())
        response = http.client.HTTPResponse(sock)
        response.begin()
        assert response.read1(5) == b"begun"
        guest.process.send_signal(signal.SIGTERM)
        assert guest.ended()[0] == -signal.SIGTERM
        with response, pytest.raises(http.client.IncompleteRead):
            response.read()


THREADS = """
import os, threading
from substrate_guest import App

def count(*_):
    return len(os.listdir("/proc/self/task"))

seen = []
app = App(lambda request: {"now": count(), "when ready": seen}, prime=lambda: None, restored=[lambda identity: None])

@app.before
async def note(request):
    seen.append(count())
"""


def test_a_ready_guest_has_one_thread_until_it_is_asked_something(start):
    guest = start(source=THREADS)
    guest.restored()
    assert guest.ask().json() == {"now": 2, "when ready": [1]}


def test_neither_variables_nor_descriptors_reach_a_child_of_the_workload(start):
    source = """
import subprocess, os
from substrate_guest import App
def app(request):
    child = "import os; print([k for k in os.environ if 'SUBSTRATE' in k], len(os.listdir('/proc/self/fd')))"
    return subprocess.check_output(["python3", "-c", child], close_fds=False)
"""
    guest = start(source=source)
    guest.restored()
    assert guest.ask().text == "[] 4\n"  # its three streams, and the directory it lists


def test_an_asgi_application_is_served_from_its_directory(start, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "site_app.py").write_text(
        "from starlette.applications import Starlette\n"
        "from starlette.responses import PlainTextResponse\n"
        "from starlette.routing import Route\n"
        "import os\n"
        "app = Starlette(routes=[Route('/', lambda request: PlainTextResponse(os.getcwd()))])\n"
    )
    guest = start("site_app:app", options=("--chdir", str(tmp_path / "site")))
    guest.restored()
    assert guest.ask("GET", "/").text == str(tmp_path / "site")


def test_a_crashing_guest_cuts_its_replies(start):
    guest = start(source="import os\ndef app(request):\n    yield b'half'\n    os._exit(7)")
    guest.restored()
    with pytest.raises(http.client.IncompleteRead):
        guest.ask()
    assert guest.ended()[0] == 7


@pytest.mark.parametrize(
    ("target", "options", "says"),
    [
        ("handlers:missing", (), "substrate-guest: module 'handlers' has no 'missing'"),
        ("nowhere:app", (), "substrate-guest: no module 'nowhere'"),
        (ECHO, ("--chdir", "/no/such/place"), "substrate-guest: [Errno 2]"),
        (ECHO, ("--port", "1"), "accepted are serve MODULE:ATTRIBUTE"),
    ],
)
def test_a_mistake_on_the_command_line_exits_with_2_and_one_line(start, target, options, says):
    status, console = start(target, options=options).ended()
    assert status == 2
    assert says in console
    assert console.count("\n") == 1


def test_a_module_that_fails_shows_its_traceback_and_one_line(start):
    status, console = start(source="1 / 0").ended()
    assert status == 2
    assert 'handlers.py", line 1' in console
    assert console.splitlines()[-1] == "substrate-guest: module 'handlers' failed: ZeroDivisionError: division by zero"


def test_a_traceback_begins_with_the_first_line_of_the_author(start):
    """How we imported and called the workload explains nothing to whoever wrote it."""
    source = "from substrate_guest import App\ndef load():\n    {}['model']\napp = App(lambda request: b'', prime=load)"
    _, console = start(source=source).ended()
    head, first, line, *rest = console.splitlines()
    assert (head, line.strip()) == ("Traceback (most recent call last):", "{}['model']")
    assert 'handlers.py", line 3, in load' in first
    assert rest[-1] == "KeyError: 'model'"


def test_a_module_that_cannot_be_read_shows_where_and_nothing_of_ours(start):
    _, console = start(source="def app(request:\n").ended()
    assert "handlers.py" in console.splitlines()[0]
    assert "SyntaxError" in console
    assert "importlib" not in console
    assert "substrate_guest/" not in console


def test_what_a_workload_prints_is_on_the_console_before_it_is_killed(start):
    """A guest is killed once it has answered, whatever is in its buffers."""
    guest = start(source="def app(request):\n    print('seen', request.body)\n    return b''")
    guest.restored()
    guest.ask(body=b"this")
    guest.process.kill()
    assert guest.ended()[1] == "seen b'this'\n"


def test_a_descriptor_that_is_none_exits_with_2(start):
    status, console = start(ECHO, env={"SUBSTRATE_DIAL_FD": "4000"}).ended()
    assert status == 2
    assert console.startswith("substrate-guest: SUBSTRATE_DIAL_FD: found '4000'")


SLOW_TO_PRIME = """
import time
from substrate_guest import App
heard = []
app = App(lambda request: heard[0], prime=lambda: open("go-on").read())
@app.restored
def restored(identity):
    heard.append({"epoch_ns": identity.epoch_ns, "monotonic_ns": time.monotonic_ns()})
"""


def test_the_time_that_a_guest_was_told_goes_on_while_its_workload_gets_ready(start):
    """What the guest takes for the time is right for when it takes it: as late as that is after it was told."""
    guest = start(source=SLOW_TO_PRIME)
    go_on = guest.path.with_name("go-on")
    os.mkfifo(go_on)
    told_ns = 1_000_000_000_000_000_000
    before_ns = time.monotonic_ns()
    with guest.connection(CONTROL) as sock:
        sock.sendall(request_bytes("POST", "/shim/restored", json.dumps(IDENTITY | {"epoch_ns": told_ns}).encode()))
        assert guest.control("GET", "/shim/healthz").status == 200
        connected_ns = time.monotonic_ns()
        assert guest.control("GET", "/shim/ready").status == 503
        primed_ns = time.monotonic_ns()
        go_on.write_text("")
        assert read_reply(sock).status == 200
    heard = guest.ask().json()
    assert primed_ns - connected_ns <= heard["epoch_ns"] - told_ns <= heard["monotonic_ns"] - before_ns
