"""What a caller is told, for each line of the table of outcomes."""

from __future__ import annotations

import pytest
from msgspec import structs

from cluster.asgi import Caller, call, calling
from cluster.fronts import Bench, entry
from fakes.executor import STARTED, Act, Hold
from substrate_cluster.auth import bearer_token, rejected
from substrate_cluster.ingress import Limits, head_refusals
from substrate_cluster.ingress.errors import STATUS
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
from substrate_seam.events import CallRefused, DefectFound, InvocationAccepted


class OneToken:
    """Knows the one token `good`, and cannot be asked about `away`."""

    uses_authorization = True

    async def authenticate(self, authorization):
        token = bearer_token(authorization)
        if token == b"away":
            raise SubstrateError(Reason.DEPENDENCY_UNAVAILABLE, "the review API is away", ran=Ran.NO, retry_after_s=2.0)
        if token != b"good":
            raise rejected()
        return "alice"


def post(target="/invoke/thumb", **how):
    return {"target": target, **how}


def bearing(token, target="/invoke/thumb"):
    return post(target, fields=[("authorization", f"Bearer {token}")])


def announcing(size):
    """A body that says its size and never comes."""
    return post(fields=[("content-length", size)], body=(None,))


AUTH = {"auth": True}

REFUSALS = [
    # how the bench is, what is asked, status, fc-error, Retry-After
    ({}, post(host=None), 400, "bad-request", None),
    ({}, post(fields=[("fc-require-start", "hot")]), 400, "bad-request", None),
    ({}, announcing("many"), 400, "bad-request", None),
    ({}, post("/invoke/thumb?a=\x7f"), 400, "bad-request", None),
    ({}, post("/invoke/thumb/a/../b"), 400, "bad-session", None),
    ({}, post("/invoke/thumb/a%0ab"), 400, "bad-session", None),
    (AUTH, post(), 401, "unauthenticated", None),
    (AUTH, bearing("bad"), 401, "unauthenticated", None),
    (AUTH, post("/no/such/path"), 401, "unauthenticated", None),
    (AUTH, bearing("away"), 503, "dependency-unavailable", "2"),
    (AUTH, bearing("good", "/invoke/private"), 403, "forbidden", None),
    ({}, post(host="evil.example:8080"), 403, "forbidden", None),
    ({}, post(fields=[("origin", "https://evil.example")]), 403, "forbidden", None),
    ({}, post("/invoke/nothing"), 404, "unknown-workload", None),
    ({}, post("/http/nothing/x"), 404, "unknown-workload", None),
    ({}, post("/elsewhere"), 404, "not-found", None),
    ({}, post("/invoke/"), 404, "not-found", None),
    ({}, post("/invoke"), 404, "not-found", None),
    ({}, post(method="GET"), 404, "not-found", None),
    ({}, post("/http/shim/x"), 404, "not-found", None),
    ({}, post(body=(b"x", None)), 408, "body-timeout", None),
    ({}, announcing("1001"), 413, "body-too-large", None),
    ({}, post(body=(b"x" * 600, b"x" * 600)), 413, "body-too-large", None),
    ({"caller_limit": 0}, post(), 429, "caller-limit", "1"),
    ({"body_budget_bytes": 10}, announcing("11"), 503, "overloaded", "1"),
    ({"body_budget_bytes": 10}, post(body=(b"123456", b"123456")), 503, "overloaded", "1"),
]


@pytest.mark.parametrize(("how", "request_", "status", "error", "retry_after"), REFUSALS)
async def test_a_request_turned_away_at_the_front_is_told_why_and_never_runs(how, request_, status, error, retry_after):
    """Nothing after a refusal happens: no placement, no body read, nothing held."""
    how = dict(how)
    auth = OneToken() if how.pop("auth", False) else None
    entries = (entry(), entry("shim", guest="go-shim"), entry("private", callers=frozenset({"bob"})))
    limits = Limits(body_bytes_max=1000, body_within_s=0.01)
    with Bench(authenticator=auth, entries=entries, limits=limits, **how) as bench:
        answer = await call(bench.app, **request_)
    assert (answer.status, answer["fc-error"], answer["retry-after"]) == (status, error, retry_after)
    assert answer["fc-ran"] == "no"
    assert bench.executor.invocations == []
    (refusal,) = bench.told(CallRefused)
    assert (refusal.status, refusal.reason) == (status, error)
    assert refusal.invocation_id == answer["fc-invocation-id"]
    assert f"fc-invoke explain {answer['fc-invocation-id']}\n" in answer.text


