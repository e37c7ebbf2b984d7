"""The node daemon's admin listener: probes for everybody, the rest for this machine."""

import json

import pytest

from substrate_node.admin import AdminApp
from substrate_seam.story import Happened, Story

HERE = [(b"host", b"127.0.0.1:8081")]


def app(**parts):
    given = {
        "ready": list,
        "metrics": lambda: b"substrate_x 1\n",
        "story": {"abc": Story(2, (Happened(1, {"event": "invocation.fenced", "ran": "no"}),))}.get,
        "journal": lambda: ["abc 1"],
        "live": lambda: {"waiting": 3},
        "page": (((b"content-type", b"text/html"),), b"<p>a page"),
    }
    return AdminApp(**(given | parts))


async def ask(asked, path, *, method="GET", client=("127.0.0.1", 5), headers=HERE):
    """Status and body of one request."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "client": client, "headers": headers}
    await asked(scope, None, send)
    assert dict(sent[0]["headers"])[b"content-length"] == str(len(sent[1]["body"])).encode() or method == "HEAD"
    return sent[0]["status"], sent[1]["body"]


async def test_what_operators_ask_for_is_there():
    """A page, the present that it draws, metrics, the story of an invocation, the journal."""
    assert await ask(app(), "/") == (200, b"<p>a page")
    assert await ask(app(), "/v1/live") == (200, b'{"waiting":3}')
    assert await ask(app(), "/metrics") == (200, b"substrate_x 1\n")
    status, body = await ask(app(), "/v1/invocations/abc")
    assert (status, json.loads(body)["events"]) == (200, [{"at_ms": 0.0, "event": "invocation.fenced", "ran": "no"}])
    status, body = await ask(app(), "/v1/audit")
    assert (status, json.loads(body)) == (200, {"entries": ["abc 1"]})


async def test_readiness_says_why_not():
    """Each reason on a line of its own."""
    assert await ask(app(), "/readyz") == (200, b"ok\n")
    assert await ask(app(ready=lambda: ["stopping", "full"]), "/readyz") == (503, b"stopping\nfull\n")


async def test_readiness_tells_what_guests_get_from_the_host():
    """In words for people, and as rows for programs."""
    asked = app(host=("no network", [{"measure": "network", "applied": True}]))
    assert await ask(asked, "/readyz") == (200, b"ok\n\nno network\n")
    status, body = await ask(asked, "/readyz", headers=[*HERE, (b"accept", b"application/json")])
    rows = [{"measure": "network", "applied": True}]
    assert (status, json.loads(body)) == (200, {"ready": True, "reasons": [], "isolation": rows})


@pytest.mark.parametrize(
    ("client", "headers"),
    [
        (("10.0.0.7", 5), HERE),
        (("127.0.0.1", 5), [(b"host", b"rebound.example:8081")]),
        (("127.0.0.1", 5), []),
        (("127.0.0.1", 5), [*HERE, (b"origin", b"https://evil.example")]),
        (("127.0.0.1", 5), [*HERE, (b"sec-fetch-site", b"cross-site")]),
        (("127.0.0.1", 5), [*HERE, (b"sec-fetch-site", b"same-site")]),
    ],
    ids=["another machine", "a rebound name", "no name", "a web page", "an image of a page", "another port's page"],
)
async def test_strangers_get_probes_and_nothing_else(client, headers):
    """A kubelet may probe; metrics and stories are the operators'."""
    assert (await ask(app(), "/healthz", client=client, headers=headers))[0] == 200
    assert (await ask(app(), "/readyz", client=client, headers=headers))[0] == 200
    for path in ("/", "/metrics", "/v1/live", "/v1/invocations/abc", "/v1/audit"):
        assert (await ask(app(), path, client=client, headers=headers))[0] == 403


async def test_what_is_not_there_is_404_and_says_what_is():
    """Other paths, other methods, unknown invocations, and a journal that nobody keeps."""
    for path in ("/nothing", "/v1/invocations/nobody", "/v1/invocations/"):
        status, body = await ask(app(), path)
        assert status == 404
        assert b"/v1/invocations/{id}" in body
    assert (await ask(app(), "/metrics", method="POST"))[0] == 404
    status, body = await ask(app(journal=None), "/v1/audit")
    assert (status, b"NODE_DAEMON_AUDIT_JOURNAL" in body) == (404, True)


async def test_head_has_no_body():
    """The length is that of the answer to a GET."""
    assert await ask(app(), "/healthz", method="HEAD") == (200, b"")
