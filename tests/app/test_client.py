"""What `fc-invoke invoke` and `explain` ask for is what was typed, and odd answers are words."""

import http.server
import io
import socket
import sys
import threading
from types import SimpleNamespace

import pytest

from fc_invoke import client
from fc_invoke.main import main


@pytest.fixture
def listener():
    """A listener that notes each path it is asked for, and answers with something that is no story."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("content-length", "5")
            self.end_headers()
            self.wfile.write(b"hello")

        do_POST = do_GET  # noqa: N815  # the names are the library's

        def log_message(self, *_):
            pass

    asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("workload", "session", "path"),
    [
        ("echo", None, "/invoke/echo"),
        ("echo", "a/b", "/invoke/echo/a/b"),
        ("echo", "a?b=1", "/invoke/echo/a%3Fb%3D1"),
        ("echo", "ö #%", "/invoke/echo/%C3%B6%20%23%25"),
        ("echo/../python", None, "/invoke/echo%2F..%2Fpython"),
    ],
)
def test_a_session_reaches_the_daemon_as_it_was_typed(listener, workload, session, path):
    """No character of it turns into a query, a fragment or another workload."""
    url, asked = listener
    client.invoke(url, url, client.Call(workload, session, b""), token=None, admin_token=None)
    assert asked[0] == path


def test_an_answer_that_is_no_story_is_told_in_words(listener):
    """Whatever listens there, it is not the admin listener of a daemon."""
    url, asked = listener
    with pytest.raises(client.Unreachable, match=url):
        client.explain(url, "../../metrics", admin_token=None)
    assert asked == ["/v1/invocations/..%2F..%2Fmetrics"]


COMMANDS = [
    (["invoke", "echo", "--url"], "--url"),
    (["explain", "a" * 32, "--admin-url"], "--admin-url"),
    (["top", "--once", "--admin"], "--admin"),
    (["audit", "--admin-url"], "--admin-url or --journal"),
]


@pytest.mark.parametrize(("command", "option"), COMMANDS)
def test_where_nobody_listens_every_command_says_what_to_do(command, option, capfd):
    with socket.socket() as bound:  # to a port where nobody else will listen
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(SystemExit, match="1"):
            main([*command, url])
    told = capfd.readouterr().err
    assert f"no daemon answers at {url}: " in told
    assert f"Start one with `fc-invoke`, or name its listener with {option}." in told


@pytest.mark.parametrize("command", [command for command, _ in COMMANDS])
def test_an_address_that_is_no_url_is_told_what_it_lacks(command, capfd):
    with pytest.raises(SystemExit, match="1"):
        main([*command, "127.0.0.1:8081"])
    assert capfd.readouterr().err == (
        "fc-invoke: 127.0.0.1:8081 is no URL: its http:// is missing. Say http://127.0.0.1:8081\n"
    )


def test_a_body_is_text_or_what_a_file_holds_by_either_name(tmp_path, monkeypatch):
    """`-d @FILE` is what users of curl type; every byte of the file is sent."""
    file = tmp_path / "body"
    file.write_bytes(b"a\r\n\0b\n")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"typed")))
    assert client.read_body("text", None) == b"text"
    assert client.read_body(f"@{file}", None) == client.read_body(None, str(file)) == file.read_bytes()
    assert client.read_body("@-", None) == b"typed"
    with pytest.raises(FileNotFoundError):
        client.read_body("@/nowhere", None)
