"""The API of one Firecracker process: typed requests, one at a time, on one connection that is kept alive.

Its quirks: replies without a reason phrase; a 204 without a length; a second kind of error whose JSON is not quite
JSON, after which the connection is spoiled; and after some failures of a load the process ends.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, ClassVar, cast

import msgspec
from msgspec import Struct

from substrate_node.fcvm.release import Release
from substrate_node.processes.addresses import peer_address
from substrate_node.vmm import VmmError
from substrate_seam.http1 import BadReply, ReplyReader

NOT_STARTED, RUNNING, PAUSED = "Not started", "Running", "Paused"
CALL_WITHIN_S = 5.0
START_WITHIN_S = 30.0  # it reads the kernel; on an emulated processor it was seen to take over 5 s
PAUSE_WITHIN_S = 35.0  # Firecracker itself gives up on its vCPUs after 30 s
LOAD_WITHIN_S = 60.0
CREATE_WITHIN_S = 600.0  # it writes all memory of the guest and waits for the disk

_GOING = ("Load snapshot error: Failed to restore", "Load snapshot error: Failed to resume")
"""After a 400 that begins so, the process ends with exit status 1."""
_ADVICE = (  # the first fragment found in a message decides; numbers, because the words depend on the C library
    ("unknown field", "This release of Firecracker does not know the field: install a newer one."),
    ("Invalid data version", "Another release of Firecracker made this base: it has to be built again."),
    ("bitcode", "The state file is damaged: the base has to be built again."),
    ("CRC64", "The state file is damaged: the base has to be built again."),
    ("File too short", "The state file is cut short: the base has to be built again."),
    ("os error 13", "Let the user that Firecracker runs as read the file."),
    ("os error 28", "The disk is full: free some space where the state root is."),
    ("os error 98", "Something else has bound the socket: remove the guest's directory and try again."),
    ("os error 2)", "Put the file back, or name the right one."),
    ("/dev/kvm", "Give this user access to /dev/kvm."),
    ("Too many open connections", "This is a defect of ours: only one connection is ever needed."),
)


class ApiError(VmmError):
    """A request failed. `going` says that the process is ending because of it; `status` is 0 without a reply."""

    def __init__(self, message: str, *, status: int = 0, fault: str = "", going: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.fault = fault
        self.going = going


class Request(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body of one call. The class says where it goes, how long it may take, and what state it leads to."""

    method: ClassVar[str] = "PUT"
    path: ClassVar[str]
    within_s: ClassVar[float] = CALL_WITHIN_S

    @property
    def leads_to(self) -> str | None:
        """The state of the VM after it; None: as before."""
        return None


class MachineConfig(Request, frozen=True, kw_only=True):
    """The size of the machine."""

    path = "/machine-config"
    vcpu_count: int
    mem_size_mib: int


class BootSource(Request, frozen=True, kw_only=True):
    """The kernel and its command line."""

    path = "/boot-source"
    kernel_image_path: str
    boot_args: str
    initrd_path: str | None = None


class RootDrive(Request, frozen=True, kw_only=True, omit_defaults=False):
    """The root file system, which no guest may write: clones share it."""

    path = "/drives/rootfs"
    path_on_host: str
    drive_id: str = "rootfs"
    is_root_device: bool = True
    is_read_only: bool = True


class Vsock(Request, frozen=True, kw_only=True):
    """The guest's socket device."""

    path = "/vsock"
    guest_cid: int
    uds_path: str


class Entropy(Request, frozen=True, kw_only=True):
    """A source of random bytes for the guest."""

    path = "/entropy"


class Start(Request, frozen=True, kw_only=True, omit_defaults=False):
    """Start the configured machine."""

    path = "/actions"
    within_s = START_WITHIN_S
    action_type: str = "InstanceStart"

    @property
    def leads_to(self) -> str:
        """It runs."""
        return RUNNING


class Pause(Request, frozen=True, kw_only=True, omit_defaults=False):
    """Halt the vCPUs."""

    method = "PATCH"
    path = "/vm"
    within_s = PAUSE_WITHIN_S
    state: str = "Paused"

    @property
    def leads_to(self) -> str:
        """It stands still."""
        return PAUSED


class CreateSnapshot(Request, frozen=True, kw_only=True):
    """Write state and memory of the paused machine to new files."""

    path = "/snapshot/create"
    within_s = CREATE_WITHIN_S
    snapshot_path: str
    mem_file_path: str


class MemoryBackend(Struct, frozen=True, kw_only=True):
    """Where a restored machine gets its memory from: mapped from a file, privately."""

    backend_path: str
    backend_type: str = "File"


class VsockOverride(Struct, frozen=True, kw_only=True):
    """Another path for the vsock device than the one recorded."""

    uds_path: str


class LoadSnapshot(Request, frozen=True, kw_only=True):
    """Become the machine in the files."""

    path = "/snapshot/load"
    within_s = LOAD_WITHIN_S
    snapshot_path: str
    mem_backend: MemoryBackend
    resume_vm: bool = False
    vsock_override: VsockOverride | None = None
    clock_realtime: bool = False
    huge_pages: str | None = None

    @property
    def leads_to(self) -> str:
        """It runs, or waits to be resumed."""
        return RUNNING if self.resume_vm else PAUSED