PLACED = [
    *[(GuestUnavailable(reason, "full", retry_after_s=2.2), 503, reason, "3") for reason in sorted(UNAVAILABLE)],
    (DuplicateInvocation("seen before"), 502, "guest-failed", None),
    (InvocationCancelled("it was cancelled"), 409, "cancelled", None),
    (GuestFailed("the connection broke"), 502, "guest-failed", None),
    (GuestTimeout("90 s passed"), 504, "guest-timeout", None),
    (SubstrateError(Reason.DEPENDENCY_UNAVAILABLE, "away", ran=Ran.NO), 503, "dependency-unavailable", None),
    (InternalError("a defect there"), 500, "internal", None),
    (ZeroDivisionError("a defect here"), 500, "internal", None),
]


@pytest.mark.parametrize(("error", "status", "reason", "retry_after"), PLACED)
async def test_an_invocation_that_gets_no_guest_or_loses_it_is_told_what_may_have_run(
    error, status, reason, retry_after
):
    with Bench(Act(before=(error,))) as bench:
        answer = await call(bench.app, "/invoke/thumb")
    ran = error.ran if isinstance(error, SubstrateError) else Ran.MAYBE
    assert (answer.status, answer["fc-error"], answer["fc-ran"], answer["retry-after"]) == (
        status,
        reason,
        ran,
        retry_after,
    )
    ended = bench.ended
    assert (ended.status, ended.reason, ended.ran, ended.client_left) == (status, reason, ran, False)
    assert ended.invocation_id == answer["fc-invocation-id"] == bench.executor.invocations[0].id
    assert bench.told(CallRefused) == []


def test_every_reason_there_is_has_a_status():
    assert set(STATUS) == set(Reason)


async def test_a_call_that_found_no_guest_is_told_so_in_the_words_of_the_go_daemon():
    with Bench(Act(before=(GuestUnavailable(Reason.CAPACITY, "the queue is full", hint="Raise `queue`."),))) as bench:
        answer = await call(bench.app, "/invoke/thumb")
    assert answer.text == (
        "guest unavailable: the queue is full\nhint: Raise `queue`.\n"
        "explain: fc-invoke explain 00000000000000000000000000000001\n"
    )
    assert answer["content-type"] == "text/plain; charset=utf-8"
    assert answer["content-length"] == str(len(answer.body))


async def test_a_guest_that_failed_is_told_in_the_words_of_the_go_daemon():
    with Bench(Act(before=(GuestFailed("the connection broke"),))) as bench:
        answer = await call(bench.app, "/invoke/thumb")
    assert answer.text.startswith("invoke failed: the connection broke\n")


async def test_a_caller_that_accepts_json_gets_its_errors_as_json():
    error = GuestUnavailable(Reason.MEMORY, "no memory", hint="Wait.", retry_after_s=1.5)
    with Bench(Act(before=(error,))) as bench:
        answer = await call(bench.app, "/invoke/thumb", fields=[("accept", "text/html, Application/JSON")])
    assert answer["content-type"] == "application/json"
    assert answer.json == {
        "error": {
            "reason": "memory",
            "ran": "no",
            "message": "guest unavailable: no memory",
            "hint": "Wait.",
            "retry_after_s": 1.5,
            "invocation_id": "0" * 31 + "1",
            "explain": "fc-invoke explain " + "0" * 31 + "1",
        }
    }


async def test_a_caller_without_a_token_is_told_how_to_send_one():
    with Bench(authenticator=OneToken()) as bench:
        answer = await call(bench.app, "/invoke/thumb")
    assert answer["www-authenticate"] == "Bearer"
    assert answer.text.startswith("missing or malformed Authorization header\n")


async def test_a_rejected_token_gets_one_bare_word():
    with Bench(authenticator=OneToken()) as bench:
        answer = await call(bench.app, "/invoke/thumb", fields=[("authorization", "Bearer bad")])
    assert answer.text.splitlines()[0] == "unauthorized"


