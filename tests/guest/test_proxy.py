"""The `http` adapter: a server of any kind, which knows nothing of us."""

import http.client
import os
import socket
import sys
from contextlib import suppress

import pytest

from guest.host import PATIENCE_S, request_bytes

SERVER = """
import os, socket, sys
listener = socket.create_server(("127.0.0.1", int(os.environ["PORT"])))
def request(sock):
    data = b""
    while b"\\r\\n\\r\\n" not in data:
        data += sock.recv(65536)
    head, _, body = data.partition(b"\\r\\n\\r\\n")
    lines = head.lower().split(b"\\r\\n")
    length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length"))
    while len(body) < length:
        body += sock.recv(65536)
    return head, body
while True:
    sock, _ = listener.accept()
    with sock:
        if not sock.recv(1, socket.MSG_PEEK):
            continue  # somebody looked whether we listen
        head, body = request(sock)
        %s
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


@pytest.fixture
def server(start):
    """A guest with an HTTP server that does the given to each `sock` with its `head` and `body`."""

    def started(answer):
        source = SERVER % answer.replace("\n", "\n        ")
        guest = start(command=["http", str(free_port()), sys.executable, "-c", source])
        assert guest.restored().status == 200
        return guest

    return started


def test_a_server_gets_the_request_whole_and_its_reply_is_passed_on(server):
    guest = server(
        "answer = head + b'|' + body\n"
        "sock.sendall(b'HTTP/1.1 418 Teapot\\r\\nx-mine: 1\\r\\nKeep-Alive: 5\\r\\n')\n"
        "sock.sendall(b'content-length: %d\\r\\n\\r\\n' % len(answer) + answer)"
    )
    reply = guest.ask("PUT", "/a%20b?c=d", b"x" * 300_000, [("x-theirs", "2"), ("expect", "100-continue")])
    assert (reply.status, reply.headers["x-mine"]) == (418, "1")
    assert "keep-alive" not in reply.headers
    head, _, body = reply.body.partition(b"|")
    assert body == b"x" * 300_000
    lines = head.decode().lower().split("\r\n")
    assert lines[0] == "put /a%20b?c=d http/1.1"
    assert {"host: vsock", "x-theirs: 2", "content-length: 300000", "connection: close"} <= set(lines)
    assert not any(line.startswith("expect") for line in lines)


def test_a_reply_streams_piece_by_piece(server, tmp_path):
    """The first piece is read while the server waits for what comes only afterwards."""
    go_on = tmp_path / "go-on"
    os.mkfifo(go_on)
    guest = server(
        "sock.sendall(b'HTTP/1.1 200 OK\\r\\ntransfer-encoding: chunked\\r\\n\\r\\n5\\r\\nfirst\\r\\n')\n"
        f"open({str(go_on)!r}).read()\n"
        "sock.sendall(b'6\\r\\nsecond\\r\\n0\\r\\n\\r\\n')"
    )
    with guest.connection() as sock:
        sock.sendall(request_bytes())
        with http.client.HTTPResponse(sock) as reply:
            reply.begin()
            assert reply.read(5) == b"first"
            go_on.write_text("")
            assert reply.read() == b"second"


@pytest.mark.parametrize(
    ("method", "sent", "body"),
    [
        ("GET", "HTTP/1.1 200 OK\\r\\n\\r\\nuntil the end", b"until the end"),
        ("GET", "HTTP/1.0 200 OK\\r\\n\\r\\nof old", b"of old"),
        ("GET", "HTTP/1.1 103 Hints\\r\\n\\r\\nHTTP/1.1 200 OK\\r\\ncontent-length: 2\\r\\n\\r\\nok", b"ok"),
        ("GET", "HTTP/1.1 204 No Content\\r\\n\\r\\n", b""),
        ("HEAD", "HTTP/1.1 200 OK\\r\\ncontent-length: 5\\r\\n\\r\\n", b""),
    ],
    ids=["no length", "HTTP/1.0", "hints first", "no content", "HEAD"],
)
def test_replies_of_every_kind_are_framed_anew(server, method, sent, body):
    reply = server(f"sock.sendall(b'{sent}')").ask(method, "/")
    assert reply.body == body


@pytest.mark.parametrize(
    "sent",
    [
        "HTTP/1.1 200 OK\\r\\ncontent-length: 5\\r\\n\\r\\nabc",
        "HTTP/1.1 200 OK\\r\\ntransfer-encoding: chunked\\r\\n\\r\\n5\\r\\nab",
    ],
)
def test_a_reply_that_is_cut_short_never_looks_complete(server, sent):
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        server(f"sock.sendall(b'{sent}')").ask()


@pytest.mark.parametrize("sent", ["", "I speak no HTTP\\r\\n\\r\\n"], ids=["nothing", "something else"])
def test_a_server_without_a_reply_is_a_502(server, sent):
    assert server(f"sock.sendall(b'{sent}')").ask().status == 502


def test_a_guest_whose_server_ends_ends_too(server):
    guest = server("sys.exit(7)")
    with suppress(ConnectionError):  # or a 502, if that is faster
        guest.ask()
    status, console = guest.ended()
    assert status == 1
    assert "the server ended with exit status 7" in console


def test_a_guest_whose_server_never_listens_says_why(start):
    guest = start(command=["http", str(free_port()), sys.executable, "-c", "raise SystemExit(4)"])
    reply = guest.restored()
    assert (reply.status, reply.text) == (
        503,
        "the workload failed to get ready: RuntimeError: the server ended with exit status 4\n",
    )
    assert guest.process.wait(PATIENCE_S) == 1
