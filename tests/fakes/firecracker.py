"""A double of Firecracker: its command line, API and hybrid vsock, with a process where the guest would be.

A program of its own (standard library only, quick to start): `firecracker.py --double CONFIG [Firecracker's flags]`.
The root file system that it is given is JSON: `argv`, `env` and `cwd` of the guest, which gets its vsock as a process
guest does (`SUBSTRATE_LISTEN_FD`, `SUBSTRATE_DIAL_FD`); without `argv` the double answers in the guest's place. A
snapshot remembers that program and not its memory: each clone starts it anew, and so is as different from its siblings
as a real one must be made.

CONFIG is JSON: `version`, `snapshot_version`, `journal` (a file that gets each request and answer) and `faults`, each
`{"on": where, "do": what, ...}`, the next `times` times (without: always), in whichever process comes there first:

    on   a call (`PUT /vsock`), before it is carried out, or after it with `"after": true`
         `start`   before the API's socket is bound
         `bound`   between bind and listen
         `connect`, `restored-connect`   a CONNECT was parsed (by a restored machine)
    do   `hang`; `sleep` (`seconds`); `die` (`code`, or `signal`); `close` the connection; `fail` with `message`
         (a call); `truncate` or `fill-disk` (`PUT /snapshot/create`); `reset` after OK, `join` OK and what follows,
         `split` OK (a connection)
"""

# pathlib would be a good part of what it takes to start; and a program prints.
# ruff: noqa: PTH108, PTH123, T201

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

MIB = 1024 * 1024
CONNECTIONS_MAX = 10
VSOCK_CONNECTIONS_MAX = 1023
LINE_BYTES_MAX = 1024
BODY_BYTES_MAX = 51_200
HOST_PORT_FIRST, HOST_PORTS = 1 << 30, 1 << 30
NOT_STARTED, RUNNING, PAUSED = "Not started", "Running", "Paused"
BEFORE_START = "The requested operation is not supported before starting the microVM."
AFTER_START = "The requested operation is not supported after starting the microVM."
MAGIC = b"FCDOUBLE"
FAREWELL = "2026-01-01T00:00:00.000000000 [anonymous-instance:main] Firecracker exiting successfully. exit_code=0"
RESTORE = "Load snapshot error: Failed to restore from snapshot: "

# For each call: its fields, the required ones first with a `*`. Types are not looked at closer than this.
NUMBER, TEXT, FLAG, ANY = (int,), (str,), (bool,), (object,)
BODIES = {
    "PUT machine-config": {
        "*vcpu_count": NUMBER,
        "*mem_size_mib": NUMBER,
        "smt": FLAG,
        "cpu_template": TEXT,
        "track_dirty_pages": FLAG,
        "huge_pages": TEXT,
    },
    "PUT boot-source": {"*kernel_image_path": TEXT, "initrd_path": TEXT, "boot_args": TEXT},
    "PUT drives": {
        "*drive_id": TEXT,
        "*is_root_device": FLAG,
        "path_on_host": TEXT,
        "is_read_only": FLAG,
        "partuuid": TEXT,
        "cache_type": TEXT,
        "io_engine": TEXT,
        "rate_limiter": ANY,
        "socket": TEXT,
    },
    "PUT vsock": {"vsock_id": TEXT, "*guest_cid": NUMBER, "*uds_path": TEXT},
    "PUT entropy": {"rate_limiter": ANY},
    "PUT actions": {"*action_type": TEXT},
    "PATCH vm": {"*state": TEXT},
    "PUT snapshot/create": {"*snapshot_path": TEXT, "*mem_file_path": TEXT, "snapshot_type": TEXT},
    "PUT snapshot/load": {
        "*snapshot_path": TEXT,
        "mem_file_path": TEXT,
        "mem_backend": ANY,
        "enable_diff_snapshots": FLAG,
        "track_dirty_pages": FLAG,
        "resume_vm": FLAG,
        "network_overrides": ANY,
        "vsock_override": ANY,
        "clock_realtime": FLAG,
        "huge_pages": TEXT,
    },
    "PUT logger": {"log_path": TEXT, "level": TEXT, "show_level": FLAG, "show_log_origin": FLAG, "module": TEXT},
    "PUT metrics": {"*metrics_path": TEXT, "emit_id": FLAG, "properties": ANY},
    "PUT serial": {"serial_out_path": TEXT, "rate_limiter": ANY},
}
SINCE = {"vsock_override": (1, 16, 0), "huge_pages": (1, 17, 0)}  # fields of a load


