"""A web page in a developer's browser never reaches a guest, nor learns anything of one: tried in a real Chromium."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from browser.chromium import Browser, Tab, chromium
from e2e.system import System, lent, system, until, workload
from real_parts import needs
from service.loopback import answer, served, whole_body

pytestmark = [needs("chromium"), pytest.mark.asyncio(loop_scope="module")]

ATTACK = (Path(__file__).parent / "attack.js").read_text()
REBOUND = "rebound.example"
"""A name of the attacker's that leads to this machine."""
GUESTS = ["/invoke/echo", "/http/echo/any/path"]
SECRETS = ["/", "/v1/live", "/metrics", "/v1/audit", "/v1/invocations/" + "a" * 32]


@asynccontextmanager
async def stranger() -> AsyncIterator[int]:
    """A site that serves an empty page on a port of this machine."""

    async def page(_scope, receive, send):
        await whole_body(receive)
        await answer(send, body=b"<!doctype html><body>", headers=[(b"content-type", b"text/html")])

    async with served(page) as site:
        yield site.port


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[System, Browser]]:
    """A developer's machine: a daemon that anybody on it may call, and a browser in which every name leads to it."""
    table = {"echo": workload("substrate_guest.workloads.echo:app")}
    everywhere = "--host-resolver-rules=MAP *.example 127.0.0.1"
    place = tmp_path_factory.mktemp("machine")
    async with system("single", place, table) as running, chromium(place, everywhere) as browser:
        yield running, browser


@pytest_asyncio.fixture(loop_scope="module")
async def developer(machine: tuple[System, Browser]) -> AsyncIterator[tuple[System, Tab]]:
    """That machine for one test, which finds it at rest and leaves it so; its browser has been nowhere."""
    shared, browser = machine
    async with lent(shared, parked=0) as running, browser.stranger() as tab:
        yield running, tab


async def attacked(tab: Tab, base: str, path: str) -> dict[str, str]:
    """Try everything from the page that is open; what it learned each time."""
    return await tab.value(f"(() => {{ {ATTACK}; return attack('{base}', '{path}'); }})()")


def assert_no_guest_was_started(running: System) -> None:
    """By the guests' own journal, the daemon's events and the processes of this machine."""
    assert running.journal() == []
    for event in ("invocation.accepted", "slot.taken", "guest.claimed", "guest.parked"):
        assert running.front.seen(event) == [], event
    assert running.guests() == []


@pytest.mark.parametrize("site", ["127.0.0.1", "localhost", "evil.example"])
async def test_a_page_of_another_origin_starts_no_guest_and_learns_nothing(developer, site):
    """Of this machine under another port or name, or of the wide world: whatever it sends, in whatever way."""
    running, tab = developer
    async with stranger() as port:
        for base, paths in ((running.front.url, GUESTS), (running.front.admin_url, SECRETS)):
            for path in paths:
                await tab.open(f"http://{site}:{port}/")
                learned = await attacked(tab, base, path)
                assert len(learned) > 18
                assert set(learned.values()) == {"nothing"}, (path, learned)
        turned_away = [event["message"] for event in running.front.seen("call.refused")]
        assert len(turned_away) > 70, "the requests did arrive"
        assert set(turned_away) == {"forbidden"}
        assert_no_guest_was_started(running)


async def test_a_page_that_a_guest_serves_learns_nothing_of_what_operators_see(developer):
    """The public listener's pages are of another origin than the admin listener's."""
    running, tab = developer
    for path in SECRETS:
        await tab.open(running.front.url + "/healthz")
        learned = await attacked(tab, running.front.admin_url, path)
        assert set(learned.values()) == {"nothing"}, (path, learned)


