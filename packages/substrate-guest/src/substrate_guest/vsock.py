"""Where a guest listens and dials: virtio sockets in a VM, Unix sockets handed over to a process guest."""

import asyncio
import os
import socket
import stat
import sys
import threading
from collections.abc import Awaitable, Callable, Container, Mapping, MutableMapping
from typing import Protocol

DATA_PORT = 1027
CONTROL_PORT = 1028
JOURNAL_PORT = 1029

LISTEN_VARIABLE = "SUBSTRATE_LISTEN_FD"
DIAL_VARIABLE = "SUBSTRATE_DIAL_FD"

HOST_CID = 2
BACKLOG = 64
HANDSHAKE_S = 5.0
CONNECT_BYTES_MAX = 32
RECEIVE_BYTES = 65536
PORT_MAX = 2**32 - 1

Answer = Callable[[socket.socket, bytes], Awaitable[None]]


class Vsock(Protocol):
    """The guest's end of its socket to the host."""

    own_kernel: bool
    """Whether this guest is a VM: clock, host name and entropy of the kernel are its own."""

    async def serve(self, answers: Mapping[int, Answer]) -> None:
        """Answer connections to the ports in `answers`, each in a task of its own, until cancelled.

        An answer gets the connected socket and the bytes that were already read from it; the socket is closed when it
        returns.
        """
        ...

    def dial(self, port: int, *, timeout_s: float) -> socket.socket:
        """A new blocking connection to the host's `port`.

        Raises `OSError` (`TimeoutError` after `timeout_s` seconds); any thread may call it.
        """
        ...


class KernelVsock:
    """AF_VSOCK, the socket family of a VM and its host."""

    own_kernel = True

    async def serve(self, answers: Mapping[int, Answer]) -> None:
        """See `Vsock.serve`; raises `OSError` when a port cannot be bound."""
        async with asyncio.TaskGroup() as ports:
            for port, answer in answers.items():
                ports.create_task(self._serve_port(port, answer), name=f"port-{port}")

    async def _serve_port(self, port: int, answer: Answer) -> None:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
            listener.bind((socket.VMADDR_CID_ANY, port))
            listener.listen(BACKLOG)
            await _serve_listener(listener, _without_handshake(answer))

    def dial(self, port: int, *, timeout_s: float) -> socket.socket:
        """See `Vsock.dial`."""
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect((HOST_CID, port))
            sock.settimeout(None)
        except BaseException:
            sock.close()
            raise
        return sock


class HybridVsock:
    """The same over Unix sockets the host made: one that listens for every port, and one that asks for connections.

    `listener` speaks Firecracker's hybrid vsock: a peer names its port with `CONNECT <port>` and reads `OK <port>`.
    `dialer` is SOCK_SEQPACKET: the decimal port goes out, one message with a connected descriptor comes back; a message
    without one is a refusal and says why.
    """

    own_kernel = False

    def __init__(self, listener: socket.socket, dialer: socket.socket | None = None) -> None:
        self._listener = listener
        self._dialer = dialer
        self._dialling = threading.Lock()

    async def serve(self, answers: Mapping[int, Answer]) -> None:
        """See `Vsock.serve`."""
        await _serve_listener(self._listener, _after_handshake(answers))

    def accept(self, ports: Container[int], *, within_s: float | None) -> tuple[int, socket.socket, bytes] | None:
        """The next connection to one of `ports`, without an event loop: its port, and bytes that were read already.

        Returns None after `within_s` seconds without one. The socket is the caller's to close.
        """
        self._listener.settimeout(within_s)
        while True:
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                return None
            except ConnectionError:  # a peer that left before it was accepted
                continue
            sock.settimeout(HANDSHAKE_S)
            try:
                port, received = _received_connect(sock)
                if port in ports:
                    sock.sendall(b"OK %d\n" % port)
                    return port, sock, received
            except (ValueError, OSError):  # it spoke something else, stalled or left: there is nobody to tell
                pass
            sock.close()

    def dial(self, port: int, *, timeout_s: float) -> socket.socket:
        """See `Vsock.dial`."""
        with self._dialling:  # one question at a time: an answer does not name its port
            if self._dialer is None:
                raise ConnectionRefusedError(
                    f"port {port} of the host cannot be reached: this guest has no way to dial"
                )
            self._dialer.settimeout(timeout_s)
            try:
                self._dialer.send(str(port).encode())
                descriptor, why = _received_descriptor(self._dialer)
            except TimeoutError:
                self._dialer.close()  # a late answer would be taken for the answer to the next question
                self._dialer = None
                raise
        if descriptor is None:
            reason = why.decode(errors="replace") or "the host closed the way to dial"
            raise ConnectionRefusedError(f"port {port} of the host refused: {reason}")
        return socket.socket(fileno=descriptor)

    def close(self) -> None:
        """Neither listen nor dial any more."""
        self._listener.close()
        if self._dialer is not None:
            self._dialer.close()


