"""Heads that are plain mean to us what they mean to h11; all others are left to it."""

from __future__ import annotations

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from guest.host import request_bytes
from guest.test_exchange import HEADS
from substrate_guest.heads import is_plain_response, plain_request, response_head


@given(received=HEADS)
@example(received=request_bytes("PUT", "/a%2Fb?x=1", b"12345", [("X-Odd", " caf\xe9\t")]))
@example(received=b"GET / HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n")
@example(received=b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 3\r\n\r\nabc")
@example(received=b"GET / HTTP/1.1\r\nhost: x\r\na: b\r\n c\r\n\r\n")
@example(received=b"GET / HTTP/1.1\r\nhost: x\r\na : b\r\n\r\n")
def test_a_plain_request_is_what_h11_reads(received: bytes):
    plain = plain_request(received)
    if plain is None:
        return
    reader = h11.Connection(h11.SERVER)
    reader.receive_data(received)
    head = reader.next_event()
    assert isinstance(head, h11.Request)
    assert (plain.method.encode(), plain.target.encode("latin-1")) == (head.method, head.target)
    assert [(name.encode(), value.encode("latin-1")) for name, value in plain.headers] == list(head.headers)
    assert plain.length_bytes == int(dict(head.headers).get(b"content-length", 0))
    rest, _ = reader.trailing_data if plain.length_bytes == 0 else (received[plain.at_byte :], False)
    assert received[plain.at_byte :] == rest


@pytest.mark.parametrize(
    "received",
    [
        request_bytes()[:-1],
        request_bytes(headers=[("transfer-encoding", "chunked")]),
        request_bytes(headers=[("expect", "100-continue")]),
        request_bytes("CONNECT", "x:1"),
        request_bytes(headers=[("content-length", "+1")]),
        request_bytes().replace(b"HTTP/1.1", b"HTTP/1.0"),
        request_bytes().replace(b"host: vsock\r\n", b""),
    ],
)
def test_what_is_not_whole_or_not_plain_is_none(received: bytes):
    assert plain_request(received) is None


@given(
    status=st.integers(-1, 1100),
    headers=st.lists(st.tuples(st.sampled_from([b"a", b"X-B", b"a b", b"", b"content-length"]), st.binary(max_size=5))),
)
@example(status=200, headers=[(b"content-type", b"text/plain; charset=utf-8")])
def test_a_plain_response_is_one_that_h11_reads_as_it_was_meant(status: int, headers: list[tuple[bytes, bytes]]):
    if not is_plain_response(status, headers):
        return
    reader = h11.Connection(h11.CLIENT)
    reader.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    reader.send(h11.EndOfMessage())
    reader.receive_data(response_head(status, headers, 3) + b"abc")
    head = reader.next_event()
    assert isinstance(head, h11.Response)
    assert head.status_code == status
    said = [(name.lower(), value) for name, value in headers]
    assert list(head.headers) == [*said, (b"content-length", b"3"), (b"connection", b"close")]
