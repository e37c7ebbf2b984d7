"""Where a guest listens and dials."""

import asyncio
import os
import socket
import threading
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from substrate_guest.vsock import (
    CONNECT_BYTES_MAX,
    HybridVsock,
    KernelVsock,
    from_environ,
    parse_connect,
)


@pytest.fixture
def listener(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(tmp_path / "v.sock"))
        sock.listen()
        yield sock


@pytest.fixture
def dial_pair():
    """The guest's way to dial, and the host's end of it."""
    guest, host = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with guest, host:
        yield guest, host


@given(port=st.integers(0, 2**32 - 1), rest=st.binary(max_size=64), cut=st.integers(0, 100))
def test_a_port_is_understood_however_the_bytes_arrive(port, rest, cut):
    """No prefix of the line says anything yet, and the bytes after it are kept for HTTP."""
    line = b"CONNECT %d\n" % port
    assert parse_connect(line + rest) == (port, rest)
    assert parse_connect(line[: min(cut, len(line) - 1)]) is None


@given(received=st.binary(max_size=64))
def test_anything_else_is_refused_within_its_bound(received):
    """Noise never names a port and is never waited for beyond the bound."""
    try:
        parsed = parse_connect(received)
    except ValueError:
        return
    if parsed is None:
        assert b"\n" not in received
        assert len(received) < CONNECT_BYTES_MAX
    else:
        assert received.startswith(b"CONNECT ")


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"CONNECT\n",
        b"CONNECT \n",
        b"CONNECT -1\n",
        b"CONNECT 4294967296\n",
        b"connect 1\n",
        b"GET / HTTP/1.1\r\n",
    ],
)
def test_a_line_that_names_no_port_is_refused(line):
    with pytest.raises(ValueError, match="CONNECT and a port"):
        parse_connect(line)


def test_without_descriptors_the_guest_is_a_vm():
    vsock = from_environ({})
    assert isinstance(vsock, KernelVsock)
    assert vsock.own_kernel


def test_the_descriptors_go_no_further_than_the_shim(listener, dial_pair):
    """Neither a snippet nor any other child finds them, by name or by number."""
    descriptors = [os.dup(listener.fileno()), os.dup(dial_pair[0].fileno())]
    for descriptor in descriptors:
        os.set_inheritable(descriptor, True)
    environ = {"SUBSTRATE_LISTEN_FD": str(descriptors[0]), "SUBSTRATE_DIAL_FD": str(descriptors[1]), "HOME": "/"}
    vsock = from_environ(environ)
    assert environ == {"HOME": "/"}
    assert not vsock.own_kernel
    assert [os.get_inheritable(descriptor) for descriptor in descriptors] == [False, False]
    vsock.close()


@pytest.mark.parametrize("value", ["x", "-1", "99999", "99999999999999999999"])
def test_a_variable_without_a_descriptor_says_what_it_should_hold(value):
    with pytest.raises(ValueError, match=r"SUBSTRATE_LISTEN_FD: found .*, accepted is .* AF_UNIX SOCK_STREAM"):
        from_environ({"SUBSTRATE_LISTEN_FD": value})


def test_a_descriptor_of_another_kind_is_refused(dial_pair):
    with pytest.raises(ValueError, match=r"found AF_UNIX SOCK_SEQPACKET, accepted is .* SOCK_STREAM"):
        from_environ({"SUBSTRATE_LISTEN_FD": str(os.dup(dial_pair[0].fileno()))})


def test_a_way_to_dial_alone_is_refused(dial_pair):
    with pytest.raises(ValueError, match="without SUBSTRATE_LISTEN_FD"):
        from_environ({"SUBSTRATE_DIAL_FD": str(os.dup(dial_pair[0].fileno()))})


def test_dialling_sends_the_port_and_receives_a_connection(listener, dial_pair):
    guest, host = dial_pair
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(host, [b"ok"], [theirs.fileno()])
        with HybridVsock(listener, guest).dial(1025, timeout_s=5) as connected:
            assert host.recv(64) == b"1025"
            assert not connected.get_inheritable()
            connected.sendall(b"hello")
            assert ours.recv(64) == b"hello"