def from_environ(environ: MutableMapping[str, str]) -> Vsock:
    """The guest's vsock, as the host set it up; the descriptors and their variables are inherited no further.

    Raises `ValueError` when a variable does not hold the descriptor that it should.
    """
    listener = taken_socket(environ, LISTEN_VARIABLE, socket.SOCK_STREAM)
    dialer = taken_socket(environ, DIAL_VARIABLE, socket.SOCK_SEQPACKET)
    if listener is not None:
        return HybridVsock(listener, dialer)
    if dialer is not None:
        dialer.close()
        raise ValueError(f"{DIAL_VARIABLE} without {LISTEN_VARIABLE}: set both, or neither in a VM")
    return KernelVsock()


def taken_socket(environ: MutableMapping[str, str], variable: str, kind: socket.SocketKind) -> socket.socket | None:
    """The socket whose descriptor the host put into `variable`, which is taken away; None without one.

    Raises `ValueError` for what is no Unix socket of that kind.
    """
    value = environ.pop(variable, "")
    if not value:
        return None
    accepted = f"the number of an open AF_UNIX {kind.name} descriptor"
    try:
        descriptor = int(value)
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            raise ValueError("not a socket")
        os.set_inheritable(descriptor, False)  # noqa: FBT003  # it takes no keyword
        sock = socket.socket(fileno=descriptor)
    except (ValueError, OSError, OverflowError) as error:
        raise ValueError(f"{variable}: found {value!r} ({error}), accepted is {accepted}") from error
    if sock.family != socket.AF_UNIX or sock.type != kind:
        found = f"{sock.family.name} {sock.type.name}"
        sock.close()
        raise ValueError(f"{variable}: found {found}, accepted is {accepted}")
    return sock


def _received_descriptor(sock: socket.socket) -> tuple[int | None, bytes]:
    # Not `socket.recv_fds`: it drops its flags (seen in 3.11), and the descriptor would be inherited by every child.
    int_bytes = 4
    message, ancillary, _, _ = sock.recvmsg(1024, socket.CMSG_LEN(int_bytes), socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            return int.from_bytes(data[:int_bytes], sys.byteorder), message
    return None, message


async def _serve_listener(listener: socket.socket, answer: Callable[[socket.socket], Awaitable[None]]) -> None:
    loop = asyncio.get_running_loop()
    listener.settimeout(0)

    async def answered(sock: socket.socket) -> None:
        with sock:
            await answer(sock)

    async with asyncio.TaskGroup() as connections:
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except ConnectionError:  # a peer that left before it was accepted
                continue
            connections.create_task(answered(sock))


def _without_handshake(answer: Answer) -> Callable[[socket.socket], Awaitable[None]]:
    async def answered(sock: socket.socket) -> None:
        await answer(sock, b"")

    return answered


def _after_handshake(answers: Mapping[int, Answer]) -> Callable[[socket.socket], Awaitable[None]]:
    async def answered(sock: socket.socket) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                port, received = await _read_connect(sock)
                answer = answers.get(port)
                if answer is None:
                    return  # as a VM's socket does: an unknown port closes
                await asyncio.get_running_loop().sock_sendall(sock, b"OK %d\n" % port)
        except (ValueError, OSError):  # it spoke something else, stalled or left: there is nobody to tell
            return
        await answer(sock, received)

    return answered


async def _read_connect(sock: socket.socket) -> tuple[int, bytes]:
    loop = asyncio.get_running_loop()
    received = b""
    while (parsed := parse_connect(received)) is None:
        more = await loop.sock_recv(sock, RECEIVE_BYTES)
        if not more:
            raise ConnectionResetError("the peer left before it named a port")
        received += more
    return parsed


def _received_connect(sock: socket.socket) -> tuple[int, bytes]:
    received = b""
    while (parsed := parse_connect(received)) is None:
        more = sock.recv(RECEIVE_BYTES)
        if not more:
            raise ConnectionResetError("the peer left before it named a port")
        received += more
    return parsed


def parse_connect(received: bytes) -> tuple[int, bytes] | None:
    """The port that a hybrid vsock peer asks for and the bytes after its line, or `None` while the line is incomplete.

    Raises `ValueError` for anything that cannot become `CONNECT <port>` within `CONNECT_BYTES_MAX` bytes.
    """
    line, newline, rest = received.partition(b"\n")
    if len(line) >= CONNECT_BYTES_MAX:
        raise ValueError(f"no line within {CONNECT_BYTES_MAX} bytes")
    if not newline:
        return None
    verb, _, digits = line.partition(b" ")
    if verb != b"CONNECT" or not digits.isdigit() or int(digits) > PORT_MAX:
        raise ValueError(f"found {line!r}, accepted is CONNECT and a port")
    return int(digits), rest