async def test_whoever_asks_for_what_is_not_there_hears_what_is():
    with Bench() as bench:
        answer = await call(bench.app, "/nowhere")
    assert "/invoke/{workload}" in answer.text
    assert "/http/{workload}" in answer.text
    assert "/healthz" in answer.text


async def test_an_unknown_workload_is_named():
    with Bench() as bench:
        answer = await call(bench.app, "/invoke/thumbb")
    assert answer.text.startswith("unknown workload 'thumbb'\n")
    assert "The nearest is 'thumb'; `fc-invoke top` and the admin listener list the workloads." in answer.text


async def test_an_unknown_workload_betrays_no_name_that_its_caller_may_not_call():
    for callers, told in ((frozenset({"bob"}), False), (None, True)):
        with Bench(entries=(entry("private", callers=callers),)) as bench:
            answer = await call(bench.app, "/invoke/privat")
        assert answer.status == 404
        assert ("'private'" in answer.text) is told


async def test_a_defect_keeps_its_traceback_from_the_caller_and_tells_the_maintainers():
    with Bench(Act(before=(ZeroDivisionError("secret detail"),))) as bench:
        answer = await call(bench.app, "/invoke/thumb")
    assert "secret" not in answer.text
    (defect,) = bench.told(DefectFound)
    assert defect.invocation_id == answer["fc-invocation-id"]
    assert "ZeroDivisionError: secret detail" in defect.traceback


async def test_a_defect_before_there_is_an_invocation_is_told_all_the_same():
    class Broken(OneToken):
        async def authenticate(self, authorization):
            raise KeyError("oops")

    with Bench(authenticator=Broken()) as bench:
        answer = await call(bench.app, "/invoke/thumb")
    assert (answer.status, answer["fc-error"], answer["fc-ran"]) == (500, "internal", "maybe")
    assert len(bench.told(DefectFound)) == 1


async def test_a_guest_that_answers_is_passed_on_whatever_its_status():
    act = Act(status=418, headers=((b"content-type", b"x/y"), (b"content-length", b"5")), body=(b"short", b""))
    with Bench(act) as bench:
        answer = await call(bench.app, "/invoke/thumb")
    assert (answer.status, answer.body, answer.complete) == (418, b"short", True)
    assert (answer["content-type"], answer["content-length"], answer["fc-error"]) == ("x/y", "5", None)
    assert (bench.ended.status, bench.ended.reason, bench.ended.ran, bench.ended.body_bytes) == (418, None, "maybe", 5)
    assert (bench.ended.start, bench.ended.node) == ("pool", "node-1")


async def test_a_caller_learns_how_its_guest_was_claimed():
    with Bench() as bench:
        answer = await call(bench.app, "/invoke/thumb")
    assert (answer["fc-start"], answer["fc-node"], answer["fc-isolation"]) == ("pool", "node-1", "microvm")
    assert answer["server-timing"] == "queue;dur=12.4, claim;dur=3.0, ready;dur=0.5"
    assert answer["x-fc-queue-wait-ms"] == "12"
    assert answer["x-fc-cpu-ms"] is None
    assert answer["x-fc-peak-rss-mib"] is None


@pytest.mark.parametrize(
    "error", [GuestFailed("broke off"), GuestTimeout("too slow"), GuestUnavailable(Reason.DRAINING, "it stops")]
)
async def test_a_caller_learns_how_its_guest_was_claimed_also_from_an_error(error):
    error.started = STARTED
    with Bench(Act(before=(error,))) as bench:
        answer = await call(bench.app, "/invoke/thumb")
    assert answer["fc-error"] == error.reason
    assert (answer["fc-start"], answer["fc-node"], answer["fc-isolation"]) == ("pool", "node-1", "microvm")
    assert answer["server-timing"] == "queue;dur=12.4, claim;dur=3.0, ready;dur=0.5"
    assert answer["x-fc-queue-wait-ms"] == "12"
    assert (bench.ended.start, bench.ended.node) == ("pool", "node-1")


async def test_a_call_that_never_had_a_guest_is_not_told_of_one():
    with Bench(Act(before=(GuestUnavailable(Reason.CAPACITY, "full"),))) as bench:
        answer = await call(bench.app, "/invoke/thumb")
    fields = ("fc-start", "fc-node", "fc-isolation", "server-timing", "x-fc-queue-wait-ms")
    assert [answer[name] for name in fields] == [None] * len(fields)
    assert (bench.ended.start, bench.ended.node) == (None, None)


