"""The listener serves well-formed HTTP/1.1 requests and refuses everything else, in our own words."""

import pytest

from service.loopback import echo, served

HOST = b"Host: a.example\r\n"


def head(*lines: bytes) -> bytes:
    return b"".join(line + b"\r\n" for line in (*lines, b""))


def get(*fields: bytes, target: bytes = b"/x") -> bytes:
    return head(b"GET " + target + b" HTTP/1.1", *fields)


SERVED = {
    "the smallest one": (get(b"Host: a"), b"GET /x  "),
    "a query": (get(b"Host: a", target=b"/x?a=%20&b"), b"GET /x a=%20&b "),
    "bytes that are not UTF-8, kept apart in raw_path": (get(b"Host: a", target=b"/s/%ff"), b"GET /s/%ff  "),
    "an empty first segment": (get(b"Host: a", target=b"//b/c"), b"GET //b/c  "),
    "characters that URLs should not have but have": (get(b"Host: a", target=b'/"<>^`{|}'), b'GET /"<>^`{|}  '),
    "empty lines before it": (b"\r\n\r\n" + get(b"Host: a"), b"GET /x  "),
    "a body with a length": (head(b"POST / HTTP/1.1", b"Host: a", b"Content-Length: 3") + b"abc", b"POST /  abc"),
    "a body in chunks": (
        head(b"POST / HTTP/1.1", b"Host: a", b"Transfer-Encoding: chunked") + b"2\r\nab\r\n1;x=y\r\nc\r\n0\r\n\r\n",
        b"POST /  abc",
    ),
    "trailers, which are dropped": (
        head(b"POST / HTTP/1.1", b"Host: a", b"Transfer-Encoding: Chunked") + b"1\r\na\r\n0\r\nConnection: no\r\n\r\n",
        b"POST /  a",
    ),
    "an upgrade nobody has to follow": (
        head(b"POST / HTTP/1.1", b"Host: a", b"Connection: Upgrade", b"Upgrade: h2c", b"Content-Length: 1") + b"z",
        b"POST /  z",
    ),
    "bytes above ASCII in a value": (get(b"Host: a", b"X: \xff"), b"GET /x  "),
    "an empty value": (get(b"Host: a", b"X:"), b"GET /x  "),
    "a hundred fields": (get(b"Host: a", *[b"X: y"] * 99), b"GET /x  "),
    "a method that few use": (head(b"PROPFIND /x HTTP/1.1", b"Host: a"), b"PROPFIND /x  "),
}

