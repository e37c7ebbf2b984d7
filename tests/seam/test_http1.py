"""The reader of replies: what it takes, what it refuses, and that cutting the bytes up changes neither."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from real_parts import fuzz_examples
from substrate_seam.http1 import HEAD_BYTES_MAX, HEAD_FIELDS_MAX, INTERIM_MAX, BadReply, ReplyReader

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
SIZED = OK + b"Content-Length: 3\r\n\r\nabc"


def read(*parts, head_request=False):
    """Feed the parts; say what came of them: status, fields, body, how far it came, and what was wrong."""
    reader, body, wrong = ReplyReader(head_request=head_request), b"", ""
    try:
        for part in parts:
            body += b"".join(reader.feed(part))
    except BadReply as refused:
        wrong = str(refused)
    return reader, body, wrong


def verdict(*parts, head_request=False):
    """Everything of `read` that must not hang on how the bytes were cut up."""
    reader, body, wrong = read(*parts, head_request=head_request)
    if wrong:
        return bool(wrong)
    return reader.status, reader.headers, body, reader.complete, reader.keep_alive, reader.continues


def field(size):
    """One field that takes `size` bytes of a head."""
    return b"a: " + b"b" * (size - 5) + b"\r\n"


WHOLE = {
    "with Content-Length": (SIZED, b"abc"),
    "chunked": (CHUNKED + b"1\r\na\r\n2;x=y\r\nbc\r\n0\r\n\r\n", b"abc"),
    "chunked, with trailers": (CHUNKED + b"3\r\nabc\r\n0\r\nT: x\r\nU: y\r\n\r\n", b"abc"),
    "empty": (OK + b"Content-Length: 0\r\n\r\n", b""),
    "chunked and empty": (CHUNKED + b"0\r\n\r\n", b""),
    "204 without framing": (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    "304 that speaks of a length": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 10\r\n\r\n", b""),
    "an error": (b"HTTP/1.1 599 \r\nContent-Length: 1\r\n\r\nx", b"x"),
    "after interim replies": (b"HTTP/1.1 103 Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + SIZED, b"abc"),
    "in HTTP/1.0, with a length": (b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx", b"x"),
    "with 64 KiB of head": (OK + field(HEAD_BYTES_MAX - len(OK) - 21) + b"Content-Length: 1\r\n\r\nx", b"x"),
    "with 100 fields": (OK + b"a: b\r\n" * (HEAD_FIELDS_MAX - 1) + b"Content-Length: 1\r\n\r\nx", b"x"),
}

REFUSED = {
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "bare line feeds": b"HTTP/1.1 200 OK\nContent-Length: 1\n\nx",
    "blank lines ahead": b"\r\n\r\n" + SIZED,
    "a folded field": OK + b"A: b\r\n c\r\nContent-Length: 1\r\n\r\nx",
    "a blank in a field's name": OK + b"A b: c\r\nContent-Length: 1\r\n\r\nx",
    "a line break in a value": OK + b"A: b\rC: d\r\nContent-Length: 1\r\n\r\nx",
    "a NUL in a value": OK + b"A: b\0\r\nContent-Length: 1\r\n\r\nx",
    "until close": OK + b"\r\n",
    "gzip instead of chunked": OK + b"Transfer-Encoding: gzip\r\n\r\n",
    "gzip and chunked": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
    "chunked twice": OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
    "chunked with a length": OK + b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
    "a length with chunked": OK + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    "two lengths": OK + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\nx",
    "a signed length": OK + b"Content-Length: +1\r\n\r\nx",
    "no number as length": OK + b"Content-Length: one\r\n\r\nx",
    "status 99": b"HTTP/1.1 099 Low\r\nContent-Length: 1\r\n\r\nx",
    "status 600": b"HTTP/1.1 600 High\r\nContent-Length: 1\r\n\r\nx",
    "status 999": b"HTTP/1.1 999 High\r\nContent-Length: 1\r\n\r\nx",
    "101": b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nxyz",
    "101 without Upgrade": b"HTTP/1.1 101 Switching\r\n\r\n",
    "HTTP/2.0": b"HTTP/2.0 200 OK\r\nContent-Length: 1\r\n\r\nx",
    "a flood of interim replies": b"HTTP/1.1 102 Processing\r\n\r\n" * (INTERIM_MAX + 1),
    "a head over 64 KiB": OK + field(HEAD_BYTES_MAX - len(OK) - 20) + b"Content-Length: 1\r\n\r\nx",
    "a head without an end": OK + b"a: " + b"b" * HEAD_BYTES_MAX,
    "an interim head without an end": b"HTTP/1.1 103 Hints\r\na: " + b"b" * HEAD_BYTES_MAX,
    "a head of blanks": OK + b"a: " + b" " * HEAD_BYTES_MAX,
    "101 fields": OK + b"a: b\r\n" * HEAD_FIELDS_MAX + b"Content-Length: 1\r\n\r\nx",
    "101 trailers": CHUNKED + b"0\r\n" + b"a: b\r\n" * (HEAD_FIELDS_MAX + 1) + b"\r\n",
    "a chunk without a size": CHUNKED + b"x\r\n",
    "a chunk longer than its size": CHUNKED + b"1\r\nab\r\n",
    "a chunk of absurd size": CHUNKED + b"f" * 20 + b"\r\n",
}


@pytest.mark.parametrize(("data", "body"), WHOLE.values(), ids=WHOLE)
def test_a_whole_reply_is_read(data, body):
    reader, read_body, wrong = read(data)
    assert (read_body, wrong, reader.complete) == (body, "", True)
    assert reader.keep_alive == data.startswith(b"HTTP/1.1")


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
def test_what_is_no_reply_as_accepted_here_is_refused(data):
    reader, _, wrong = read(data)
    assert wrong
    assert not reader.complete


@pytest.mark.parametrize("data", [*[data for data, _ in WHOLE.values()], *REFUSED.values()], ids=[*WHOLE, *REFUSED])
@pytest.mark.parametrize("size", [1, 2, 7, 4096])
def test_equal_pieces_of_any_size_make_no_difference(data, size):
    if len(data) > 10_000:  # what is near the limits of a head needs few places to cut
        size *= 4096
    assert verdict(*(data[at : at + size] for at in range(0, len(data), size))) == verdict(data)


@pytest.mark.parametrize("name", ["with Content-Length", "chunked, with trailers", "204 without framing"])
@pytest.mark.parametrize("head_request", [False, True])
def test_no_place_to_cut_makes_a_difference(name, head_request):
    """Not even with interim replies before it, and another reply behind it."""
    data = b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE[name][0] + SIZED
    for at in range(len(data) + 1):
        assert verdict(data[:at], data[at:], head_request=head_request) == verdict(data, head_request=head_request)


@pytest.mark.parametrize("data", [data for data, _ in WHOLE.values()], ids=WHOLE)
def test_a_reply_cut_short_is_never_complete(data):
    for at in range(0, len(data), max(1, len(data) // 200)):
        reader, _, wrong = read(data[:at])
        assert not reader.complete
        assert not wrong


def test_a_reply_to_head_is_complete_with_its_head():
    """The parser would wait for the body that Content-Length speaks of; the connection is not used again."""
    reader, body, _ = read(OK + b"Content-Length: 1000\r\n\r\n", head_request=True)
    assert (reader.complete, body, reader.keep_alive) == (True, b"", False)
    assert read(OK + b"\r\n", head_request=True)[0].complete


@pytest.mark.parametrize("more", [b"x", SIZED, b"\r\nx", b"\0", REFUSED["101 fields"]])
@pytest.mark.parametrize("reply", [SIZED, WHOLE["chunked"][0], WHOLE["204 without framing"][0]])
def test_bytes_behind_a_reply_end_its_connection_and_do_not_spoil_it(reply, more):
    for parts in ([reply + more], [reply, more]):
        reader, body, wrong = read(*parts)
        assert (reader.complete, reader.keep_alive, wrong) == (True, False, "")
        assert body in {b"abc", b""}


def test_a_connection_that_the_peer_will_close_carries_no_other_exchange():
    reader, _, _ = read(OK + b"Connection: close\r\nContent-Length: 1\r\n\r\nx")
    assert (reader.complete, reader.keep_alive) == (True, False)


def test_interim_replies_are_counted_and_leave_no_fields():
    reader, _, _ = read(b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n")
    assert (reader.continues, reader.status, reader.complete) == (1, 0, False)
    reader.feed(OK + b"A:  b \t\r\nContent-Length: 3\r\n\r\n")
    assert reader.headers == ((b"a", b"b"), (b"content-length", b"3"))


@pytest.mark.parametrize("endless", [b"1;" + b"x" * 1000, b"0\r\nT: " + b"x" * 1000])
def test_nobody_sends_framing_for_ever(endless):
    """Chunk extensions and trailers bring no body, and the parser would keep some of them."""
    _, _, wrong = read(CHUNKED + endless, *[b"x" * 1000] * 100)
    assert "no further" in wrong


def test_small_pieces_of_a_long_body_are_not_idling():
    reader = ReplyReader()
    reader.feed(CHUNKED)
    for _ in range(50_000):
        assert reader.feed(b"1\r\nx\r\n") == [b"x"]


TOKENS = [
    *(b"HTTP/1.1 ", b"HTTP/1.0 ", b"200 OK", b"204 ", b"100 ", b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"Content-Length: "),
    *(b"Transfer-Encoding: chunked", b"Connection: close", b"0", b"3", b"a", b"abc", b": ", b"\0", b"\xff", b" ", b";"),
    *(OK, SIZED, CHUNKED, b"0\r\n\r\n", b"3\r\nabc\r\n"),
]


@settings(max_examples=fuzz_examples(80))
@given(st.lists(st.sampled_from(TOKENS) | st.binary(max_size=4), max_size=14), st.data())
def test_whatever_arrives_it_is_read_or_refused_and_cuts_make_no_difference(tokens, data):
    """Bytes that nearly are a reply end in a verdict, the same one however they are cut up."""
    whole = b"".join(tokens)
    at = data.draw(st.integers(0, len(whole)))
    assert verdict(whole[:at], whole[at:]) == verdict(whole)
    assert verdict(*(whole[at : at + 1] for at in range(len(whole)))) == verdict(whole)