async def test_what_a_small_reply_used_is_in_its_head():
    started = structs.replace(STARTED, cpu_ms=7.6, peak_mib=31.2)
    with Bench(Act(started=started)) as bench:
        answer = await call(bench.app, "/invoke/thumb")
    assert (answer["x-fc-cpu-ms"], answer["x-fc-peak-rss-mib"]) == ("8", "31")


@pytest.mark.parametrize("target", ["/healthz", "/readyz", "/invoke/thumb", "/invoke/none", "/x"])
async def test_every_answer_names_its_invocation(target):
    with Bench() as bench:
        answer = await call(bench.app, target, method="POST" if "invoke" in target else "GET")
    assert answer["fc-invocation-id"] == "0" * 31 + "1"


@pytest.mark.parametrize("error", [GuestFailed("it died"), GuestTimeout("too long"), RuntimeError("a defect")])
async def test_a_reply_that_breaks_after_its_head_never_looks_complete(error):
    with Bench(Act(headers=((b"content-length", b"10"),), body=(b"half", error))) as bench:
        answer = await call(bench.app, "/invoke/thumb")
    assert (answer.status, answer.body, answer.complete, answer.aborted) == (200, b"half", False, True)
    assert bench.ended.status == 200
    assert bench.ended.reason == getattr(error, "reason", Reason.INTERNAL)


async def test_a_server_that_cannot_break_a_connection_is_handed_the_error():
    with Bench(Act(body=(b"half", GuestFailed("it died")))) as bench:
        caller = Caller("/invoke/thumb", can_abort=False)
        with pytest.raises(GuestFailed, match="it died"):
            await caller.run(bench.app)
    assert not caller.answer.complete


async def test_pieces_are_passed_on_as_they_arrive():
    rest = Hold()
    with Bench(Act(body=(b"first", rest, b"second"))) as bench:
        caller = Caller("/invoke/thumb")
        async with calling(bench.app, caller) as request:
            await rest.reached.wait()
            assert caller.answer.pieces == [b"first"]
            rest.release.set()
            answer = await request
    assert (answer.pieces, answer.complete) == ([b"first", b"second"], True)


async def test_an_executor_that_breaks_while_giving_back_does_not_spoil_a_whole_answer():
    with Bench() as bench:
        bench.executor._give_back = _broken_give_back(bench)
        answer = await call(bench.app, "/invoke/thumb")
    assert (answer.complete, answer.aborted) == (True, False)
    assert len(bench.told(DefectFound)) == 1


def _broken_give_back(bench):
    async def give_back(invocation_id, passes):
        bench.executor.given_back.append(invocation_id)
        raise OSError("cannot remove the bundle")

    return give_back


async def test_the_invocation_carries_what_the_catalog_and_the_caller_said():
    with Bench(authenticator=OneToken()) as bench:
        await call(
            bench.app,
            "/invoke/thumb/s1?size=3",
            fields=[
                ("authorization", "Bearer good"),
                ("fc-require-isolation", "process"),
                ("fc-require-start", "warm"),
                ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
                ("tracestate", "a=1"),
                ("tracestate", "b=2"),
            ],
            body=(b"ab", b"cd"),
        )
    (invocation,) = bench.executor.invocations
    assert (invocation.attempt, invocation.session, invocation.caller) == (1, "s1", "alice")
    assert invocation.workload == entry().workload.ref
    assert (invocation.demands.isolation, invocation.demands.start) == ("process", "warm")
    assert (invocation.start_within_s, invocation.run_within_s) == (30.0, 90.0)
    assert invocation.trace.parent == "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert invocation.trace.state == "a=1,b=2"
    request = invocation.request
    assert (request.method, request.target, request.body) == ("POST", "/invoke/s1?size=3", b"abcd")
    (accepted,) = bench.told(InvocationAccepted)
    assert accepted == InvocationAccepted(
        invocation_id=invocation.id,
        workload="thumb",
        caller="alice",
        body_bytes=4,
        session="s1",
        trace=invocation.trace.parent,
        parent=invocation.trace.parent,
    )