async def test_a_page_that_sends_its_reader_there_starts_no_guest(developer):
    """By a link, a form or a script that leaves for the daemon's own address."""
    running, tab = developer
    url = running.front.url
    ways = [
        f"location.href = '{url}/http/echo/'",
        f"location.replace('{url}/http/echo/')",
        f"Object.assign(document.createElement('a'), {{href: '{url}/http/echo/'}}).click()",
        f"""document.body.append(Object.assign(document.createElement('form'),
            {{action: '{url}/invoke/echo', method: 'post'}})); document.forms[0].submit()""",
        f"location.href = '{running.front.admin_url}/'",
    ]
    async with stranger() as port:
        for refused, way in enumerate(ways, start=1):
            await tab.open(f"http://evil.example:{port}/")
            await tab.value(f"{way}, 0" if "append" not in way else f"(() => {{ {way} }})()")
            await tab.until("location.hostname === '127.0.0.1' && document.body.innerText.includes('forbidden')")
            await until(lambda refused=refused: len(running.front.seen("call.refused")) >= refused)
        assert_no_guest_was_started(running)


async def test_a_name_that_was_rebound_to_this_machine_starts_no_guest_and_learns_nothing(developer):
    """The page is then of the same origin as the daemon, as far as the browser knows: only its name gives it away."""
    running, tab = developer
    for url, paths in ((running.front.url, GUESTS), (running.front.admin_url, SECRETS)):
        rebound = url.replace("127.0.0.1", REBOUND)
        for path in paths:
            await tab.open(rebound + "/healthz")  # a page that is there for whoever asks
            learned = await attacked(tab, rebound, path)
            read = {words for words in learned.values() if words != "nothing"}
            assert all("forbidden" in words for words in read), learned
            assert len(read) > 0, "the page could have read an answer"
    assert {event["reason"] for event in running.front.seen("call.refused")} == {"forbidden"}
    assert_no_guest_was_started(running)


async def test_the_same_requests_do_start_guests_when_no_browser_sends_them(developer):
    """So that it is the browser's own fields that give a page away, and that this file can fail."""
    running, _ = developer

    async def ended() -> int:
        return int((await running.client.get(running.front.admin_url + "/v1/live")).json()["traffic"]["ended"])

    before = await ended()
    for method, path in (("POST", "/invoke/echo"), ("GET", "/http/echo/any/path"), ("PUT", "/http/echo/any/path")):
        reply = await running.client.request(method, running.front.url + path, content=b"x")
        assert (reply.status_code, "fc-error" in reply.headers) == (200, False), reply.text
    assert len(running.journal()) == 3
    await until(lambda: len(running.front.seen("invocation.ended")) == 3)  # told once the caller has its answer
    assert await ended() == before + 3


async def test_a_listener_that_turns_nobody_away_is_reached_in_all_these_ways(developer):
    """The attack is a real one: an open door is found, and its secret read."""
    came: list[tuple[str, str]] = []

    async def open_door(scope, receive, send):
        if scope["type"] != "http":
            came.append(("WEBSOCKET", scope["path"]))
            await send({"type": "websocket.close"})
            return
        came.append((scope["method"], dict(scope["headers"]).get(b"sec-fetch-dest", b"").decode()))
        await whole_body(receive)
        allowed = [(b"access-control-allow-origin", b"*"), (b"access-control-allow-headers", b"*"),
                   (b"access-control-allow-methods", b"*"), (b"content-type", b"text/javascript")]  # fmt: skip
        await answer(send, body=b"'a secret'", headers=allowed)

    _, tab = developer
    async with stranger() as port, served(open_door) as door:
        await tab.open(f"http://localhost:{port}/")
        learned = await attacked(tab, f"http://127.0.0.1:{door.port}", "/invoke/echo")
    read = ("simple post", "simple get", "preflight for json", "preflight for a header", "preflight for a method")
    assert {name: learned[name] for name in read} == dict.fromkeys(read, "200 'a secret'")
    assert (learned["script"], learned["module"]) == ("a script", "a module")
    assert sum(method == "POST" for method, _ in came) >= 9
    assert any(method == "OPTIONS" for method, _ in came)  # and then it is remembered
    assert {"image", "script", "style", "iframe", "object", "empty"} <= {kind for _, kind in came}