class Fault(Exception):
    """A call is answered with 400."""


class Fatal(Fault):
    """So it is, and the process ends after it."""


class Spoiled(Exception):
    """What came was no request: the second kind of error."""


class Faults:
    """What goes wrong where. Counters are files, because many processes share one plan."""

    def __init__(self, config: dict, path: str) -> None:
        self._faults = config.get("faults", [])
        self._path = path

    def draw(self, on: str, *, after: bool = False) -> dict | None:
        """The next planned fault for `on`, used up by one."""
        for number, fault in enumerate(self._faults):
            if fault["on"] == on and fault.get("after", False) == after and self._claim(number, fault.get("times")):
                return fault
        return None

    def _claim(self, number: int, times: int | None) -> bool:
        for turn in range(times or 0):
            with suppress(FileExistsError):
                os.close(os.open(f"{self._path}.used-{number}-{turn}", os.O_CREAT | os.O_EXCL))
                return True
        return times is None


def suffer(fault: dict | None) -> None:
    """Do what a fault says that any place can do."""
    match fault and fault["do"]:
        case "hang":
            threading.Event().wait()
        case "sleep":
            time.sleep(fault["seconds"])
        case "die" if "signal" in fault:
            os.kill(os.getpid(), fault["signal"])
        case "die":
            os._exit(fault.get("code", 1))