class Api:
    """The API of one process. Close it in the end; a request given up half-way costs the connection, not the API.

    `release` is asked once by whoever starts processes, not per process; fields that it does not know are refused
    before anything is sent. `state` is what the last successful request led to.
    """

    def __init__(self, socket: Path, release: Release) -> None:
        self._socket = socket
        self._release = release
        self._connection: _Connection | None = None
        self.state = NOT_STARTED

    async def connect(self) -> None:
        """Connect, unless connected. Raises `OSError`: nobody listens (yet)."""
        if self._connection is None or self._connection.spent:
            with peer_address(self._socket) as address:
                loop = asyncio.get_running_loop()
                self._connection = (await loop.create_unix_connection(_Connection, address))[1]

    async def send(self, request: Request) -> None:
        """Make a request that has no answer but success. Raises `ApiError`."""
        endpoint = f"{request.method} {request.path}"
        body = msgspec.json.encode(request)
        for field in msgspec.json.decode(body):
            if not self._release.knows(field):
                raise ApiError(
                    f"{endpoint} ({self.state}) was not sent: Firecracker {self._release} does not know {field!r}"
                )
        await self._answered(endpoint, body, request.within_s)
        self.state = request.leads_to or self.state

    async def get(self, path: str) -> Any:  # noqa: ANN401  # JSON is any of its types
        """Ask for something, as JSON. Raises `ApiError`."""
        return msgspec.json.decode(await self._answered(f"GET {path}", b"", CALL_WITHIN_S))

    def close(self) -> None:
        """Drop the connection."""
        if self._connection is not None:
            self._connection.drop("it was closed by us")
            self._connection = None

    async def _answered(self, endpoint: str, body: bytes, within_s: float) -> bytes:
        try:
            async with asyncio.timeout(within_s):
                await self.connect()
                assert self._connection is not None
                status, answer = await self._connection.exchange(_head(endpoint, len(body)) + body)
        except TimeoutError:
            raise ApiError(f"{endpoint} ({self.state}) got no answer within {within_s:.0f} s") from None
        except OSError as error:
            raise ApiError(f"{endpoint} ({self.state}): {error}") from error
        if status < 300:
            return answer
        fault, spoiled = _fault(answer)
        if spoiled:
            self._connection.drop("it could not parse a request")
        advice = next((advice for fragment, advice in _ADVICE if fragment in fault), "")
        raise ApiError(
            f"{endpoint} ({self.state}) answered {status}: {fault} {advice}".rstrip(),
            status=status,
            fault=fault,
            going=fault.startswith(_GOING),
        )


class _Connection(asyncio.Protocol):
    """One connection: exchanges follow each other. It is spent when an exchange was given up, or the peer has gone."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._reader = ReplyReader()
        self._body = b""
        self._reply: asyncio.Future[int] | None = None
        self.spent = False

    async def exchange(self, request: bytes) -> tuple[int, bytes]:
        """Send a request; returns status and body. Raises `OSError`."""
        assert self._reply is None, "requests of one connection follow each other"
        assert self._transport is not None
        self._reader, self._body = ReplyReader(), b""
        self._reply = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            status = await self._reply
        except BaseException:
            self.drop("an exchange was given up")  # or its reply would be taken for that to the next request
            raise
        finally:
            self._reply = None
        if not self._reader.keep_alive:
            self.drop("it asked for a new connection")
        return status, self._body

    def drop(self, why: str) -> None:
        """Use it no more; whoever waits hears why."""
        self.spent = True
        if self._transport is not None:
            self._transport.abort()
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(ConnectionResetError(why))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Be connected."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one but in name

    def data_received(self, data: bytes) -> None:
        """Read some of the reply."""
        try:
            self._body += b"".join(self._reader.feed(data))
        except BadReply as wrong:
            self.drop(f"its reply is not HTTP: {wrong}")
            return
        if self._reader.complete and self._reply is not None and not self._reply.done():
            self._reply.set_result(self._reader.status)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail whoever waits: Firecracker never closes a good connection, so it has ended."""
        self.drop(f"it closed the connection{f' ({exc})' if exc else ''}: the process has ended")


def _head(endpoint: str, body_bytes: int) -> bytes:
    fields = f"\r\nContent-Type: application/json\r\nContent-Length: {body_bytes}" if body_bytes else ""
    return f"{endpoint} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json{fields}\r\n\r\n".encode()


def _fault(body: bytes) -> tuple[str, bool]:
    """What an error says, and whether it spoils the connection (the kind with a raw newline in its JSON)."""
    try:
        return str(msgspec.json.decode(body)["fault_message"]), False
    except (msgspec.DecodeError, KeyError, TypeError):
        text = body.decode(errors="replace").strip()
        return " ".join(text.removeprefix('{ "error": "').removesuffix('" }').split()), True
