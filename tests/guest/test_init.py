"""The first process of a machine, in namespaces that stand in for one, on an image without Python and libc."""

import json
import socket
import subprocess
from pathlib import Path

import pytest

from guest.host import PATIENCE_S, Guest
from real_parts import needs
from substrate_guest import tree

pytestmark = needs("root", "gcc", "x86-64-glibc", "pidfd")
MACHINE = ("unshare", "--mount", "--pid", "--fork", "--uts", "--ipc", "--net", "--kill-child")
BOOT = 'mount --bind "$0" "$0" && mount -t devtmpfs dev "$0/dev" && cd "$0" && exec chroot . /.substrate/init'
"""The machine's kernel has mounted /dev when it starts its first process; ours does it for it."""


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The root of an image: one static program, mount points, and our tree."""
    root = tmp_path_factory.mktemp("image")
    root.chmod(0o755)
    for name in ("dev", "proc", "run", "sys", "tmp", "etc", ".substrate"):
        (root / name).mkdir()
    (root / "etc/passwd").write_text("root:x:0:0::/root:/\nworker:x:1234:1235::/srv:/\n")
    (root / "etc/machine-id").write_text("")
    source = Path(__file__).with_name("image_program.c")
    subprocess.run(["gcc", "-static", "-O1", "-Wall", "-Werror", "-o", root / "program", source], check=True)
    tree.guest_tree(root / ".substrate")
    return root


@pytest.fixture
def machine(image, tmp_path):
    """Boot the image with a configuration; the machine is gone when the test ends."""
    machines = []

    def booted(verb, serve=None, user=""):
        env = ["GREETING=hello", *([f"SUBSTRATE_SERVE={serve}"] if serve else [])]
        config = {"Env": env, "Entrypoint": ["/program"], "Cmd": [verb], "WorkingDir": "/etc", "User": user}
        (image / ".substrate/image.json").write_text(json.dumps(config))
        path = tmp_path / "v.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            listener.listen()
            process = subprocess.Popen(
                [*MACHINE, "sh", "-c", BOOT, image],
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SUBSTRATE_LISTEN_FD": str(listener.fileno())},
                pass_fds=[listener.fileno()],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        machines.append(process)
        return Guest(process, path)

    yield booted
    for process in machines:
        process.kill()
        process.communicate(timeout=PATIENCE_S)


def test_an_image_that_is_one_static_binary_answers_each_request_with_a_run_of_it(machine):
    guest = machine("upper")
    assert guest.control("GET", "/shim/healthz").status == 200
    assert guest.restored().status == 200
    assert guest.ask(body=b"hello").body == b"HELLO"
    assert guest.ask(body=b"x" * 1_000_000).body == b"X" * 1_000_000


def test_its_failure_is_told(machine):
    guest = machine("fail")
    guest.restored()
    reply = guest.ask()
    assert (reply.status, reply.text) == (500, "exit status 3\nit is broken\n")


def test_an_http_server_in_it_is_reached_over_loopback(machine):
    guest = machine("serve", "http:8080")
    assert guest.restored().status == 200
    reply = guest.ask("GET", "/anything")
    assert (reply.status, reply.text, reply.headers["server"]) == (200, "served by pid 1", "tiny")


def test_the_machine_is_what_a_program_expects(machine):
    """The image's user, directory and environment; read-only root, bounded /tmp, proc, loopback; our init as pid 1."""
    guest = machine("report", user="worker")
    guest.restored()
    said = guest.ask().text.splitlines()
    assert said[0] == "uid=1234 gid=1235 cwd=/etc"
    assert said[1] == "greeting=hello home=/srv path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert said[2:5] == ["root=Read-only file system", "tmp=writable", "bounded=1"]
    assert said[5].startswith("/proc/1/comm=ld-linux")
    assert said[6] == "/sys/class/net/lo/operstate=unknown"  # what Linux calls a loopback that is up
    assert said[7] == "/dev/shm/../../proc/self/comm=program"


def test_orphans_are_reaped(machine):
    """Of twenty programs that leave a daemon behind, none is a zombie afterwards."""
    guest = machine("orphan")
    guest.restored()
    for _ in range(20):
        assert guest.ask().status == 200
    states = subprocess.check_output(["ps", "--ppid", str(_init_of(guest)), "-o", "stat="], text=True).split()
    assert len(states) == 1  # the server, and nobody who waits to be buried


def test_being_asked_to_end_is_passed_on_and_ends_the_machine(machine):
    guest = machine("serve", "http:8080")
    guest.restored()
    subprocess.run(["kill", "-TERM", str(_init_of(guest))], check=True)
    guest.process.wait(PATIENCE_S)
    assert "is gone, killed by SIGTERM; the machine ends" in guest.process.stdout.read()


@pytest.mark.parametrize(
    ("serve", "user", "said"),
    [
        ("https:443", "", "SUBSTRATE_SERVE: found 'https:443', accepted are `exec`"),
        ("exec", "nobody", "the image runs as user 'nobody', whom its /etc/passwd does not know"),
        ("python:handlers:app", "", "there is no program 'python3'"),
    ],
)
def test_a_machine_that_cannot_serve_says_why_and_ends(machine, serve, user, said):
    guest = machine("upper", serve, user)
    console, _ = guest.process.communicate(timeout=PATIENCE_S)
    assert said in console


def _init_of(guest):
    [init] = subprocess.check_output(["ps", "--ppid", str(guest.process.pid), "-o", "pid="], text=True).split()
    return int(init)