def test_a_refused_dial_says_why(listener, dial_pair):
    guest, host = dial_pair
    host.send(b"egress is not enabled")
    with pytest.raises(ConnectionRefusedError, match="1025 of the host refused: egress is not enabled"):
        HybridVsock(listener, guest).dial(1025, timeout_s=5)


def test_a_late_answer_is_never_taken_for_the_next_one(listener, dial_pair):
    guest, host = dial_pair
    vsock = HybridVsock(listener, guest)
    with pytest.raises(TimeoutError):
        vsock.dial(1025, timeout_s=0.01)
    with pytest.raises(BrokenPipeError):
        host.send(b"too late")
    with pytest.raises(ConnectionRefusedError, match="no way to dial"):
        vsock.dial(1029, timeout_s=5)


def test_threads_that_dial_at_once_get_the_port_they_asked_for(listener, dial_pair):
    guest, host = dial_pair
    vsock = HybridVsock(listener, guest)

    def answer_with_the_port(count):
        for _ in range(count):
            port = host.recv(64)
            ours, theirs = socket.socketpair()
            with ours, theirs:
                socket.send_fds(host, [b"ok"], [theirs.fileno()])
                ours.sendall(port)

    got = {}

    def dial(port):
        with vsock.dial(port, timeout_s=10) as connected:
            got[port] = connected.recv(64)

    threads = [threading.Thread(target=dial, args=(port,)) for port in range(1, 9)]
    threads.append(threading.Thread(target=answer_with_the_port, args=(8,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert got == {port: str(port).encode() for port in range(1, 9)}


@pytest.fixture
async def served(listener):
    """Hybrid vsock with one port, 1027, that answers with what it was sent; the way to connect to it."""

    async def echo(sock, received):
        await asyncio.get_running_loop().sock_sendall(sock, b"got " + received)

    async with asyncio.TaskGroup() as duties:
        serving = duties.create_task(HybridVsock(listener).serve({1027: echo}))

        async def connect():
            return await asyncio.open_unix_connection(listener.getsockname())

        yield connect
        serving.cancel()


async def exchanged(connect, *pieces):
    reader, writer = await connect()
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
    reply = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return reply


async def test_a_known_port_is_connected_and_bytes_after_the_line_are_not_lost(served):
    assert await exchanged(served, b"CONN", b"ECT 1027\nGET /") == b"OK 1027\ngot GET /"


@pytest.mark.parametrize("sent", [b"CONNECT 9\n", b"CONNECT 1027", b"nonsense\n", b"x" * 1000, b""])
async def test_whoever_names_no_known_port_is_closed_without_a_word(served, sent):
    reader, writer = await served()
    writer.write(sent)
    if sent in (b"", b"CONNECT 1027"):
        writer.write_eof()
    with suppress(ConnectionResetError):  # how the kernel says that bytes were left unread
        assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()


async def test_a_peer_that_says_nothing_holds_nobody_up(served):
    _, silent = await served()
    assert await exchanged(served, b"CONNECT 1027\n") == b"OK 1027\ngot "
    silent.close()


@pytest.fixture
def vsock_by_tcp(monkeypatch):
    """`KernelVsock` on the loopback interface, because not every machine that tests has AF_VSOCK; and a free port."""
    monkeypatch.setattr(socket, "AF_VSOCK", socket.AF_INET, raising=False)
    monkeypatch.setattr(socket, "VMADDR_CID_ANY", "127.0.0.1", raising=False)
    monkeypatch.setattr("substrate_guest.vsock.HOST_CID", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        return KernelVsock(), free.getsockname()[1]


async def test_a_vm_serves_its_ports_without_a_handshake_and_dials_the_hosts(vsock_by_tcp):
    vsock, port = vsock_by_tcp

    async def echo(sock, received):
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, received + await loop.sock_recv(sock, 64))

    def asked():
        with vsock.dial(port, timeout_s=5) as sock:
            sock.sendall(b"hello")
            return sock.recv(64)

    async with asyncio.TaskGroup() as duties:
        serving = duties.create_task(vsock.serve({port: echo}))
        for _ in range(3):  # passes of the loop: one starts the service, one its port
            await asyncio.sleep(0)
        assert await asyncio.to_thread(asked) == b"hello"
        serving.cancel()
    with pytest.raises(ConnectionRefusedError):
        vsock.dial(port, timeout_s=5)
