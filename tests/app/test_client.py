"""What `fc-invoke invoke` and `explain` ask for is what was typed, and odd answers are words."""

import http.server
import threading

import pytest

from fc_invoke import client


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
        thread = threading.Thread(target=server.serve_forever)
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
