"""The wire's codecs: what one end writes the other reads, however it is cut up, and nothing else passes."""

import base64
import string

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from real_parts import fuzz_examples
from substrate_seam.errors import (
    UNAVAILABLE,
    DuplicateInvocation,
    GuestFailed,
    GuestTimeout,
    GuestUnavailable,
    InternalError,
    InvocationCancelled,
    Ran,
    Reason,
    SubstrateError,
)
from substrate_seam.invocation import (
    Demands,
    GuestRequest,
    Invocation,
    Isolation,
    Receipt,
    Start,
    Started,
    Trace,
    WorkloadRef,
)
from substrate_seam.wire import (
    DATA_BYTES_MAX,
    HEAD_BYTES_MAX,
    FrameReader,
    FrameType,
    WireError,
    data_frames,
    decode_end,
    decode_error,
    decode_head,
    decode_invocation,
    encode_error,
    encode_invocation,
    error_frame,
    head_frame,
    receipt_frame,
)

WORDS = st.text(st.characters(codec="utf-8"), max_size=20)
NAMES = st.text(string.ascii_lowercase + string.digits + "-_.", min_size=1, max_size=20).map(str.encode)
VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40).filter(
    lambda value: not any("\x7f" <= char < "\x80" for char in value)
)
FIELDS = st.lists(st.tuples(NAMES, VALUES.map(lambda value: value.encode("latin-1"))), max_size=6).map(tuple)
SECONDS = st.floats(0, 1e6)
COUNTS = st.none() | st.floats(0, 1e9)
STARTED = st.builds(
    Started,
    queue_ms=SECONDS,
    claim_ms=SECONDS,
    ready_ms=SECONDS,
    start=st.sampled_from(Start),
    node=WORDS,
    guest=WORDS,
    isolation=st.sampled_from(Isolation),
    base=st.none() | WORDS,
    cpu_ms=COUNTS,
    peak_mib=COUNTS,
)
RECEIPTS = st.builds(
    Receipt,
    guest_ms=SECONDS,
    body_bytes=st.integers(0, 1 << 50),
    cpu_ms=COUNTS,
    peak_mib=COUNTS,
    egress_bytes=st.none() | st.integers(0, 1 << 50),
    base=st.none() | WORDS,
)
INVOCATIONS = st.builds(
    Invocation,
    id=st.text("0123456789abcdef", min_size=32, max_size=32),
    attempt=st.integers(1, 60),
    workload=st.builds(WorkloadRef, name=WORDS, digest=WORDS),
    session=st.none() | WORDS,
    caller=WORDS,
    demands=st.builds(Demands, st.none() | st.sampled_from(Isolation), st.none() | st.sampled_from(Start)),
    request=st.builds(
        GuestRequest,
        method=st.sampled_from(["GET", "POST", "PROPFIND", "M-SEARCH"]),
        target=st.text(string.ascii_letters + string.digits + "/?&=%:", max_size=40).map("/".__add__),
        headers=FIELDS,
        body=st.just(b""),
    ),
    start_within_s=SECONDS,
    run_within_s=SECONDS,
    trace=st.none() | st.builds(Trace, parent=st.just("00-ab-cd-01"), state=st.sampled_from(["", "a=b"])),
)
CALL = Invocation(
    id="0123456789abcdef" * 2,
    attempt=1,
    workload=WorkloadRef("echo", "0" * 64),
    session=None,
    caller="anonymous",
    demands=Demands(),
    request=GuestRequest("POST", "/invoke", ((b"content-type", b"text/plain"),), b""),
    start_within_s=30.0,
    run_within_s=60.0,
)
AT_ONCE = Started(
    queue_ms=0, claim_ms=1, ready_ms=1, start=Start.POOL, node="n", guest="g", isolation=Isolation.MICROVM
)


@given(INVOCATIONS)
def test_an_invocation_arrives_as_it_was_sent(invocation):
    assert decode_invocation(encode_invocation(invocation)) == invocation


def test_the_body_does_not_travel_in_the_head():
    invocation = structs.replace(CALL, request=structs.replace(CALL.request, body=b"secret" * 1000))
    assert decode_invocation(encode_invocation(invocation)) == CALL
    assert len(encode_invocation(invocation)) == len(encode_invocation(CALL))


def test_the_largest_head_a_caller_may_send_fits_into_the_head_a_node_takes():
    """64 KiB of fields, each byte of which JSON writes as two."""
    fields = tuple((b"%02d" % number, b"\xff" * 650) for number in range(100))
    assert sum(len(name) + len(value) + 4 for name, value in fields) > 65_535
    invocation = structs.replace(CALL, request=structs.replace(CALL.request, headers=fields))
    assert len(encode_invocation(invocation)) < HEAD_BYTES_MAX - 4096


def test_time_that_has_run_out_is_sent_as_no_time():
    sent = decode_invocation(encode_invocation(structs.replace(CALL, start_within_s=-0.001, run_within_s=-5.0)))
    assert (sent.start_within_s, sent.run_within_s) == (0.0, 0.0)