class Guest:
    """The process in the place of the guest, and the double's ends of its sockets."""

    def __init__(self, program: dict, machine: Machine) -> None:
        self.program = program
        self._machine = machine
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind("")  # a name of the kernel's choice, which is no file
        self._listener.listen(1024)
        self._address = self._listener.getsockname()
        if program.get("argv") is None:
            threading.Thread(target=self._answer_all, daemon=True).start()
            return
        dials, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        given = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 12) for end in (self._listener, theirs)]  # neither is 10 or 11
        actions = [(os.POSIX_SPAWN_DUP2, end, number) for number, end in enumerate(given, 10)]
        env = {"SUBSTRATE_LISTEN_FD": "10", "SUBSTRATE_DIAL_FD": "11", **program.get("env", {})}
        argv = ["/usr/bin/env", "-C", program.get("cwd", "/"), "setpriv", "--pdeathsig", "KILL", *program["argv"]]
        argv = [argv[0], argv, {"PATH": "/usr/bin:/bin", **env}]
        self.pid = machine.on_main(lambda: os.posix_spawn(*argv, file_actions=actions, setsid=True))
        for end in given:
            os.close(end)
        theirs.close()
        self._listener.close()
        threading.Thread(target=self._dial_all, args=(dials,), daemon=True).start()
        threading.Thread(target=self._outlive, daemon=True).start()

    def connect(self, port: int) -> socket.socket | None:
        """A stream to a port of the guest, or None if nobody listens there."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        said = b""
        with suppress(OSError):
            sock.connect(self._address)
            sock.sendall(b"CONNECT %d\n" % port)
            while not said.endswith(b"\n") and (byte := sock.recv(1)):
                said += byte
        if said.startswith(b"OK "):
            return sock
        sock.close()
        return None

    def _outlive(self) -> None:
        os.waitpid(self.pid, 0)
        self._machine.log("main", "Vmm is stopping.")
        os._exit(0)  # the end of its first process is the end of the machine, which reboots

    def _dial_all(self, dials: socket.socket) -> None:
        while question := dials.recv(32):
            host = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                host.connect(f"{self._machine.uds}_{int(question)}")
            except OSError:
                host.close()
                dials.send(b"reset")
                continue
            guest, theirs = socket.socketpair()
            self._machine.splice(host, guest)
            socket.send_fds(dials, [b"ok"], [theirs.fileno()])
            theirs.close()

    def _answer_all(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            threading.Thread(target=self._answer, args=(sock,), daemon=True).start()

    @staticmethod
    def _answer(sock: socket.socket) -> None:
        with sock, sock.makefile("rb") as lines, suppress(OSError, ValueError):
            port = lines.readline().split()[1]
            sock.sendall(b"OK %s\n" % port)
            while (line := lines.readline()) not in (b"\r\n", b""):
                if line.lower().startswith(b"content-length:"):
                    lines.peek()
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")


class Machine:
    """The microVM: its configuration, its state, its vsock."""

    def __init__(self, arguments: dict[str, str], config: dict, faults: Faults) -> None:
        self.id = arguments.get("--id", "anonymous-instance")
        self.state = NOT_STARTED
        self.version = config.get("version", "1.17.0")
        self.snapshot_version = config.get("snapshot_version", "12.0.0")
        self.faults = faults
        self.uds = ""
        self.config: dict = {"machine-config": {"vcpu_count": 1, "mem_size_mib": 128}, "drives": {}}
        self.guest: Guest | None = None
        self._configured = False
        self._restored = False
        self._wedged = False
        self._captured_since_pause = False
        self._running = threading.Event()
        self._host_port = HOST_PORT_FIRST
        self._listener: socket.socket | None = None
        self._streams: set[socket.socket] = set()
        self._errands: SimpleQueue = SimpleQueue()
        self._log: int | None = None
        self._level = "Info"
        if "--log-path" in arguments:
            self._open_log(arguments["--log-path"], arguments.get("--level", "Info"))

    def run_errands(self) -> None:
        """Do what must be done on this thread, for ever: a process dies with the thread that started it."""
        while True:
            errand, answer = self._errands.get()
            answer.put(errand())

    def on_main(self, errand: Callable[[], int]) -> int:
        """Have something done on the main thread."""
        answer: SimpleQueue = SimpleQueue()
        self._errands.put((errand, answer))
        return answer.get()

    # What the API can do. Each returns what a GET answers, or None; raises `Fault`.

    def call(self, method: str, path: str, body: dict | None) -> dict | None:
        """Carry out one request."""
        match method, path.split("/"):
            case "GET", [""]:
                return {"id": self.id, "state": self.state, "vmm_version": self.version, "app_name": "Firecracker"}
            case "GET", ["version"]:
                return {"firecracker_version": self.version}
            case "GET", ["machine-config"]:
                return {"smt": False, "track_dirty_pages": False, "huge_pages": "None"} | self.config["machine-config"]
            case "GET", ["vm", "config"]:
                return self.config | {"drives": list(self.config["drives"].values())}
            case "PUT", ["logger"]:
                self._before_start()
                self._open_log(body.get("log_path"), body.get("level", "Info"))
            case "PUT", ["metrics" | "serial"]:
                self._before_start()
            case "PUT", ["machine-config" | "entropy" as part]:
                self._configure(part, body)
            case "PUT", ["boot-source"]:
                self._configure_boot(body)
            case "PUT", ["drives", drive_id]:
                self._configure_drive(drive_id, body)
            case "PUT", ["vsock"]:
                self._configure("vsock", body)
                self._bind(body["uds_path"], "Vsock config error: Cannot create backend for vsock device: ")
            case "PUT", ["actions"]:
                self._act(body["action_type"])
            case "PATCH", ["vm"]:
                self._turn(body["state"])
            case "PUT", ["snapshot", "create"]:
                self._create(body)
            case "PUT", ["snapshot", "load"]:
                self._load(body)
        return None

    def _before_start(self) -> None:
        if self.state != NOT_STARTED:
            raise Fault(AFTER_START)

    def _configure(self, part: str, body: dict) -> None:
        self._before_start()
        self._configured = True
        self.config[part] = body

    def _configure_boot(self, body: dict) -> None:
        self._configure("boot-source", body)
        for field, what in (("kernel_image_path", "kernel"), ("initrd_path", "initrd")):
            if field in body:
                _readable(body[field], f"Boot source error: The {what} file cannot be opened: ")

    def _configure_drive(self, drive_id: str, body: dict) -> None:
        if drive_id != body["drive_id"]:
            raise Fault("The id from the path does not match the id from the body!")
        self._before_start()
        self._configured = True
        _readable(
            body["path_on_host"],
            "Drive config error: Unable to create the virtio block device: Virtio backend error: "
            "Error manipulating the backing file: ",
            f" {body['path_on_host']}",
        )
        self.config["drives"][drive_id] = body

    def _act(self, action: str) -> None:
        if action == "InstanceStart":
            self._before_start()
            if "boot-source" not in self.config:
                raise Fault("Start microvm error: Cannot start microvm without kernel configuration.")
            root = next(drive for drive in self.config["drives"].values() if drive["is_root_device"])
            with open(root["path_on_host"]) as rootfs:
                self._run(json.loads(rootfs.read()))
            return
        if self.state == NOT_STARTED:
            raise Fault(BEFORE_START)
        if action == "SendCtrlAltDel":
            threading.Timer(0.05, os._exit, (0,)).start()

    def _turn(self, state: str) -> None:
        if self.state == NOT_STARTED:
            raise Fault(BEFORE_START)
        if state == "Paused":
            self.state = PAUSED
            self._captured_since_pause = False
            self._running.clear()
        else:
            if self.state == PAUSED and not self._captured_since_pause and self.version in ("1.16.0", "1.16.1"):
                self._wedged = True  # the defect of these two releases
            self.state = RUNNING
            self._reset_streams()
            self._running.set()

    def _run(self, program: dict) -> None:
        self.guest = Guest(program, self)
        self.state = RUNNING
        self._running.set()

    def _create(self, body: dict) -> None:
        if self.state == NOT_STARTED:
            raise Fault(BEFORE_START)
        if self.state != PAUSED:
            raise Fault(
                "Create snapshot error: Cannot save the microVM state: "
                "Operation not allowed: save/restore unavailable while running"
            )
        fault = self.faults.draw("create")
        size = self.config["machine-config"]["mem_size_mib"] * MIB
        memory = json.dumps(self.guest.program).encode()
        with open(body["mem_file_path"], "w+b") as file:
            file.write(memory)
            file.seek(MIB)
            file.write(bytes(3 * MIB) + os.urandom(MIB))  # a full snapshot has its zeros written out
            file.truncate(size // 2 if fault and fault["do"] == "truncate" else size)
        if fault and fault["do"] == "fill-disk":
            raise Fault("Create snapshot error: Cannot dump the memory: No space left on device (os error 28)")
        state = json.dumps({"config": self.config, "host_port": self._host_port}).encode()
        with open(body["snapshot_path"], "wb") as file:
            version = self.snapshot_version.encode()
            file.write(MAGIC + version + b"\n" + state + zlib.crc32(state).to_bytes(8, "little"))
        self._captured_since_pause = True
        self._reset_streams()

    def _load(self, body: dict) -> None:
        if self.state != NOT_STARTED:
            raise Fault(AFTER_START)
        if self._configured:
            raise Fault(
                "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources."
            )
        backend = body.get("mem_backend") or {"backend_type": "File", "backend_path": body["mem_file_path"]}
        saved = self._saved_state(body["snapshot_path"])
        self.config = saved["config"]
        self._host_port = saved["host_port"]
        for override in body.get("network_overrides", []):
            raise Fatal(f"{RESTORE}Failed to get snapshot state from file: Unknown Network Device. {override}"[:-3])
        if "vsock_override" in body:
            if "vsock" not in self.config:
                raise Fatal(f"{RESTORE}Failed to get snapshot state from file: Unknown Vsock Device.")
            self.config["vsock"]["uds_path"] = body["vsock_override"]["uds_path"]
        program = self._saved_memory(backend)
        for drive in self.config["drives"].values():
            with _fatal(f"{RESTORE}Failed to build microVM from snapshot: Failed to restore devices: "):
                _readable(drive["path_on_host"], "", f" {drive['path_on_host']}")
        if "vsock" in self.config:
            with _fatal(""):
                self._bind(
                    self.config["vsock"]["uds_path"],
                    f"{RESTORE}Failed to build microVM from snapshot: Failed to restore devices: "
                    "Error restoring MMIO devices: VsockUnixBackend: ",
                )
        self._restored = True
        self.state = PAUSED
        self._run(program)
        if not body.get("resume_vm", False):
            self.state = PAUSED

    def _saved_state(self, path: str) -> dict:
        where = f"{RESTORE}Failed to get snapshot state from file: "
        with _fatal(f"{where}Failed to open snapshot file: "):
            _readable(path, "")
        with open(path, "rb") as file:
            data = file.read()
        bad = f"{where}Failed to load snapshot state from file: "
        if len(data) < 8:
            raise Fatal(f"{bad}IO Error: File too short to contain CRC")
        head, _, rest = data.partition(b"\n")
        if head.removeprefix(MAGIC) != self.snapshot_version.encode():
            raise Fatal(f"{bad}Invalid data version: {head.removeprefix(MAGIC).decode(errors='replace')}")
        if zlib.crc32(rest[:-8]).to_bytes(8, "little") != rest[-8:]:
            raise Fatal(f"{bad}CRC64 validation failed")
        return json.loads(rest[:-8])

    def _saved_memory(self, backend: dict) -> dict:
        path = backend["backend_path"]
        if backend["backend_type"] == "Uffd":
            self._shake_hands(path)
            return {"argv": None}
        why = f"{RESTORE}Failed to load guest memory: Error creating guest memory from file: "
        why += "Failed to load guest memory: "
        with _fatal(why):
            _readable(path, "")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size < self.config["machine-config"]["mem_size_mib"] * MIB:
                raise Fatal(f"{why}Memory descriptor is larger than the file.")
            return json.loads(file.read(MIB).rstrip(b"\0"))

    def _shake_hands(self, path: str) -> None:
        handler = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        why = f"{RESTORE}Failed to load guest memory: Error creating guest memory from uffd: "
        with _fatal(f"{why}Failed to connect to UDS Unix stream: "):
            try:
                handler.connect(path)
            except OSError as error:
                raise Fault(_os_error(error)) from error
        size = self.config["machine-config"]["mem_size_mib"] * MIB
        region = {"base_host_virt_addr": 1 << 47, "size": size, "offset": 0, "page_size": 4096, "page_size_kib": 4096}
        socket.send_fds(handler, [json.dumps([region], separators=(",", ":")).encode()], [handler.fileno()])
        self._streams.add(handler)  # kept open: its end tells the handler of ours

    # The vsock.

    def _bind(self, path: str, why: str) -> None:
        if self._listener is not None:
            self._listener.close()
            os.unlink(self.uds)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(path)
        except OSError as error:
            listener.close()
            raise Fault(f"{why}Error binding to the host-side Unix socket: {_os_error(error)}") from error
        listener.listen(4096)
        self.uds, self._listener = path, listener
        threading.Thread(target=self._accept_all, args=(listener,), daemon=True).start()

    def _accept_all(self, listener: socket.socket) -> None:
        while True:
            self._running.wait()
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            if len(self._streams) // 2 > VSOCK_CONNECTIONS_MAX:
                sock.close()
                continue
            threading.Thread(target=self._greet, args=(sock,), daemon=True).start()

    def _greet(self, sock: socket.socket) -> None:
        try:
            port = _connect_line(sock)
        except (ValueError, OSError):
            self.log("main", "vsock: error adding local-init connection: Invalid CONNECT")
            sock.close()
            return
        host_port = self._host_port
        self._host_port = HOST_PORT_FIRST + (host_port + 1 - HOST_PORT_FIRST) % HOST_PORTS
        fault = self.faults.draw("restored-connect") if self._restored else None
        fault = fault or self.faults.draw("connect")
        if self._wedged:
            threading.Event().wait()
        suffer(fault)
        self._running.wait()
        stream = None if fault and fault["do"] == "close" else self.guest.connect(port)
        if stream is None:
            sock.close()
            return
        ok = b"OK %d\n" % host_port
        match fault and fault["do"]:
            case "reset":
                sock.sendall(ok)
                sock.close()
                stream.close()
                return
            case "join":
                stream.sendall(sock.recv(65_536))  # what came right behind CONNECT
                sock.sendall(ok + stream.recv(65_536))
            case "split":
                sock.sendall(ok[:4])
                time.sleep(0.01)
                sock.sendall(ok[4:])
            case _:
                sock.sendall(ok)
        self.splice(sock, stream)

    def splice(self, host: socket.socket, guest: socket.socket) -> None:
        """Carry bytes both ways in the background. There is no half-close: see the two ends."""
        self._streams |= {host, guest}
        threading.Thread(target=self._carry, args=(host, guest), daemon=True).start()

    def _carry(self, host: socket.socket, guest: socket.socket) -> None:
        with suppress(OSError, ValueError):
            poll = select.poll()
            poll.register(host, select.POLLIN)
            poll.register(guest, select.POLLIN)
            while True:
                for fd, event in poll.poll():
                    source, sink = (host, guest) if fd == host.fileno() else (guest, host)
                    data = source.recv(65_536) if event & select.POLLIN else b""
                    if data:
                        sink.sendall(data)
                    elif source is host or event & select.POLLHUP:
                        raise OSError("closed: to the host an end is the end of both directions")
                    else:
                        poll.modify(guest, 0)  # the guest said all it has to say, which the host is not told
        self._drop(host, guest)

    def _drop(self, *socks: socket.socket) -> None:
        for sock in socks:
            self._streams.discard(sock)
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _reset_streams(self) -> None:
        for sock in list(self._streams):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    # The log.

    def log(self, thread: str, message: str, level: str = "Info") -> None:
        """One line, in one write; lost where nobody reads."""
        if self._log is not None and _LEVELS.index(level) <= _LEVELS.index(self._level):
            now = time.time()
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e9):09d}"
            with suppress(OSError):
                os.write(self._log, f"{stamp} [{self.id}:{thread}] {message}\n".encode())

    def _open_log(self, path: str | None, level: str) -> None:
        self._level = {"warn": "Warning"}.get(level.lower(), level.capitalize())
        if path is None:
            return
        try:
            self._log = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600)
        except OSError as error:
            raise Fault(f"Logger error: Failed to open target file: {_os_error(error)}") from error


_LEVELS = ("Off", "Error", "Warning", "Info", "Debug", "Trace")


class _fatal:  # noqa: N801  # reads as the statement that it is
    """Within the block a fault is fatal, and its text is continued from ours."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, Fault):
            raise Fatal(f"{self._prefix}{error}") from error


