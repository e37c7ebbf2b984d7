"""Sessions: one spelling each, and never a way out of the guest's path."""

from __future__ import annotations

from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.asgi import call
from cluster.fronts import Bench
from substrate_cluster.ingress.sessions import SESSION_BYTES_MAX, cut_workload, parse_session
from substrate_seam.errors import Reason, SubstrateError

SEGMENTS = st.lists(
    st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=20).filter(
        lambda text: not {".", ".."} & set(text.split("/"))
    ),
    min_size=1,
    max_size=4,
).filter(lambda parts: 0 < len("/".join(parts).encode()) <= SESSION_BYTES_MAX)


@given(SEGMENTS, st.sampled_from(["", "/", "/!$&'()*+,;=:@-._~"]))
def test_segments_round_trip_however_a_caller_spelled_them(segments, safe):
    """What a caller quotes is what a guest unquotes, segment by segment; a slash inside a segment stays inside."""
    raw = "/".join(quote(segment, safe=safe.replace("/", "")) for segment in segments).encode()
    session = parse_session(raw)
    assert [unquote(part) for part in session.split("/")] == segments
    assert parse_session(session.encode()) == session


@given(SEGMENTS, SEGMENTS)
def test_different_sessions_have_different_spellings(one, other):
    spelled = [parse_session("/".join(quote(part, safe="") for part in parts).encode()) for parts in (one, other)]
    assert (spelled[0] == spelled[1]) == (one == other)


@given(st.binary(max_size=40))
def test_whatever_the_bytes_are_a_guest_sees_a_plain_path_or_the_caller_a_400(raw):
    reason, session = None, None
    try:
        session = parse_session(raw)
    except SubstrateError as error:
        reason = error.reason
    if session is None:
        assert reason is (Reason.BAD_SESSION if raw else None)
        return
    assert session.isascii()
    assert set(session) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~%/")
    for part in unquote(session, errors="strict").split("/"):
        assert part not in {".", ".."}


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"..", "segment"),
        (b"a/./b", "segment"),
        (b"%2e%2e", "segment"),
        (b".%2E/shim", "segment"),
        (b"a%2f..%2fb", "segment"),
        (b"%00", "control"),
        (b"%0d%0aHost:x", "control"),
        (b"%7f", "control"),
        (b"%c2%85", "control"),
        (b"%ff", "UTF-8"),
        (b"\xff", "UTF-8"),
        (b"%c3/%a9", "UTF-8"),
        (b"%zz", "hex"),
        (b"%", "hex"),
        (b"a" * 257, "bytes"),
        (b"%61" * 257, "bytes"),
        (b"%61" * 100_000, "bytes"),
    ],
)
def test_a_bad_session_is_refused_with_the_reason(raw, why):
    with pytest.raises(SubstrateError, match=why) as refused:
        parse_session(raw)
    assert refused.value.reason is Reason.BAD_SESSION


@pytest.mark.parametrize(
    ("raw", "session"),
    [
        (b"", None),
        (b"a", "a"),
        (b"a" * 256, "a" * 256),
        (b"%61" * 256, "a" * 256),
        (b".hidden", ".hidden"),
        (b"...", "..."),
        (b"a/b", "a/b"),
        (b"a%2Fb", "a%2Fb"),
        (b"/a", "/a"),
        (b"a+b c?", "a%2Bb%20c%3F"),
        (b"%e2%82%ac", "%E2%82%AC"),
        (b"%5c..", "%5C.."),
    ],
)
def test_a_good_session_has_one_spelling(raw, session):
    assert parse_session(raw) == session


@pytest.mark.parametrize(
    ("target", "guest_target"),
    [
        ("/invoke/thumb", "/invoke"),
        ("/invoke/thumb/", "/invoke"),
        ("/invoke/thumb?x=1", "/invoke?x=1"),
        ("/invoke/thumb/a/b%20c?x=%2f&y", "/invoke/a/b%20c?x=%2f&y"),
        ("/invoke/thumb/%3f%23", "/invoke/%3F%23"),
    ],
)
async def test_a_guest_sees_the_session_behind_invoke_and_the_query(target, guest_target):
    with Bench() as bench:
        await call(bench.app, target)
    assert bench.executor.invocations[0].request.target == guest_target


async def test_a_session_in_a_header_obeys_the_same_rules():
    with Bench() as bench:
        for values in (["../x"], ["%00"], ["a", "b"]):
            answer = await call(bench.app, "/http/thumb/", fields=[("fc-session", value) for value in values])
            assert (answer.status, answer["fc-error"]) == (400, "bad-session")


@given(st.binary(max_size=60))
def test_a_workload_is_what_stands_before_the_first_slash(rest):
    name, behind = cut_workload(b"/invoke/" + rest, b"/invoke/")
    assert "/" not in name
    assert name.encode("latin-1") + (b"/" + behind if b"/" in rest else b"") == rest