def as_json(**changes):
    """The header of CALL with some fields of its JSON changed."""
    plain = msgspec.json.decode(base64.urlsafe_b64decode(encode_invocation(CALL)))
    return base64.urlsafe_b64encode(msgspec.json.encode(plain | changes))


def request(**changes):
    return as_json(
        request={"method": "POST", "target": "/invoke", "headers": [["content-type", "text/plain"]]} | changes
    )


UNREADABLE = {
    "no base64": b"!!!!",
    "no JSON": base64.urlsafe_b64encode(b"{"),
    "no UTF-8": base64.urlsafe_b64encode(b'{"id": "\xff"}'),
    "nothing": b"",
    "an id in capitals": as_json(id="ABCDEF0123456789" * 2),
    "a short id": as_json(id="ab"),
    "an id and a line break": as_json(id=CALL.id + "\n"),
    "attempt 0": as_json(attempt=0),
    "attempt 61": as_json(attempt=61),
    "a negative bound": as_json(start_within_s=-1.0),
    "a bound of ages": as_json(run_within_s=1e300),
    "a target that breaks its line": request(target="/\r\nx: y"),
    "a target with a blank": request(target="/a b"),
    "a target elsewhere": request(target="http://else/"),
    "a target not in ASCII": request(target="/é"),
    "a method that breaks its line": request(method="GET / HTTP/1.1\r\n"),
    "no method": request(method=""),
    "a value that breaks its line": request(headers=[["a", "b\r\nc: d"]]),
    "a value with a NUL": request(headers=[["a", "b\0"]]),
    "a value wider than a byte": request(headers=[["a", "\u0100"]]),
    "a name in capitals": request(headers=[["A", "b"]]),
    "a name that breaks its line": request(headers=[["a\n", "b"]]),
    "no name": request(headers=[["", "b"]]),
    "a trace that breaks its line": as_json(trace={"parent": "00\r\nx: y"}),
}


