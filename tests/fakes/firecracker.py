"""A double of Firecracker: its command line, API and hybrid vsock, with a process where the guest would be.

A program of its own (standard library only, quick to start), `program.py firecracker --double CONFIG [Firecracker's
flags]`. The root file system that it is given is JSON: `argv`, `env` and `cwd` of the guest, which gets its vsock as a
process guest does (`SUBSTRATE_LISTEN_FD`, `SUBSTRATE_DIAL_FD`); without `argv` the double answers in the guest's place.
A snapshot remembers that program and not its memory: each clone starts it anew, and so is as different from its
siblings as a real one must be made.

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

from fakes import serde

MIB = 1024 * 1024
CONNECTIONS_MAX = 10
VSOCK_CONNECTIONS_MAX = 1023
LINE_BYTES_MAX = 1024
BODY_BYTES_MAX = 51_200
VCPUS_MAX = 32
SMALLEST = {"vcpu_count": 1, "mem_size_mib": 128, "smt": False, "track_dirty_pages": False, "huge_pages": "None"}
DRIVE_FIELDS = (
    *("drive_id", "partuuid", "is_root_device", "cache_type", "is_read_only", "path_on_host"),
    *("rate_limiter", "io_engine", "socket"),
)
HOST_PORT_FIRST, HOST_PORTS = 1 << 30, 1 << 30
NOT_STARTED, RUNNING, PAUSED = "Not started", "Running", "Paused"
BEFORE_START = "The requested operation is not supported before starting the microVM."
AFTER_START = "The requested operation is not supported after starting the microVM."
MAGIC = b"FCDOUBLE"
FAREWELL = "2026-01-01T00:00:00.000000000 [anonymous-instance:main] Firecracker exiting successfully. exit_code=0"
RESTORE = "Load snapshot error: Failed to restore from snapshot: "


def _records(version: str) -> dict[str, serde.Record]:
    """What each call takes, by a release."""
    backend = serde.Record(
        "MemBackendConfig", {"*backend_path": serde.TEXT, "*backend_type": serde.OneOf("File", "Uffd")}
    )
    override = serde.Record("VsockOverride", {"*uds_path": serde.TEXT}, others=True)
    text, flag, anything = (serde.Optional(kind) for kind in (serde.TEXT, serde.FLAG, serde.ANY))
    pages = serde.OneOf("None", "2M")
    load = {
        "*snapshot_path": serde.TEXT,
        "mem_file_path": text,
        "mem_backend": serde.Optional(backend),
        "enable_diff_snapshots": serde.FLAG,
        "track_dirty_pages": serde.FLAG,
        "resume_vm": serde.FLAG,
        "network_overrides": serde.ANY,
        "vsock_override": serde.Optional(override),
        "clock_realtime": serde.FLAG,
        "huge_pages": pages,
    }
    machine = {
        "vcpu_count": serde.U8,
        "mem_size_mib": serde.USIZE,
        "smt": serde.FLAG,
        "cpu_template": serde.Optional(serde.OneOf("C3", "T2", "T2S", "T2CL", "T2A", "V1N1", "None")),
        "track_dirty_pages": serde.FLAG,
        "huge_pages": pages,
    }
    drive = {
        "*drive_id": serde.TEXT,
        "partuuid": text,
        "*is_root_device": serde.FLAG,
        "cache_type": serde.OneOf("Unsafe", "Writeback"),
        "is_read_only": flag,
        "path_on_host": text,
        "rate_limiter": anything,
        "io_engine": serde.Optional(serde.OneOf("Async", "Sync")),
        "socket": text,
    }
    level = serde.Optional(serde.Level())
    required = {f"*{name}" if name in ("vcpu_count", "mem_size_mib") else name: kind for name, kind in machine.items()}
    return {
        "PUT machine-config": serde.Record("MachineConfig", required),
        "PATCH machine-config": serde.Record("MachineConfigUpdate", machine),
        "PUT boot-source": serde.Record(
            "BootSourceConfig", {"*kernel_image_path": serde.TEXT, "initrd_path": text, "boot_args": text}
        ),
        "PUT drives": serde.Record("BlockDeviceConfig", drive),
        "PATCH drives": serde.Record(
            "BlockDeviceUpdateConfig", {"*drive_id": serde.TEXT, "path_on_host": text, "rate_limiter": anything}
        ),
        "PUT vsock": serde.Record(
            "VsockDeviceConfig", {"vsock_id": text, "*guest_cid": serde.U32, "*uds_path": serde.TEXT}
        ),
        "PUT entropy": serde.Record("EntropyDeviceConfig", {"rate_limiter": anything}),
        "PUT actions": serde.Record(
            "ActionBody", {"*action_type": serde.OneOf("FlushMetrics", "InstanceStart", "SendCtrlAltDel")}
        ),
        "PATCH vm": serde.Record("Vm", {"*state": serde.OneOf("Paused", "Resumed")}),
        "PUT snapshot/create": serde.Record(
            "CreateSnapshotParams",
            {
                "snapshot_type": serde.OneOf("Diff", "Full"),
                "*snapshot_path": serde.TEXT,
                "*mem_file_path": serde.TEXT,
            },
        ),
        "PUT snapshot/load": serde.Record(
            "LoadSnapshotConfig", {name: kind for name, kind in load.items() if _known(name, version)}
        ),
        "PUT logger": serde.Record(
            "LoggerConfig",
            {"log_path": text, "level": level, "show_level": flag, "show_log_origin": flag, "module": text},
        ),
        "PUT metrics": serde.Record(
            "MetricsConfig",
            {"*metrics_path": serde.TEXT, "emit_id": serde.FLAG, "properties": serde.ANY},
            others=True,
        ),
        "PUT serial": serde.Record("SerialConfig", {"serial_out_path": text, "rate_limiter": anything}),
    }


DEPRECATED = {
    "PUT vsock": ("vsock_id",),
    "PUT machine-config": ("cpu_template",),
    "PATCH machine-config": ("cpu_template",),
    "PUT snapshot/load": ("mem_file_path", "enable_diff_snapshots"),
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
        self.config: dict = {"machine-config": SMALLEST, "drives": {}}
        self.guest: Guest | None = None
        self._configured = False
        self._metered = False
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
                return self.config["machine-config"]
            case "GET", ["vm", "config"]:
                return self._configuration()
            case "GET", ["mmds"]:
                return {}
            case "GET", ["balloon"]:
                raise Fault("Balloon config error: No balloon device found.")
            case "PUT", ["logger"]:
                self._before_start()
                self._open_log(body.get("log_path"), body.get("level") or "Info")
            case "PUT", ["metrics"]:
                self._before_start()
                self._open_metrics(body["metrics_path"])
            case "PUT", ["serial"]:
                self._before_start()
            case "PUT" | "PATCH", ["machine-config"]:
                self._before_start(configuring=True)
                self.config["machine-config"] = self._sized(body, replaced=method == "PUT")
            case "PUT", ["entropy"]:
                self._before_start(configuring=True)
                self.config["entropy"] = {"rate_limiter": None} | body
            case "PUT", ["boot-source"]:
                self._configure_boot(body)
            case "PUT", ["drives", drive_id]:
                self._configure_drive(drive_id, body)
            case "PUT", ["vsock"]:
                self._before_start(configuring=True)
                self._bind(body["uds_path"], "Vsock config error: Cannot create backend for vsock device: ")
                self.config["vsock"] = {"guest_cid": body["guest_cid"], "uds_path": body["uds_path"]}
            case "PATCH" | "DELETE", ["drives", _]:
                if self.state == NOT_STARTED:
                    raise Fault(BEFORE_START)
            case "PUT", ["actions"]:
                self._act(body["action_type"])
            case "PATCH", ["vm"]:
                self._turn(body["state"])
            case "PUT", ["snapshot", "create"]:
                self._create(body)
            case "PUT", ["snapshot", "load"]:
                self._load(body)
        return None

    def _before_start(self, *, configuring: bool = False) -> None:
        if self.state != NOT_STARTED:
            raise Fault(AFTER_START)
        self._configured |= configuring  # an attempt counts, whatever comes of it

    def _sized(self, body: dict, *, replaced: bool) -> dict:
        size = SMALLEST | body if replaced else self.config["machine-config"] | body
        vcpus, large = size["vcpu_count"], size["huge_pages"] == "2M"
        if not 0 < vcpus <= VCPUS_MAX or (size["smt"] and vcpus > 1 and vcpus % 2):
            raise Fault(
                "Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 or an "
                "even number if SMT is enabled."
            )
        if size["mem_size_mib"] == 0 or (large and size["mem_size_mib"] % 2):
            raise Fault(
                "Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured page "
                "size."
            )
        return {name: size[name] for name in SMALLEST}

    def _configuration(self) -> dict:
        """All that is configured, with null for what is not."""
        drives = [dict.fromkeys(DRIVE_FIELDS) | drive for drive in self.config["drives"].values()]
        boot = {"kernel_image_path": "", "initrd_path": None, "boot_args": None} | self.config.get("boot-source", {})
        return {
            "balloon": None,
            "drives": drives,
            "boot-source": boot,
            "cpu-config": None,
            "logger": None,
            "machine-config": self.config["machine-config"],
            "metrics": None,
            "mmds-config": None,
            "network-interfaces": [],
            "vsock": self.config.get("vsock"),
            "entropy": self.config.get("entropy"),
            "pmem": [],
            "memory-hotplug": None,
        }

    def _configure_boot(self, body: dict) -> None:
        self._before_start(configuring=True)
        _readable(body["kernel_image_path"], "Boot source error: The kernel file cannot be opened: ")
        if body.get("initrd_path") is not None:
            why = "Boot source error: The initrd file cannot be opened due to invalid path or invalid permissions. "
            _readable(body["initrd_path"], why)
        self.config["boot-source"] = body

    def _configure_drive(self, drive_id: str, body: dict) -> None:
        if drive_id != body["drive_id"]:
            raise Fault("The id from the path does not match the id from the body!")
        self._before_start(configuring=True)
        others = [drive for name, drive in self.config["drives"].items() if name != drive_id]
        if body["is_root_device"] and any(drive["is_root_device"] for drive in others):
            raise Fault("Drive config error: A root block device already exists!")
        why = "Drive config error: Unable to create the virtio block device: "
        if body.get("path_on_host") is None:
            raise Fault(f"{why}Invalid block config.")
        path = body["path_on_host"]
        _readable(path, f"{why}Virtio backend error: Error manipulating the backing file: ", f" {path}")
        usual = {"is_read_only": False, "cache_type": "Unsafe", "io_engine": "Sync"}
        self.config["drives"][drive_id] = usual | body

    def _open_metrics(self, path: str) -> None:
        why = "Metrics error: Cannot initialize the metrics system due to bad user input: "
        if self._metered:
            raise Fault(f"{why}Reinitialization of metrics not allowed.")
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600))
        except OSError as error:
            raise Fault(f"{why}{_os_error(error)}") from error
        self._metered = True

    def _act(self, action: str) -> None:
        if action == "InstanceStart":
            self._before_start()
            if "boot-source" not in self.config:
                raise Fault("Start microvm error: Cannot start microvm without kernel configuration.")
            roots = [drive["path_on_host"] for drive in self.config["drives"].values() if drive["is_root_device"]]
            self._run(_program(roots[0]) if roots else {})  # a kernel without one panics, and that is the guest's end
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
        for override in body.get("network_overrides") or []:
            raise Fatal(f"{RESTORE}Failed to get snapshot state from file: Unknown Network Device. {override}"[:-3])
        if body.get("vsock_override") is not None:
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
        if not data.startswith(MAGIC):
            raise Fatal(f"{bad}An error occurred during bitcode serialization: bitcode error")
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
        assert self._level in _LEVELS
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


def _program(rootfs: str) -> dict:
    """What is to run in the guest's place; a file that is none of ours has nothing to run."""
    with open(rootfs) as file:
        try:
            return json.loads(file.read())
        except ValueError:
            return {}


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
        self._records = _records(machine.version)
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
            with sock, suppress(OSError, EOFError):
                requests = Requests(sock)
                while True:
                    try:
                        request = requests.read()
                    except Spoiled as spoiled:
                        text = f"{spoiled}\nAll previous unanswered requests will be dropped."
                        sock.sendall(_reply(400, f'{{ "error": "{text}" }}'))
                        continue
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
        ending, answer, body = False, None, None
        try:
            if fault and fault["do"] == "fail":
                raise Fault(fault["message"])
            body = _checked_body(method, path, raw, self._records)
            answer = self._machine.call(method, path, body)
        except Fault as wrong:
            status, answer, ending = 400, {"fault_message": str(wrong)}, isinstance(wrong, Fatal)
        else:
            status = 204 if answer is None else 200
        self._note(method, path, raw, status, answer)
        suffer(self._machine.faults.draw(endpoint, after=True))
        name = f"{method} {path if path.startswith('snapshot') else path.split('/', maxsplit=1)[0]}"
        deprecated = any((body or {}).get(field) is not None for field in DEPRECATED.get(name, ()))
        text = None if answer is None else json.dumps(answer, separators=(",", ":"), ensure_ascii=False)
        sock.sendall(_reply(status, text, deprecated=deprecated))
        if ending:
            self._machine.log("main", "Firecracker exiting with error. exit_code=1", "Error")
            os._exit(1)

    def _note(self, method: str, path: str, raw: bytes, status: int, answer: dict | None) -> None:
        if self._journal is not None:
            try:
                body = json.loads(raw) if raw else None
            except ValueError:
                body = raw.decode(errors="replace")
            noted = {"id": self._machine.id, "method": method, "path": f"/{path}", "body": body}
            with open(self._journal, "ab", buffering=0) as file:
                file.write(json.dumps(noted | {"status": status, "answer": answer}).encode() + b"\n")


