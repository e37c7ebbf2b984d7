"""The admin listener: reasons, metrics and stories, for operators only."""

from __future__ import annotations

import pytest

from cluster.asgi import call
from substrate_cluster.auth import bearer_token, rejected
from substrate_cluster.ingress import admin_app
from substrate_seam.events import InvocationFenced

ELSEWHERE = ("10.0.0.9", 50000)
OPERATORS_ONLY = ["/metrics", "/v1/live", "/v1/audit", "/v1/invocations/" + "a" * 32, "/nothing"]


class OneToken:
    uses_authorization = True

    async def authenticate(self, authorization):
        if bearer_token(authorization) != b"good":
            raise rejected()
        return "operator"


def admin(*, reasons=(), authenticator=None, journal=None, host=None):
    stories = {"a" * 32: {"events": [InvocationFenced(invocation_id="a" * 32, ran="no")]}}

    async def story(invocation_id):
        return stories.get(invocation_id)

    return admin_app(
        ready=lambda: list(reasons),
        metrics=lambda: b"substrate_calls_total 1\n",
        story=story,
        journal=journal,
        host=host,
        live=lambda: {"waiting": 3},
        page=(((b"content-type", b"text/html"),), b"<p>a page"),
        authenticator=authenticator,
        allowed_hosts={"localhost"},
        mint_id=lambda: "e" * 32,
        emit=lambda event: None,
        prefix="CLUSTER_AGENT_",
    )


async def get(app, target, **how):
    return await call(app, target, method="GET", **how)


async def test_a_daemon_that_is_not_ready_says_every_reason():
    answer = await get(admin(reasons=["no node", "draining"]), "/readyz")
    assert (answer.status, answer.text) == (503, "no node\ndraining\n")
    answer = await get(admin(reasons=["no node"]), "/readyz", fields=[("accept", "application/json")])
    assert (answer.status, answer.json) == (503, {"ready": False, "reasons": ["no node"]})


async def test_a_ready_daemon_says_so():
    answer = await get(admin(), "/readyz")
    assert (answer.status, answer.text) == (200, "ok\n")
    answer = await get(admin(), "/readyz", fields=[("accept", "application/json")])
    assert (answer.status, answer.json) == (200, {"ready": True, "reasons": []})


async def test_readiness_tells_what_guests_get_from_the_host():
    host = ("no network", [{"measure": "network", "applied": True}])
    assert (await get(admin(host=host), "/readyz")).text == "ok\n\nno network\n"
    answer = await get(admin(host=host), "/readyz", fields=[("accept", "application/json")])
    assert answer.json == {"ready": True, "reasons": [], "isolation": host[1]}


async def test_metrics_are_in_the_form_that_prometheus_reads():
    answer = await get(admin(), "/metrics")
    assert (answer.status, answer.text) == (200, "substrate_calls_total 1\n")
    assert answer["content-type"].startswith("text/plain; version=0.0.4")


async def test_an_invocation_has_its_story():
    answer = await get(admin(), "/v1/invocations/" + "a" * 32)
    assert answer.json == {"events": [{"event": "invocation.fenced", "invocation_id": "a" * 32, "ran": "no"}]}


async def test_the_journal_of_the_guests_is_there_where_one_is_kept():
    answer = await get(admin(journal=lambda: ["a 1", "b 2"]), "/v1/audit")
    assert answer.json == {"entries": ["a 1", "b 2"]}
    answer = await get(admin(), "/v1/audit")
    assert (answer.status, answer.text.splitlines()[0]) == (404, "no journal is kept")
    assert "NODE_DAEMON_AUDIT_JOURNAL" in answer.text


async def test_what_another_machine_is_refused_names_the_setting_that_allows_it():
    assert "CLUSTER_AGENT_ADMIN_TOKEN_FILE" in (await get(admin(), "/metrics", client=ELSEWHERE)).text
    assert "CLUSTER_AGENT_ALLOWED_HOSTS" in (await get(admin(), "/metrics", host="front.example")).text


@pytest.mark.parametrize("target", ["/v1/invocations/" + "b" * 32, "/v1/invocations/", "/v1/invocations", "/nothing"])
async def test_what_is_not_known_is_not_found(target):
    answer = await get(admin(), target)
    assert (answer.status, answer["fc-error"], answer["fc-invocation-id"]) == (404, "not-found", "e" * 32)


async def test_the_present_is_told_and_never_kept_by_anybody_in_between():
    answer = await get(admin(), "/v1/live")
    assert (answer.json, answer["cache-control"]) == ({"waiting": 3}, "no-store")
    assert (answer["x-content-type-options"], answer["cross-origin-resource-policy"]) == ("nosniff", "same-origin")


async def test_the_page_is_for_whoever_may_reach_the_listener_because_it_knows_nothing():
    """It asks its reader for a token; what it shows is behind that. Other machines get it only where there is one."""
    assert (await get(admin(), "/")).text == "<p>a page"
    assert (await get(admin(), "/", client=ELSEWHERE)).status == 403
    assert (await get(admin(authenticator=OneToken()), "/", client=ELSEWHERE)).status == 200
    for app in (admin(), admin(authenticator=OneToken())):
        assert (await get(app, "/", host="evil.example")).status == 403
        assert (await get(app, "/", fields=[("sec-fetch-site", "cross-site")])).status == 403


@pytest.mark.parametrize("target", ["/", "/healthz", "/readyz", *OPERATORS_ONLY])
async def test_nothing_here_is_for_posting_to(target):
    assert (await call(admin(), target)).status == 404


@pytest.mark.parametrize("target", OPERATORS_ONLY)
async def test_without_a_token_an_operator_is_whoever_calls_from_this_machine(target):
    assert (await get(admin(), target, client=ELSEWHERE)).status == 403
    assert (await get(admin(), target, client=None)).status != 403
    assert (await get(admin(), target, client=("::1", 1))).status != 403


@pytest.mark.parametrize("target", OPERATORS_ONLY)
async def test_with_a_token_an_operator_is_whoever_has_it(target):
    app = admin(authenticator=OneToken())
    assert (await get(app, target)).status == 401
    assert (await get(app, target, fields=[("authorization", "Bearer bad")])).status == 401
    good = [("authorization", "Bearer good")]
    assert (await get(app, target, fields=good, client=ELSEWHERE)).status in {200, 404}


@pytest.mark.parametrize("target", OPERATORS_ONLY)
async def test_a_web_page_reaches_no_operators_page(target):
    assert (await get(admin(), target, host="evil.example")).status == 403
    assert (await get(admin(), target, fields=[("origin", "http://evil.example")])).status == 403
    assert (await get(admin(), target, fields=[("sec-fetch-site", "same-site")])).status == 403


@pytest.mark.parametrize("target", ["/healthz", "/readyz"])
async def test_probes_are_open_to_a_kubelet(target):
    answer = await get(admin(authenticator=OneToken()), target, host="10.1.1.1:8081", client=ELSEWHERE)
    assert answer.status == 200
