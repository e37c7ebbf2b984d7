"""A guest that does what the monitors' contract asks of one, and tells what it sees; standard library only."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

CONTROL, DATA = 1028, 1027
SIOCGIFINDEX, FIONREAD = 0x8933, 0x541B


def serve() -> None:
    """Answer connections for ever, each in a thread of its own."""
    listener = socket.socket(fileno=int(os.environ["SUBSTRATE_LISTEN_FD"]))
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=answer, args=(sock,), daemon=True).start()


def answer(sock: socket.socket) -> None:
    """Do one exchange."""
    with sock, sock.makefile("rb") as lines:
        port = int(lines.readline().split()[1])
        if port not in {CONTROL, DATA}:
            return
        sock.sendall(b"OK %d\n" % port)
        target = lines.readline().split()[1].decode()
        while lines.readline().strip():
            pass
        body = b"" if port == CONTROL else obey(target)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body))


def obey(target: str) -> bytes:
    """Do what the target says."""
    verb, _, argument = target.removeprefix("/").partition("/")
    match verb:
        case "exit":
            sys.stderr.write(f"leaving with {argument}\x1b[2J\n")
            sys.stderr.flush()
            os._exit(int(argument))
        case "kill":
            os.kill(os.getpid(), int(argument))
            time.sleep(60)
        case "hang":
            time.sleep(600)
        case "dial":
            return dial(int(argument))
        case "dials":
            return json.dumps([dial(9).decode() for _ in range(int(argument))]).encode()
        case "hoard":
            return json.dumps(hoard(int(argument))).encode()
        case "spin":
            deadline = time.process_time() + float(argument) / 1000
            while time.process_time() < deadline:
                pass
        case "feast":
            subprocess.run([sys.executable, "-I", "-S", "-c", f"b'x' * ({int(argument)} << 20)"], check=True)
        case "orphan":
            leave = "import os, time\nif os.fork(): os._exit(0)\nos.setsid()\ntime.sleep(600)"
            subprocess.run([sys.executable, "-I", "-S", "-c", leave, argument], check=True)
        case "flood":
            for _ in range(int(argument)):
                sys.stdout.write("x" * 1023 + "\n")
            sys.stdout.flush()
        case "see":
            return json.dumps(see(argument)).encode()
    return b"hello"


DIALLING = threading.Lock()


def ask(port: int) -> socket.socket | None:
    """A connection to a port of the host, or None if it is refused."""
    with DIALLING:
        dialler = socket.socket(fileno=os.dup(int(os.environ["SUBSTRATE_DIAL_FD"])))
        with dialler:
            dialler.send(str(port).encode())
            _, descriptors, _, _ = socket.recv_fds(dialler, 64, 1)
            return socket.socket(fileno=descriptors[0]) if descriptors else None


def dial(port: int) -> bytes:
    """What the port of the host says until it closes."""
    connection = ask(port)
    if connection is None:
        return b"refused"
    with connection:
        said = b""
        while data := connection.recv(4096):
            said += data
        return said


def hoard(count: int) -> int:
    """Ask for so many connections, keep them open, and count those that were given."""
    connections = [ask(1025) for _ in range(count)]
    return sum(connection is not None for connection in connections)


def attempt(action: object) -> str:
    """What comes of an attempt, in a word: its result, or the name of its error."""
    try:
        return str(action())
    except OSError as error:
        return type(error).__name__ if type(error) is not OSError else os.strerror(error.errno)


def names(directory: str) -> list[str]:
    """The names in a directory."""
    return sorted(path.name for path in Path(directory).iterdir())


def system_call(*numbers: int) -> int:
    """Make a system call; raises `OSError`."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(*map(ctypes.c_long, numbers))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def see(path: str) -> dict[str, object]:
    """Tell what a guest can see and do, and whether it sees `path`."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    return {
        "hostname": socket.gethostname(),
        "uid": os.getuid(),
        "gid": os.getgid(),
        "groups": os.getgroups(),
        "outer_uid": Path("/proc/self/uid_map").read_text().split(),
        "pids": [name for name in names("/proc") if name.isdigit()],
        "interfaces": [name for _, name in socket.if_nameindex()],
        "loopback": attempt(lambda: bool(socket.create_server(("127.0.0.1", 0)).getsockname()[1])),
        "internet": attempt(lambda: socket.create_connection(("192.0.2.1", 80), timeout=5)),
        "root": names("/"),
        "dev": names("/dev"),
        "exists": Path("/" + path).exists(),
        "env": dict(os.environ),
        "descriptors": names("/proc/self/fd"),
        "stdin": str(Path("/proc/self/fd/0").readlink()),
        "capabilities": [status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
        "no_new_privs": status["NoNewPrivs"],
        "write_root": attempt(lambda: Path("/planted").write_text("x")),
        "write_usr": attempt(lambda: Path("/usr/planted").write_text("x")),
        "write_here": attempt(lambda: Path("planted").write_text("x")),
        "write_tmp": attempt(lambda: Path("/tmp/planted").write_text(path)),
        "write_home": attempt(lambda: (Path.home() / "planted").write_text(path)),
        "tmp": names("/tmp"),
        "unshare_user": subprocess.run(["unshare", "-U", "true"], capture_output=True, check=False).returncode,
        "unshare_mount": subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode,
        "netdevices": attempt(
            lambda: fcntl.ioctl(int(os.environ["SUBSTRATE_LISTEN_FD"]), SIOCGIFINDEX, b"lo" + bytes(38))
        ),
        "unix_ioctl": attempt(lambda: fcntl.ioctl(int(os.environ["SUBSTRATE_DIAL_FD"]), FIONREAD, bytes(4))),
        "keys": attempt(lambda: system_call({"x86_64": 250}.get(os.uname().machine, 219), 0, -3, 0, 0, 0)),
        "io_uring": attempt(lambda: system_call(425, 1, 0)),
        "writable_mib": os.statvfs("/tmp").f_blocks * os.statvfs("/tmp").f_frsize / 2**20,
        "core": resource.getrlimit(resource.RLIMIT_CORE),
    }


if __name__ == "__main__":
    serve()