def _os_error(error: OSError) -> str:
    """As the C library of the released programs says it."""
    words = {98: "Address in use"}.get(error.errno, os.strerror(error.errno))
    return f"{words} (os error {error.errno})"


def _readable(path: str, prefix: str, suffix: str = "") -> None:
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        raise Fault(f"{prefix}{_os_error(error)}{suffix}") from error


def _connect_line(sock: socket.socket) -> int:
    """The port of a CONNECT line, read as Firecracker does: what is not there at once never will be."""
    select.select([sock], [], [])
    line = sock.recv(10, socket.MSG_DONTWAIT)
    if len(line) < 10:
        raise ValueError("short")
    while not line.endswith(b"\n") and len(line) < 32:
        byte = sock.recv(1, socket.MSG_DONTWAIT)
        if not byte:
            raise ValueError("closed")
        line += byte
    words = line.decode().split()
    if words[0].lower() != "connect" or not re.fullmatch(r"[0-9]{1,10}", words[1]) or int(words[1]) >= 1 << 32:
        raise ValueError("no CONNECT")
    return int(words[1])


class Api:
    """The API's socket: one request at a time, whoever sends it."""

    def __init__(self, machine: Machine, journal: str | None) -> None:
        self._machine = machine
        self._journal = journal
        self._turn = threading.Lock()
        self._open = 0

    def serve(self, path: str) -> None:
        """Bind, listen and answer for ever."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(path)
        except OSError:
            print(f'Error: RunWithApi(FailedToBindSocket("{path}"))', file=sys.stderr)
            self._machine.log(
                "main", f"Failed to open the API socket at: {path}. Check that it is not already used.", "Error"
            )
            self._machine.log("main", "Firecracker exiting with error. exit_code=1", "Error")
            sys.exit(1)
        suffer(self._machine.faults.draw("bound"))
        listener.listen(4096)
        self._machine.log("main", f'Listening on API socket ("{path}").')
        self._machine.log("fc_api", "API server started.")
        threading.Thread(target=self._accept_all, args=(listener,), daemon=True).start()
        self._machine.run_errands()

    def _accept_all(self, listener: socket.socket) -> None:
        while True:
            sock, _ = listener.accept()
            if self._open >= CONNECTIONS_MAX:
                sock.sendall(
                    b"HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n"
                    b'{ "error": "Too many open connections" }'
                )
                sock.close()
                continue
            self._open += 1
            threading.Thread(target=self._converse, args=(sock,), daemon=True).start()

    def _converse(self, sock: socket.socket) -> None:
        try:
            with sock, sock.makefile("rb") as lines, suppress(OSError, EOFError):
                while True:
                    try:
                        request = _read_request(lines)
                    except Spoiled as spoiled:
                        text = f"{spoiled}\nAll previous unanswered requests will be dropped."
                        sock.sendall(_reply(400, f'{{ "error": "{text}" }}'))
                        return  # a client has to close it as well
                    with self._turn:
                        self._answer(sock, *request)
        finally:
            self._open -= 1

    def _answer(self, sock: socket.socket, method: str, path: str, raw: bytes) -> None:
        endpoint = f"{method} /{path}"
        self._machine.log("fc_api", f'The API server received a {method.title()} request on "/{path}".')
        fault = self._machine.faults.draw(endpoint)
        suffer(fault)
        if fault and fault["do"] == "close":
            sock.close()
            raise EOFError
        ending, answer, status = False, None, 204
        try:
            if fault and fault["do"] == "fail":
                raise Fault(fault["message"])
            answer = self._machine.call(method, path, _checked_body(method, path, raw, self._machine.version))
        except Fault as wrong:
            status, answer, ending = 400, {"fault_message": str(wrong)}, isinstance(wrong, Fatal)
        else:
            status = 204 if answer is None else 200
        self._note(method, path, raw, status, answer)
        suffer(self._machine.faults.draw(endpoint, after=True))
        sock.sendall(_reply(status, None if answer is None else json.dumps(answer, separators=(",", ":"))))
        if ending:
            self._machine.log("main", "Firecracker exiting with error. exit_code=1", "Error")
            os._exit(1)

    def _note(self, method: str, path: str, raw: bytes, status: int, answer: dict | None) -> None:
        if self._journal is not None:
            body = json.loads(raw) if raw else None
            noted = {"id": self._machine.id, "method": method, "path": f"/{path}", "body": body}
            with open(self._journal, "ab", buffering=0) as file:
                file.write(json.dumps(noted | {"status": status, "answer": answer}).encode() + b"\n")


def _read_request(lines: socket.SocketIO) -> tuple[str, str, bytes]:
    """Method, path without leading slashes, body. Raises `EOFError` at the end, `Spoiled` for what is none."""
    head = []
    while (line := lines.readline(LINE_BYTES_MAX + 1)) not in (b"\r\n", b""):
        if len(line) > LINE_BYTES_MAX:
            raise Spoiled("Invalid header. Reason: Header line exceeded.")
        head.append(line.decode("latin-1").strip())
    if not line:
        raise EOFError
    try:
        method, target, version = head[0].split(" ")
    except (ValueError, IndexError):
        raise Spoiled("Invalid request.") from None
    if method not in ("GET", "PUT", "PATCH", "DELETE"):
        raise Spoiled("Invalid HTTP Method: Unsupported HTTP method.")
    if version not in ("HTTP/1.0", "HTTP/1.1"):
        raise Spoiled("Invalid HTTP Version: Unsupported HTTP version.")
    fields = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in head[1:])}
    length = int(fields.get("content-length", "0"))
    if length > BODY_BYTES_MAX:
        raise Spoiled(
            f"Request payload with size {length} is larger than the limit of {BODY_BYTES_MAX} allowed by server."
        )
    path = re.sub(r"^http://[^/]*", "", target).strip("/")
    return method, path, lines.read(length)


def _reply(status: int, body: str | None) -> bytes:
    head = f"HTTP/1.1 {status} \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body.encode())}\r\n"
    return f"{head}\r\n{body or ''}".encode()


_GETS = ("", "version", "machine-config", "vm/config")


def _checked_body(method: str, path: str, raw: bytes, version: str) -> dict | None:
    """The body of a request that the API knows. Raises `Fault` for any other."""
    parts = path.split("/")
    if method == "GET" and path in _GETS:
        if raw:
            raise Fault("GET request cannot have a body.")
        return None
    if path == "snapshot":
        raise Fault("Missing snapshot operation type.")
    name = f"{method} {path if parts[0] == 'snapshot' else parts[0]}"
    if name not in BODIES or len(parts) != (2 if parts[0] in ("snapshot", "drives") else 1):
        raise Fault(f"Invalid request method and/or path: {method} {parts[0]}.")
    if parts[0] == "drives":
        if not parts[1]:
            raise Fault("The ID cannot be empty.")
        if not re.fullmatch(r"[A-Za-z0-9_]+", parts[1]):
            raise Fault("API Resource IDs can only contain alphanumeric characters and underscores.")
    if not raw:
        raise Fault(f"Empty {method} request.")
    return _deserialized(name, raw, version)


def _deserialized(name: str, raw: bytes, version: str) -> dict:
    fields = {field.lstrip("*"): kind for field, kind in BODIES[name].items()}
    if name == "PUT snapshot/load":
        fields = {field: kind for field, kind in fields.items() if _known(field, version)}
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise _serde(str(error)) from error
    if not isinstance(body, dict):
        raise _serde("invalid type: expected struct")
    expected = ", ".join(f"`{field}`" for field in fields)
    for field, value in body.items():
        if field not in fields:
            raise _serde(f"unknown field `{field}`, expected one of {expected} at line 1 column {len(raw)}")
        if not isinstance(value, fields[field]) or (isinstance(value, bool) and fields[field] == NUMBER):
            raise _serde(f"invalid type for `{field}` at line 1 column {len(raw)}")
    for field in BODIES[name]:
        if field.startswith("*") and field[1:] not in body:
            raise _serde(f"missing field `{field[1:]}` at line 1 column {len(raw)}")
    _check_variants(name, body)
    return body


def _check_variants(name: str, body: dict) -> None:
    allowed = {
        "PUT actions": ("action_type", ("InstanceStart", "FlushMetrics", "SendCtrlAltDel")),
        "PATCH vm": ("state", ("Paused", "Resumed")),
        "PUT snapshot/create": ("snapshot_type", ("Full", "Diff")),
    }
    if name in allowed:
        field, variants = allowed[name]
        if body.get(field, variants[0]) not in variants:
            raise _serde(f"unknown variant `{body[field]}`, expected one of {', '.join(f'`{v}`' for v in variants)}")
    if name == "PUT snapshot/load" and ("mem_backend" in body) == ("mem_file_path" in body):
        many = "too many fields: either `mem_backend` or `mem_file_path` exclusively is required"
        raise _serde(
            many if "mem_backend" in body else "missing field: either `mem_backend` or `mem_file_path` is required"
        )


def _known(field: str, version: str) -> bool:
    number = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if field == "clock_realtime":
        return number >= (1, 15, 1) or (1, 14, 4) <= number < (1, 15, 0)
    return number >= SINCE.get(field, (0, 0, 0))


def _serde(text: str) -> Fault:
    return Fault(f"An error occurred when deserializing the json body of a request: {text}.")


def main(argv: list[str]) -> None:
    """Be Firecracker until killed."""
    assert argv[0] == "--double", argv
    with open(argv[1]) as file:
        config = json.load(file)
    rest = argv[2:]
    if rest == ["--version"]:
        print(f"Firecracker v{config.get('version', '1.17.0')}\n")
        print(FAREWELL)
        return
    if rest == ["--snapshot-version"]:
        print(f"v{config.get('snapshot_version', '12.0.0')}")
        print(FAREWELL)
        return
    arguments = dict(zip(rest[::2], rest[1::2], strict=True))
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", arguments.get("--id", "anonymous-instance")):
        os.abort()
    faults = Faults(config, argv[1])
    machine = Machine(arguments, config, faults)
    machine.log("main", f"Running Firecracker v{machine.version}")
    suffer(faults.draw("start"))
    Api(machine, config.get("journal")).serve(arguments.get("--api-sock", "/run/firecracker.socket"))


if __name__ == "__main__":
    main(sys.argv[1:])