@pytest.mark.parametrize("header", UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_no_invocation_is_refused(header):
    with pytest.raises(WireError, match="substrate-invocation"):
        decode_invocation(header)


@given(st.binary(max_size=60))
def test_garbage_is_refused(header):
    with pytest.raises(WireError):
        decode_invocation(header)


def test_what_a_newer_agent_adds_is_ignored():
    assert decode_invocation(as_json(colour="blue")) == CALL


NO, MAYBE = Ran.NO, Ran.MAYBE
TOLD = [
    *(GuestUnavailable(reason, "why", hint="what next", retry_after_s=2.5) for reason in sorted(UNAVAILABLE)),
    InvocationCancelled("why", hint="what next"),
    DuplicateInvocation("why", hint="what next"),
    GuestFailed("why", hint="what next"),
    GuestTimeout("why", hint="what next"),
    InternalError("why", hint="what next"),
    SubstrateError(Reason.BAD_REQUEST, "why", ran=NO, hint="what next"),
    SubstrateError(Reason.BODY_TOO_LARGE, "why", ran=NO, hint="what next"),
]


@pytest.mark.parametrize("error", TOLD, ids=lambda error: str(error.reason))
def test_an_error_arrives_as_it_was_told(error):
    status, body = encode_error(error)
    told = [decode_error(body), decode_end(error_frame(error)[5:])]
    assert 400 <= status < 600
    for heard in told:
        assert type(heard) is type(error)
        assert vars(heard) == vars(error)


@given(STARTED)
def test_an_error_tells_of_the_guest_that_was_claimed(started):
    """In an end frame and before the commit, whatever kind of error it is; an older node says nothing of it."""
    for told in (GuestFailed("why"), GuestTimeout("why"), GuestUnavailable(Reason.DRAINING, "why")):
        told.started = started
        for heard in (decode_end(error_frame(told)[5:]), decode_error(encode_error(told)[1])):
            assert isinstance(heard, type(told))
            assert heard.started == started


@pytest.mark.parametrize("ran", Ran)
@pytest.mark.parametrize("reason", [*Reason, "of-a-newer-node"])
def test_whether_it_ran_is_never_heard_as_less_than_was_told(reason, ran):
    """Whatever the reason; and what did not run may be placed again, unless no node would take it."""
    body = msgspec.json.encode({"error": {"reason": reason, "ran": ran, "message": "why"}})
    heard = decode_error(body)
    assert heard.ran == ran
    assert heard.started is None
    final = {Reason.CANCELLED, Reason.BAD_REQUEST, Reason.BODY_TOO_LARGE}
    assert isinstance(heard, GuestUnavailable) == (ran is NO and reason not in final)


def test_a_message_may_quote_bytes_that_were_no_text():
    quoted = b"\xff".decode(errors="surrogateescape")
    assert decode_error(encode_error(GuestFailed(quoted))[1]).message == "?"


@pytest.mark.parametrize("body", [b"", b"{}", b"<html>", b'{"error":{"reason":"x","ran":"perhaps","message":""}}'])
def test_what_is_no_error_is_no_error(body):
    with pytest.raises(WireError):
        decode_error(body)


# Frames.


def frames_of(*parts):
    reader = FrameReader()
    return [frame for part in parts for frame in reader.feed(part)], reader.ended


@given(STARTED, st.integers(200, 599), FIELDS)
def test_a_head_arrives_as_it_was_sent(started, status, headers):
    [(kind, payload)], ended = frames_of(head_frame(started, status, headers))
    assert (kind, ended) == (FrameType.HEAD, False)
    assert decode_head(payload) == (started, status, headers)


@given(RECEIPTS)
def test_a_receipt_arrives_as_it_was_sent(receipt):
    [(kind, payload)], ended = frames_of(receipt_frame(receipt))
    assert (kind, ended) == (FrameType.END, True)
    assert decode_end(payload) == receipt


@given(st.binary(min_size=1, max_size=100), st.integers(1, 5000))
def test_the_pieces_of_a_body_stay_in_order_and_below_their_bound(piece, times):
    body = piece * times
    frames, _ = frames_of(head_frame(AT_ONCE, 200, ()), *data_frames(body))
    assert b"".join(payload for _, payload in frames[1:]) == body
    assert all(0 < len(payload) <= DATA_BYTES_MAX for _, payload in frames[1:])


def test_no_bytes_make_no_frame():
    assert data_frames(b"") == []


@settings(max_examples=fuzz_examples(60))
@given(st.lists(st.binary(min_size=1, max_size=30), max_size=5), st.data())
def test_however_a_reply_is_cut_up_its_frames_are_the_same(pieces, data):
    frames = [head_frame(AT_ONCE, 200, ()), *(frame for piece in pieces for frame in data_frames(piece))]
    whole = b"".join([*frames, receipt_frame(Receipt(guest_ms=1.0, body_bytes=0))])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    parts = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert frames_of(*parts) == frames_of(whole)
    assert frames_of(*(whole[at : at + 1] for at in range(len(whole)))) == frames_of(whole)


HEAD, DATA, END = head_frame(AT_ONCE, 200, ()), data_frames(b"x")[0], receipt_frame(Receipt(guest_ms=1, body_bytes=1))
DISORDER = {
    "a body without a head": DATA,
    "two heads": HEAD + HEAD,
    "two ends": HEAD + END + END,
    "a head after the end": END + HEAD,
    "half a prefix after the end": HEAD + END + b"D",
    "an unknown type": HEAD + b"Z\0\0\0\0",
    "no type": b"\0" * 5,
    "a piece over its bound": HEAD + b"D" + (DATA_BYTES_MAX + 1).to_bytes(4, "big"),
    "a head over its bound": b"H" + (1_048_577).to_bytes(4, "big"),
    "HTML": b"<html>",
}


@pytest.mark.parametrize("data", DISORDER.values(), ids=DISORDER)
def test_frames_out_of_order_are_refused_however_they_are_cut_up(data):
    """As soon as the prefix is there: nobody waits for what an absurd length promises."""
    for parts in ([data], [data[at : at + 1] for at in range(len(data))], [data[:-1], data[-1:]]):
        with pytest.raises(WireError):
            frames_of(*parts)


@settings(max_examples=fuzz_examples(80))
@given(
    st.lists(st.sampled_from([HEAD, DATA, END, b"H", b"D\0\0\0", b"\0"]) | st.binary(max_size=6), max_size=8), st.data()
)
def test_whatever_arrives_is_cut_into_frames_or_refused(parts, data):
    """Garbage ends in the same verdict however it is cut up, and nothing is kept that no frame asked for."""
    whole = b"".join(parts)
    at = data.draw(st.integers(0, len(whole)))

    def verdict(*parts):
        try:
            return frames_of(*parts)
        except WireError:
            return "refused"

    assert verdict(whole[:at], whole[at:]) == verdict(whole)


@pytest.mark.parametrize("payload", [b"", b"{}", b"\xff", b'{"receipt":{"guest_ms":1,"body_bytes":1},"error":null}x'])
def test_an_end_that_says_nothing_is_refused(payload):
    with pytest.raises(WireError):
        decode_end(payload)


@pytest.mark.parametrize("payload", [b"", b"{}", b"\xff", HEAD[5:].replace(b"[]", b'[["a","\xc4\x80"]]')])
def test_a_head_that_cannot_be_read_is_refused(payload):
    with pytest.raises(WireError):
        decode_head(payload)


def test_an_end_with_both_a_receipt_and_an_error_is_refused():
    both = {"receipt": {"guest_ms": 1, "body_bytes": 1}, "error": {"reason": "x", "ran": "no", "message": ""}}
    with pytest.raises(WireError, match="exactly one"):
        decode_end(msgspec.json.encode(both))
