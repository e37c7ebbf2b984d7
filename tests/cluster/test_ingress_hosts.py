"""A web page in somebody's browser never reaches a guest, and strangers get no shared kernel."""

from __future__ import annotations

import pytest

from cluster.asgi import call
from cluster.fronts import Bench
from substrate_cluster.ingress import default_hosts, is_loopback, refuse_open
from substrate_cluster.ingress.hosts import HostRule
from substrate_seam.errors import Reason, SubstrateError

DEFAULT = default_hosts("127.0.0.1:8080")


def verdict(allowed, host, **fields):
    ours = {b"host": [host], **{name.replace("_", "-").encode(): [value] for name, value in fields.items()}}
    try:
        HostRule(allowed).check(ours)
    except SubstrateError as error:
        return error.reason
    return None


@pytest.mark.parametrize(
    "host", [b"localhost", b"localhost:8080", b"LOCALHOST.", b"127.0.0.1:1", b"[::1]:8080", b"[::1]"]
)
def test_loopback_answers_to_its_own_names(host):
    assert verdict(DEFAULT, host) is None


@pytest.mark.parametrize(
    "host",
    [b"evil.example", b"evil.example:8080", b"localhost.evil.example", b"127.0.0.1.evil.example", b"10.0.0.1", b"",
     b"localhost@evil.example", b"\xff", b"[::2]", b"::", b"0.0.0.0"],
)  # fmt: skip
def test_a_name_that_dns_was_made_to_point_here_is_refused(host):
    assert verdict(DEFAULT, host) is Reason.FORBIDDEN


@pytest.mark.parametrize(
    ("bound", "host", "refused"),
    [
        ("10.0.0.5:8080", b"10.0.0.5:8080", None),
        ("10.0.0.5:8080", b"10.0.0.6:8080", Reason.FORBIDDEN),
        ("[fd00::1]:80", b"[fd00::1]", None),
        (":8080", b"10.2.3.4:8080", None),
        ("0.0.0.0:8080", b"[fd00::9]:8080", None),
        ("[::]:8080", b"evil.example", Reason.FORBIDDEN),
        ("build-host:8080", b"build-host:8080", None),
        ("unix:/run/front.sock", b"localhost", None),
        ("unix:/run/front.sock", b"unix", Reason.FORBIDDEN),
    ],
)
def test_a_listener_answers_to_the_address_it_is_bound_to(bound, host, refused):
    """Bound to every interface it answers to every address, because no DNS can put an address into `Host`."""
    assert verdict(default_hosts(bound), host) is refused


@pytest.mark.parametrize(("allowed", "host"), [({"*"}, b"any.example"), ({"Front.Example:443"}, b"front.example")])
def test_names_can_be_allowed(allowed, host):
    assert verdict(allowed, host) is None


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"origin": b"http://localhost:8080"}, None),
        ({"origin": b"http://LOCALHOST:8080"}, None),
        ({"origin": b"http://localhost:3000"}, Reason.FORBIDDEN),
        ({"origin": b"https://evil.example"}, Reason.FORBIDDEN),
        ({"origin": b"null"}, Reason.FORBIDDEN),
        ({"origin": b""}, Reason.FORBIDDEN),
        ({"sec_fetch_site": b"none"}, None),
        ({"sec_fetch_site": b"same-origin"}, None),
        ({"sec_fetch_site": b"same-site"}, Reason.FORBIDDEN),
        ({"sec_fetch_site": b"cross-site"}, Reason.FORBIDDEN),
    ],
)
def test_a_page_of_another_origin_is_refused(fields, refused):
    """Another port of localhost is another origin, although browsers call it the same site."""
    assert verdict(DEFAULT, b"localhost:8080", **fields) is refused


@pytest.mark.parametrize("hosts", [[], [b"localhost", b"localhost"]])
def test_a_request_names_one_host(hosts):
    with pytest.raises(SubstrateError) as refused:
        HostRule({"*"}).check({b"host": hosts})
    assert refused.value.reason is Reason.BAD_REQUEST


async def test_who_calls_by_a_name_that_is_not_served_hears_which_setting_allows_it():
    with Bench() as bench:
        answer = await call(bench.app, "/invoke/thumb", host="front.example")
    assert "see the setting FC_INVOKE_ALLOWED_HOSTS" in answer.text


@pytest.mark.parametrize("target", ["/invoke/thumb", "/http/thumb/page"])
async def test_no_guest_runs_for_a_page(target):
    with Bench() as bench:
        for fields in ([("origin", "http://evil.example")], [("sec-fetch-site", "cross-site")]):
            assert (await call(bench.app, target, fields=fields)).status == 403
        assert (await call(bench.app, target, host="evil.example")).status == 403
    assert bench.executor.invocations == []


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:8080", True),
        ("127.9.9.9", True),
        ("[::1]:8080", True),
        ("::1", True),
        ("localhost:8080", True),
        ("unix:/run/x.sock", True),
        (":8080", False),
        ("0.0.0.0:8080", False),
        ("[::]:8080", False),
        ("10.0.0.1:80", False),
        ("localhost.example:80", False),
    ],
)
def test_loopback_is_known_when_seen(address, loopback):
    assert is_loopback(address) is loopback


@pytest.mark.parametrize("address", ["127.0.0.1:8080", ":8080"])
@pytest.mark.parametrize("has_auth", [True, False])
@pytest.mark.parametrize("has_process_workloads", [True, False])
def test_only_a_public_listener_without_auth_over_process_guests_refuses_to_start(
    address, has_auth, has_process_workloads
):
    refused = refuse_open(address, has_auth=has_auth, has_process_workloads=has_process_workloads)
    assert (refused is not None) == (address == ":8080" and not has_auth and has_process_workloads)