async def test_any_method_reaches_a_guest_under_http_with_path_host_and_session_as_they_came():
    with Bench() as bench:
        await call(
            bench.app,
            "/http/thumb/a//%2e/b%ff?q=1&q=2",
            method="PROPFIND",
            host="localhost:99",
            fields=[("fc-session", "my session/1"), ("authorization", "Basic guest-business")],
        )
    (invocation,) = bench.executor.invocations
    assert (invocation.request.method, invocation.request.target) == ("PROPFIND", "/a//%2e/b%ff?q=1&q=2")
    assert invocation.session == "my%20session/1"
    assert invocation.request.headers == ((b"host", b"localhost:99"), (b"authorization", b"Basic guest-business"))


@pytest.mark.parametrize("target", ["/http/thumb", "/http/thumb/"])
async def test_the_root_of_a_workload_is_a_slash(target):
    with Bench() as bench:
        await call(bench.app, target, method="GET")
    (invocation,) = bench.executor.invocations
    assert (invocation.request.target, invocation.session) == ("/", None)


async def test_a_reply_to_head_keeps_the_length_it_speaks_of():
    with Bench(Act(headers=((b"content-length", b"1234"),), body=())) as bench:
        answer = await call(bench.app, "/http/thumb/x", method="HEAD")
    assert (answer["content-length"], answer.body, answer.complete) == ("1234", b"", True)


@pytest.mark.parametrize("status", [204, 304])
async def test_a_reply_without_a_body_speaks_of_no_length(status):
    with Bench(Act(status=status, headers=((b"content-length", b"1234"),), body=())) as bench:
        answer = await call(bench.app, "/http/thumb/x", method="GET")
    assert (answer.status, answer["content-length"]) == (status, None)


@pytest.mark.parametrize(("not_ready", "status"), [((), 200), (("draining",), 503)])
async def test_readyz_says_yes_or_no_and_not_why(not_ready, status):
    with Bench(not_ready=not_ready) as bench:
        answer = await call(bench.app, "/readyz", method="GET")
    assert answer.status == status
    assert "draining" not in answer.text


async def test_probes_need_neither_a_token_nor_a_known_host():
    with Bench(authenticator=OneToken()) as bench:
        for path in ("/healthz", "/readyz"):
            answer = await call(bench.app, path, method="GET", host="10.1.2.3:8080")
            assert (answer.status, answer.text) == (200, "ok\n")


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
async def test_a_probe_by_another_method_finds_nothing(path):
    with Bench() as bench:
        assert (await call(bench.app, path)).status == 404


async def test_a_slash_too_many_is_not_redirected():
    with Bench() as bench:
        assert (await call(bench.app, "/healthz/", method="GET")).status == 404


async def test_a_path_is_what_its_bytes_say():
    """`%69nvoke` decodes to `invoke`, and is not it."""
    with Bench() as bench:
        for path in ("/%69nvoke/thumb", "/invoke%2fthumb"):
            assert (await call(bench.app, path))["fc-error"] == "not-found"
    assert bench.executor.invocations == []


def test_a_listener_that_refuses_a_head_says_so_in_our_words():
    events = []
    refusal = head_refusals(mint_id=lambda: "f" * 32, emit=events.append)
    fields, body = refusal(431, "bad-request", "the request head is larger than 65536 bytes")
    assert dict(fields)[b"fc-error"] == b"bad-request"
    assert dict(fields)[b"fc-ran"] == b"no"
    assert dict(fields)[b"fc-invocation-id"] == b"f" * 32
    assert b"content-length" not in dict(fields)
    assert body.startswith(b"the request head is larger than 65536 bytes\n")
    assert events == [
        CallRefused(
            invocation_id="f" * 32,
            reason=Reason.BAD_REQUEST,
            status=431,
            message="the request head is larger than 65536 bytes",
        )
    ]


@pytest.mark.parametrize(
    ("reason", "told", "ran"), [("internal", b"internal", b"maybe"), ("odd", b"bad-request", b"no")]
)
def test_a_listener_that_ends_a_request_itself_does_not_claim_that_nothing_ran(reason, told, ran):
    fields, _ = head_refusals(mint_id=lambda: "f" * 32, emit=lambda event: None)(500, reason, "it broke")
    assert (dict(fields)[b"fc-error"], dict(fields)[b"fc-ran"]) == (told, ran)
