"""What is measured side by side: the long-lived guest, nginx in front of it, and our daemons."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bench.processes import Process, running

SERVER_CORE, PEER_CORE = 0, 1
"""Servers run on one core, guests and callers on the other: what a server costs is then its own."""
POOL = 1024
"""As many guests as a workload may have parked: a burst of calls has no more, so that each finds one."""
ROOT = Path(__file__).parents[1]
_PARKED = re.compile(r'^substrate_guests\{[^}]*state="parked"[^}]*\} ([0-9.e+]+)$', re.MULTILINE)

_NGINX = """
daemon off; master_process off; pid {home}/nginx.pid; error_log {home}/nginx.error;
events {{ worker_connections 16384; }}
http {{
    access_log off; keepalive_requests 1000000000; keepalive_timeout 1h;
    client_body_temp_path {home}/body; proxy_temp_path {home}/proxy; fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;
    proxy_http_version 1.1; proxy_set_header Connection close; proxy_read_timeout 1h;
    server {{
        listen 127.0.0.1:{port} backlog=16384;
        location / {{ proxy_pass http://unix:{guest}:; }}
        location /unbuffered/ {{ proxy_buffering off; proxy_pass http://unix:{guest}:/; }}
    }}
}}
"""


class Server:
    """A server and the processes it is made of; `front` takes calls on `port`, `node` parks guests."""

    def __init__(self, port: int, *, front: Process, node: Process, admin_port: int = 0) -> None:
        self.port = port
        self.admin_port = admin_port
        self.front = front
        self.node = node

    @property
    def processes(self) -> tuple[Process, ...]:
        return (self.front,) if self.front is self.node else (self.front, self.node)

    @property
    def cpu_s(self) -> float:
        return sum(process.cpu_s for process in self.processes)

    def park(self, workload: str, count: int = POOL) -> None:
        """Have so many guests of a workload ready, and let no more be parked from then on."""
        assert self.node.ask(f"{workload} {count}") == "done"

    def until_parked(self, count: int) -> None:
        """Wait until the admin listener counts so many parked guests."""
        self.node.until(f"{count} guests are parked", lambda: self._parked() >= count)

    def _parked(self) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin_port}/metrics") as answer:
            metrics = answer.read().decode()
        return sum(int(float(number)) for number in _PARKED.findall(metrics))

    def park_whenever(self, workload: str) -> None:
        """Let guests be parked as they are taken, as a daemon does by itself."""
        assert self.node.ask(workload) == "done"


@contextmanager
def guest(home: Path) -> Iterator[Path]:
    """The long-lived guest; its socket."""
    path = home / "guest.sock"
    program = [sys.executable, "-I", "-S", ROOT / "bench/guest.py", path]
    with running(program, core=PEER_CORE, log=home / "guest.log") as process:
        process.until("the guest listens", path.exists)
        yield path
    path.unlink()


@contextmanager
def nginx(home: Path, guest_socket: Path) -> Iterator[Server]:
    """nginx, which opens a new connection to the guest for each request."""
    port, config = free_port(), home / "nginx.conf"
    config.write_text(_NGINX.format(home=home, port=port, guest=guest_socket))
    program = shutil.which("nginx") or "nginx"
    argv = [program, "-e", home / "nginx.error", "-c", config]
    with running(argv, core=SERVER_CORE, log=home / "nginx.log") as process:
        process.until("nginx listens", lambda: answers(port))
        yield Server(port, front=process, node=process)


def served(module: str, **fields: object) -> dict[str, object]:
    """An entry of a table for a real process guest, which is cloned for each call."""
    command = ["python", "-m", "substrate_guest", "serve", module]
    return {"command": command, "memMib": 64, "concurrency": 64, "warmBase": True, **fields}


def workload(**fields: object) -> dict[str, object]:
    """An entry of a table; over the double its command is never run."""
    return {"command": ["python", "-c", ""], "memMib": 32, "concurrency": 4096, "warmBase": True, **fields}


@contextmanager
def one_process(
    home: Path, table: Mapping[str, object], *, guest_socket: Path | None, core: int | None, name: str = "ours"
) -> Iterator[Server]:
    """fc-invoke, over the double of the long-lived guest or, without one, with its own process guests."""
    argv = _argv("fc-invoke", "fc_invoke", guest_socket)
    environment = _front("FC_INVOKE_", home, table) | _node("FC_INVOKE_", home / name, over_double=bool(guest_socket))
    with running(argv, core=core, log=home / f"{name}.log", environment=environment) as process:
        port, admin_port = _ports_of(process)
        yield Server(port, front=process, node=process, admin_port=admin_port)


@contextmanager
def two_processes(home: Path, table: Mapping[str, object], *, guest_socket: Path, core: int | None) -> Iterator[Server]:
    """cluster-agent and node-daemon on the same core, over the double."""
    node_argv = _argv("node-daemon", "node_daemon", guest_socket)
    node_environment = _node("NODE_DAEMON_", home / "split", over_double=True) | {
        "NODE_DAEMON_LISTEN_ADDR": "127.0.0.1:0",
        "NODE_DAEMON_ADMIN_LISTEN_ADDR": "127.0.0.1:0",
        "NODE_DAEMON_NODE": "node-1",
    }
    with running(node_argv, core=core, log=home / "node.log", environment=node_environment) as node:
        address = f"node-1=http://127.0.0.1:{_ports_of(node)[0]}"
        environment = _front("CLUSTER_AGENT_", home, table) | {"CLUSTER_AGENT_NODES": address}
        argv = _argv("cluster-agent", "cluster_agent", None)
        with running(argv, core=core, log=home / "agent.log", environment=environment) as agent:
            yield Server(_ports_of(agent)[0], front=agent, node=node)


def _argv(daemon: str, module: str, guest_socket: Path | None) -> list[str | Path]:
    if guest_socket is None:
        return [sys.executable, "-m", module]
    return [sys.executable, "-m", "bench.daemon", daemon, guest_socket]


def _front(prefix: str, home: Path, table: Mapping[str, object]) -> dict[str, str]:
    table_file = home / f"{prefix.lower()}{len(table)}.json"
    table_file.write_text(json.dumps(table))
    return {
        "PYTHONPATH": str(ROOT),
        "HOME": str(home),
        f"{prefix}LISTEN_ADDR": "127.0.0.1:0",
        f"{prefix}ADMIN_LISTEN_ADDR": "127.0.0.1:0",
        f"{prefix}WORKLOADS_FILE": str(table_file),
        f"{prefix}CALLER_LIMIT": "20000",
    }


def _node(prefix: str, state: Path, *, over_double: bool) -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "HOME": str(state.parent), f"{prefix}STATE_ROOT": str(state)}
    return own | ({f"{prefix}MEMORY_MIB": "1000000000"} if over_double else {})


def _ports_of(process: Process) -> tuple[int, int]:
    """The ports that a daemon of ours says it listens on, for callers and for operators."""

    def started() -> dict[str, str] | None:
        for line in process.log.read_text().splitlines():
            if '"event":"daemon.started"' in line:
                return json.loads(line)
        return None

    process.until("daemon.started", started)
    event = started()
    assert event is not None
    return tuple(int(event[name].rpartition(":")[2]) for name in ("listen", "admin"))


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def answers(port: int) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