class Requests:
    """What a connection says, read in pieces of 1 KiB; after a bad header the next line counts as one, too."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""
        self._asked: tuple[str, str] | None = None
        self._fields: dict[str, str] = {}

    def read(self) -> tuple[str, str, bytes]:
        """Method, path without leading slashes, body. Raises `EOFError` at the end, `Spoiled` for what is none."""
        try:
            if self._asked is None:
                self._asked, self._fields = self._request_line(), {}
            while line := self._line():
                self._field(line)
            length = int(self._fields.get("content-length", "0"))
            if length > BODY_BYTES_MAX:
                self._asked = None
                raise Spoiled(
                    f"Request payload with size {length} is larger than the limit of {BODY_BYTES_MAX} allowed by "
                    "server."
                )
        except Spoiled:
            self._buffer = b""
            raise
        if length and self._fields.get("expect") == "100-continue":
            self._sock.sendall(b"HTTP/1.1 100 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n")
        while len(self._buffer) < length:
            self._hear(BODY_BYTES_MAX)
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        (method, path), self._asked = self._asked, None
        return method, path, body

    def _request_line(self) -> tuple[str, str]:
        try:
            method, target, version = self._line().decode("latin-1").split(" ", 2)
        except ValueError:
            raise Spoiled("Invalid request.") from None
        if method not in ("GET", "PUT", "PATCH", "DELETE"):
            raise Spoiled("Invalid HTTP Method: Unsupported HTTP method.")
        if not target:
            raise Spoiled("Invalid URI: Empty URI not allowed.")
        if version not in ("HTTP/1.0", "HTTP/1.1"):
            raise Spoiled("Invalid HTTP Version: Unsupported HTTP version.")
        return method, re.sub(r"^http://[^/]*", "", target).strip("/")

    def _field(self, line: bytes) -> None:
        name, colon, value = line.decode("latin-1").partition(":")
        value = value.strip()
        if not colon:
            raise Spoiled(f"Invalid header. Reason: Header is incorrectly formatted. Key: {name}")
        refused = None
        if name.lower() == "content-length" and not re.fullmatch(r"[0-9]{1,9}", value):
            refused = value
        if name.lower() == "accept-encoding":
            refused = next((each.strip() for each in value.split(",") if _REFUSES_PLAIN.fullmatch(each)), None)
        if refused is not None:
            raise Spoiled(
                f"Invalid header. Reason: Invalid value. Key:{name}; Value:{f' {refused}' if refused else ''}"
            )
        self._fields[name.lower()] = value

    def _line(self) -> bytes:
        while b"\r\n" not in self._buffer:
            if len(self._buffer) >= LINE_BYTES_MAX:
                raise Spoiled("Invalid request.")
            self._hear(LINE_BYTES_MAX - len(self._buffer))
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return line

    def _hear(self, most: int) -> None:
        data = self._sock.recv(most)
        if not data:
            raise EOFError
        self._buffer += data


_REFUSES_PLAIN = re.compile(r"\s*(identity|\*)\s*;\s*q=0(\.0*)?\s*")


def _reply(status: int, body: str | None, *, deprecated: bool = False) -> bytes:
    head = f"HTTP/1.1 {status} \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n"
    if deprecated:
        head += "Deprecation: true\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body.encode())}\r\n"
    return f"{head}\r\n{body or ''}".encode()


_GETS = ("", "version", "machine-config", "vm/config", "mmds", "balloon")


def _checked_body(method: str, path: str, raw: bytes, records: dict[str, serde.Record]) -> dict | None:
    """The body of a request that the API knows. Raises `Fault` for any other."""
    parts = path.split("/")
    if method == "GET" and path in _GETS:
        if raw:
            raise Fault("GET request cannot have a body.")
        return None
    if path == "snapshot":
        raise Fault("Missing snapshot operation type.")
    name = f"{method} {path if parts[0] == 'snapshot' else parts[0]}"
    if parts[0] == "drives" and method != "GET":
        if len(parts) == 1:
            raise Fault("The ID cannot be empty.")
        if not re.fullmatch(r"[A-Za-z0-9_]+", parts[1]):
            raise Fault("API Resource IDs can only contain alphanumeric characters and underscores.")
        if method == "DELETE":
            if raw:
                raise Fault("Empty Delete request.")
            return None
    if name not in records or len(parts) != (2 if parts[0] in ("snapshot", "drives") else 1):
        known = parts[0] == "snapshot" and method == "PUT" and len(parts) == 2
        raise Fault(f"Invalid request method and/or path: {method} {f'/{path}' if known else parts[0]}.")
    if not raw:
        raise Fault(f"Empty {method} request.")
    try:
        body = serde.read(raw.decode(errors="replace"), records[name])
    except serde.Refused as refused:
        raise _serde(str(refused)) from refused
    if name == "PATCH machine-config" and not body:
        raise Fault("Empty PATCH request.")
    if name == "PUT snapshot/load":
        _check_backend(body)
    return body


def _check_backend(body: dict) -> None:
    backends = [field for field in ("mem_backend", "mem_file_path") if body.get(field) is not None]
    if not backends:
        raise _serde("missing field: either `mem_backend` or `mem_file_path` is required")
    if len(backends) > 1:
        raise _serde("too many fields: either `mem_backend` or `mem_file_path` exclusively is required")


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
