"""Which fields pass, which never do, and what the front reads of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.asgi import call
from cluster.fronts import Bench
from fakes.executor import Act
from substrate_cluster.ingress.headers import demands_of, from_guest, sort_fields, to_guest, trace_of, wants_json
from substrate_seam.errors import Reason, SubstrateError

HOP_BY_HOP = [b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"proxy-connection"]
NEVER_IN = [
    *HOP_BY_HOP,
    b"authorization",
    b"content-length",
    b"expect",
    b"forwarded",
    b"traceparent",
    b"tracestate",
    b"proxy-authorization",
    b"x-forwarded-for",
    b"x-forwarded-proto",
    b"fc-invocation-id",
    b"fc-attempt",
    b"fc-session",
    b"fc-anything",
    b"fc_invocation_id",
    b"x_forwarded_for",
    b"content_length",
    b"fc-odd_one",
]
NEVER_OUT = [
    *HOP_BY_HOP,
    b"proxy-authenticate",
    b"server-timing",
    b"fc-invocation-id",
    b"fc-ran",
    b"fc-error",
    b"x-fc-cpu-ms",
    b"x-fc-anything",
]
PLAIN = [b"accept", b"cookie", b"content-type", b"user-agent", b"x-custom", b"x_custom", b"fcx", b"origin", b"via"]

names_in = st.sampled_from([*NEVER_IN, *PLAIN, b"x-one-hop"])
names_out = st.sampled_from([*NEVER_OUT, *PLAIN, b"content-length", b"set-cookie", b"x-one-hop"])
values = st.sampled_from([b"", b"close", b"X-One-Hop", b"keep-alive, x-one-hop", b"host", b"cookie", b"v"])


def fields_of(names):
    return st.lists(st.tuples(names, values), max_size=12)


def _named(fields):
    return {token.strip().lower() for name, value in fields if name == b"connection" for token in value.split(b",")} - {
        b"",
        b"close",
        b"keep-alive",
    }


@given(fields_of(names_in))
def test_a_guest_never_gets_a_field_that_is_not_its_business(fields):
    """Whatever a caller sends: nothing forbidden passes, everything else does, in order, and Host is said once."""
    passed = to_guest(sort_fields([(b"host", b"h"), *fields]), host=b"vsock", authorization_used=True)
    named = _named(fields)
    assert passed[0] == (b"host", b"vsock")
    assert list(passed[1:]) == [pair for pair in fields if pair[0] not in NEVER_IN and pair[0] not in named]


@given(fields_of(names_out), st.sampled_from([200, 204, 304, 500]))
def test_a_caller_never_gets_a_field_that_only_we_may_set(fields, status):
    """Whatever a guest sends: it cannot speak as us, nor meddle with the caller's connection."""
    passed = from_guest(tuple(fields), status=status)
    dropped = {*NEVER_OUT, *_named(fields)} | ({b"content-length"} if status in {204, 304} else set())
    assert passed == [pair for pair in fields if pair[0] not in dropped]


@given(st.lists(st.tuples(st.from_regex(rb"[a-z_-]{1,16}", fullmatch=True), values), max_size=8))
def test_no_name_however_odd_begins_like_ours_on_either_side(fields):
    inwards = to_guest(sort_fields(fields), host=b"h", authorization_used=True)
    outwards = from_guest(tuple(fields), status=200)
    for name, _ in inwards[1:]:
        assert not name.replace(b"_", b"-").startswith((b"fc-", b"proxy-", b"x-forwarded-"))
    for name, _ in outwards:
        assert not name.startswith((b"fc-", b"x-fc-", b"proxy-"))


def test_an_authorization_that_we_did_not_ask_for_is_the_guests():
    fields = sort_fields([(b"authorization", b"Basic x"), (b"cookie", b"y")])
    assert to_guest(fields, host=b"h", authorization_used=False) == (
        (b"host", b"h"),
        (b"cookie", b"y"),
        (b"authorization", b"Basic x"),
    )


@pytest.mark.parametrize(("target", "host"), [("/invoke/thumb", b"vsock"), ("/http/thumb/x", b"localhost:8080")])
async def test_the_host_a_guest_sees_is_the_callers_only_under_http(target, host):
    with Bench() as bench:
        await call(bench.app, target, fields=[("content-type", "a/b"), ("x-forwarded-for", "1.2.3.4")])
    assert bench.executor.invocations[0].request.headers == ((b"host", host), (b"content-type", b"a/b"))


async def test_a_guest_cannot_answer_in_our_name():
    forged = ((b"fc-invocation-id", b"forged"), (b"fc-node", b"forged"), (b"x-fc-cpu-ms", b"0"), (b"x-real", b"1"))
    with Bench(Act(headers=forged)) as bench:
        answer = await call(bench.app, "/invoke/thumb")
    assert (answer["fc-invocation-id"], answer["fc-node"], answer["x-fc-cpu-ms"]) == ("0" * 31 + "1", "node-1", None)
    assert answer["x-real"] == "1"


def demands(*fields):
    return demands_of(sort_fields([(name.encode(), value.encode()) for name, value in fields]).ours)


def test_demands_are_understood():
    found = demands(("fc-require-isolation", "microvm-jailed"), ("fc-require-start", "pool"))
    assert (found.isolation, found.start) == ("microvm-jailed", "pool")
    assert demands() == demands_of({})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ([("fc-require-isolation", "vm")], "process, microvm, microvm-jailed"),
        ([("fc-require-isolation", "MICROVM")], "process, microvm, microvm-jailed"),
        ([("fc-require-start", "")], "cold, warm, pool"),
        ([("fc-require-start", "warm"), ("fc-require-start", "warm")], "cold, warm, pool"),
        ([("fc-require-gpu", "yes")], "fc-require-isolation and fc-require-start"),
    ],
)
def test_a_demand_that_is_not_understood_is_refused_and_the_accepted_ones_named(fields, said):
    with pytest.raises(SubstrateError) as refused:
        demands(*fields)
    assert refused.value.reason is Reason.BAD_REQUEST
    assert said in refused.value.hint


GOOD_PARENT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    "parents",
    [
        [],
        [b"nonsense"],
        [GOOD_PARENT, GOOD_PARENT],
        [GOOD_PARENT.upper()],
        [b"ff" + GOOD_PARENT[2:]],
        [b"00-" + b"0" * 32 + b"-b7ad6b7169203331-01"],
        [b"00-0af7651916cd43dd8448eb211c80319c-" + b"0" * 16 + b"-01"],
        [GOOD_PARENT + b"\n"],
        [GOOD_PARENT + b"-more"],
    ],
)
def test_a_broken_trace_context_is_as_good_as_none(parents):
    assert trace_of(sort_fields([(b"traceparent", parent) for parent in parents]).ours) is None


@pytest.mark.parametrize(
    ("states", "state"), [([], ""), ([b"a=1", b"b=2"], "a=1,b=2"), ([b"\xff"], ""), ([b"a" * 513], "")]
)
def test_trace_context_is_passed_on_as_received(states, state):
    found = trace_of(sort_fields([(b"traceparent", GOOD_PARENT), *[(b"tracestate", each) for each in states]]).ours)
    assert (found.parent, found.state) == (GOOD_PARENT.decode(), state)


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [([], False), ([b"*/*"], False), ([b"application/json"], True), ([b"text/html", b"application/json;q=0.5"], True)],
)
def test_json_is_for_those_who_ask_for_it(accept, wanted):
    assert wants_json([(b"accept", value) for value in accept]) is wanted