REFUSED = {
    "a TLS client on a plain port": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    "an unknown method": (400, head(b"FETCH / HTTP/1.1", b"Host: a")),
    "a lower-case method": (400, head(b"get / HTTP/1.1", b"Host: a")),
    "bare line feeds": (400, b"GET / HTTP/1.1\nHost: a\n\n"),
    "a bare carriage return": (400, b"GET / HTTP/1.1\r\nHost: a\rb\r\n\r\n"),
    "a folded field": (400, get(b"Host: a", b"X: b", b" c")),
    "a blank before the first field": (400, get(b" Host: a")),
    "a blank before the colon": (400, get(b"Host : a")),
    "a field without a colon": (400, get(b"Host: a", b"X")),
    "a field without a name": (400, get(b"Host: a", b": x")),
    "a NUL in a value": (400, get(b"Host: a", b"X: a\x00b")),
    "a control character in a value": (400, get(b"Host: a", b"X: a\x1bb")),
    "a byte above ASCII in a name": (400, get(b"Host: a", b"X\xff: a")),
    "a byte above ASCII in the target": (400, get(b"Host: a", target=b"/\xff")),
    "a fragment in the target": (400, get(b"Host: a", target=b"/a#b")),
    "an absolute target": (400, get(b"Host: a", target=b"http://a/")),
    "an authority for a target": (400, head(b"CONNECT a:443 HTTP/1.1", b"Host: a")),
    "a star for a target": (400, head(b"OPTIONS * HTTP/1.1", b"Host: a")),
    "no Host": (400, get(b"X: y")),
    "an empty Host": (400, get(b"Host:")),
    "two Hosts": (400, get(b"Host: a", b"Host: a")),
    "a Host that is a URL": (400, get(b"Host: http://a/")),
    "two lengths": (400, get(b"Host: a", b"Content-Length: 1", b"Content-Length: 1")),
    "a list of lengths": (400, get(b"Host: a", b"Content-Length: 1, 1")),
    "a signed length": (400, get(b"Host: a", b"Content-Length: +1")),
    "an empty length": (400, get(b"Host: a", b"Content-Length:")),
    "a length beyond all bounds": (400, get(b"Host: a", b"Content-Length: 99999999999999999999")),
    "a length and chunks": (400, get(b"Host: a", b"Content-Length: 1", b"Transfer-Encoding: chunked")),
    "chunks and a length": (400, get(b"Host: a", b"Transfer-Encoding: chunked", b"Content-Length: 1")),
    "chunks twice": (400, get(b"Host: a", b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked")),
    "a coding alone": (400, get(b"Host: a", b"Transfer-Encoding: gzip")),
    "a coding and chunks": (501, get(b"Host: a", b"Transfer-Encoding: gzip, chunked")),
    "an unknown expectation": (417, get(b"Host: a", b"Expect: the-unexpected")),
    "HTTP/1.0": (505, head(b"GET / HTTP/1.0", b"Host: a")),
    "HTTP/0.9": (505, b"GET /\r\n\r\n"),
    "HTTP/2": (505, head(b"GET / HTTP/2.0", b"Host: a")),
    "the preface of HTTP/2": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "one field too many": (431, get(b"Host: a", *[b"X: y"] * 100)),
    "a head of more than 64 KiB": (431, get(b"Host: a", b"X: " + b"y" * 65536)),
    "a target of more than 64 KiB": (431, get(b"Host: a", target=b"/" + b"y" * 65536)),
    "a field name of more than 64 KiB": (431, get(b"Host: a", b"y" * 65536)),
    "empty lines without end": (431, b"\r\n" * 33000),
    "a head that never ends": (431, b"GET / HTTP/1.1\r\nX: " + b"y" * 70000),
}

CUTS = [None, 1, 7]
"""Send all at once, byte by byte, seven by seven."""


def pieces(data: bytes, size: int | None):
    size = size or len(data)
    return [data[at : at + size] for at in range(0, len(data), size)]


@pytest.mark.parametrize("size", CUTS)
@pytest.mark.parametrize("name", SERVED)
async def test_what_is_well_formed_is_served_however_it_is_cut(name, size):
    request, expected = SERVED[name]
    async with served(echo) as listener, listener.peer() as peer:
        for piece in pieces(request, size):
            peer.send(piece)
            await peer.writer.drain()
        reply = await peer.reply()
        assert (reply.status, reply.body) == (200, expected)
        peer.send(get(b"Host: a", target=b"/next"))
        assert (await peer.reply()).body == b"GET /next  "


@pytest.mark.parametrize("name", REFUSED)
async def test_what_is_malformed_is_refused_once_and_the_connection_closes(name):
    status, request = REFUSED[name]

    async def never(scope, receive, send):
        raise AssertionError("a malformed request reached the application")

    async with served(never) as listener, listener.peer() as peer:
        peer.send(request)
        reply = await peer.reply()
        assert reply.status == status
        assert reply.headers["fc-error"] == "bad-request"
        assert reply.headers["connection"] == "close"
        assert reply.body.startswith(b"refused: ")
        assert await peer.rest() == b""
        assert listener.events == []


async def test_the_scope_tells_names_in_lower_case_values_without_blanks_and_no_trailers():
    seen = {}

    async def app(scope, receive, send):
        await echo(scope, receive, send)
        seen.update(scope)

    async with served(app) as listener, listener.peer() as peer:
        peer.send(
            head(b"PUT /a%2fb/%C3%A9 HTTP/1.1", b"HOST: \t a:1 \t", b"X-Y:  z", b"Transfer-Encoding: chunked")
            + b"0\r\nAuthorization: forged\r\n\r\n"
        )
        assert (await peer.reply()).status == 200
        assert seen["headers"] == [(b"host", b"a:1"), (b"x-y", b"z"), (b"transfer-encoding", b"chunked")]
        assert (seen["path"], seen["raw_path"]) == ("/a/b/é", b"/a%2fb/%C3%A9")
        assert seen["client"][0] == "127.0.0.1"
        assert seen["scheme"] == "http"
        assert set(seen["extensions"]) == {"substrate.abort", "substrate.watch", "substrate.whole"}
