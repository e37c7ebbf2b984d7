"""The live page in a real Chromium: it shows what the daemon is at, keeps its policy, and asks for a token."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from browser.chromium import Browser, Tab, chromium
from e2e.system import System, Table, lent, system, workload
from real_parts import needs

pytestmark = [needs("chromium"), pytest.mark.asyncio(loop_scope="module")]


def table() -> Table:
    return {
        "echo": workload("substrate_guest.workloads.echo:app", pool=1),
        "dies": {"command": ["python", "-c", "import sys; sys.exit('no such model')"], "memMib": 64},
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    """One for all: every test has a tab that has never been anywhere."""
    async with chromium(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def reading(tmp_path: Path, browser: Browser) -> Callable[..., object]:
    """Starts a system and opens its page."""

    @asynccontextmanager
    async def opened(kind: str = "single", **settings: str) -> AsyncIterator[tuple[System, Tab]]:
        async with system(kind, tmp_path, table(), **settings) as running, browser.stranger() as tab:
            await tab.open(running.front.admin_url + "/")
            yield running, tab

    return opened


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    """A system for all tests that do not mind what was called before."""
    async with system("single", tmp_path_factory.mktemp("system"), table()) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def read(shared: System, browser: Browser) -> AsyncIterator[tuple[System, Tab]]:
    """That system and its page."""
    async with lent(shared, parked=1) as running, browser.stranger() as tab:
        await tab.open(running.front.admin_url + "/")
        yield running, tab


def row(table: str, first: str) -> str:
    """The text of the row of a table whose first cell says `first`."""
    rows = f"[...document.querySelectorAll('#{table} tr')]"
    return f"({rows}.find(row => row.cells[0].innerText === '{first}')?.innerText ?? '')"


@pytest.mark.parametrize("kind", ["single", "split"])
async def test_the_page_shows_the_running_daemon_and_what_its_calls_come_to(reading, kind):
    """Without a touch: each call, its kind of start, its failure with id and story."""
    async with reading(kind) as (running, tab):
        await tab.until(f"{row('workloads', 'echo')}.includes('process')")
        await tab.until(f"{row('nodes', 'node-1')}.includes('takes calls')")
        assert await tab.value("at('daemon').innerText") == running.front.name
        assert await tab.value("at('state').innerText") == "ready"
        assert "Anybody may call who" in await tab.value("at('doors').innerText")
        await tab.until("at('calls').innerText.startsWith('0 ')")
        await tab.until(f"{row('workloads', 'echo')}.split('\\t')[4] === '1'", within_s=60.0)  # one is parked

        await running.invoke("echo")
        await tab.until("at('calls').innerText.startsWith('1 ')")
        assert "1 parked" in await tab.until(row("workloads", "echo"))
        assert "ms" in await tab.value("at('latency').innerText")

        failed = (await running.invoke("dies")).headers["fc-invocation-id"]
        await tab.until(f"at('failures').innerText.includes('{failed}')")
        assert "boot-failed" in await tab.value("at('failures').innerText")
        assert await tab.value("at('calls').innerText") == "2 · 1 failed"
        await tab.value("document.querySelector('#failures button').click()")
        await tab.until("at('story').open && at('story-events').innerText.includes('invocation.ended')")
        assert not tab.complaints


async def test_a_node_shows_its_page_too(reading):
    """With the guests it has, counted by their exchanges."""
    async with reading("split") as (running, tab):
        await running.invoke("echo")
        await tab.open(running.node.admin_url + "/")
        await tab.until("at('calls').innerText.startsWith('1 ')")
        assert await tab.value("at('daemon').innerText") == "node-daemon"
        await tab.until(f"/1 (cold|parked)/.test({row('workloads', 'echo')})")
        assert not tab.complaints


async def test_a_daemon_that_falls_silent_is_told_and_one_that_is_back_is_shown_again(reading):
    """What was last known is dimmed rather than taken for the truth."""
    async with reading() as (running, tab):
        await tab.until("at('state').innerText === 'ready'")
        running.front.signal(9)
        await running.front.ended()
        await tab.until("at('state').innerText === 'no answer'")
        assert await tab.value("getComputedStyle(at('main')).opacity") < "1"
        assert "last heard" in await tab.value("at('clock').innerText")


async def test_the_page_loads_nothing_but_itself_and_asks_nobody_else(read):
    running, tab = read
    await tab.until("at('state').innerText === 'ready'")
    urls = {url for _, url in tab.sent if not url.startswith("data:")}
    assert urls == {running.front.admin_url + path for path in ("/", "/v1/live", "/readyz")}
    assert {method for method, _ in tab.sent} == {"GET"}


async def test_no_script_but_its_own_runs_in_the_page(read):
    """Whatever may get into it: the policy stops it, and says so."""
    _, tab = read
    await tab.until("at('state').innerText === 'ready'")
    broken = await tab.value(
        """new Promise(done => {
             const broken = new Set();
             document.addEventListener('securitypolicyviolation', event => broken.add(event.effectiveDirective));
             const add = (name, fields) => {
               const made = document.createElement(name);
               for (const [key, value] of Object.entries(fields)) made.setAttribute(key, value);
               document.body.append(made);
               return made;
             };
             try { document.body.innerHTML += '<img src=x onerror="window.ran = 1">'; } catch {}
             try { add('script', {}).textContent = 'window.ran = 2'; } catch {}
             try { eval('window.ran = 3'); } catch {}
             try { add('div', {onclick: 'window.ran = 4'}).click(); } catch {}
             add('img', {src: 'http://127.0.0.1:9/leak'});
             add('iframe', {src: 'http://127.0.0.1:9/'});
             add('style', {}).textContent = 'body { display: none }';
             add('form', {action: 'http://127.0.0.1:9/'}).submit();
             fetch('http://127.0.0.1:9/').catch(() => {});
             setTimeout(() => done([...broken].sort()), 500);
           })"""
    )
    assert await tab.value("window.ran") is None
    assert {"connect-src", "form-action", "frame-src", "img-src", "style-src-elem"} <= set(broken)
    assert "require-trusted-types-for" in broken
    assert await tab.value("getComputedStyle(document.body).display") == "block"


async def test_with_a_token_the_page_asks_for_it_and_keeps_it_to_itself(reading, tmp_path):
    """Nothing is shown without it; it is in no URL and in no storage, and loading the page again forgets it."""
    token = "t0ken-of-an-operator"
    (tmp_path / "operators").write_text(f"ada sha256:{hashlib.sha256(token.encode()).hexdigest()}\n")
    async with reading(ADMIN_TOKEN_FILE=str(tmp_path / "operators")) as (_, tab):
        await tab.until("!at('ask').hidden && document.activeElement === at('token')")
        assert "echo" not in await tab.text()

        async def type_in(words: str) -> None:
            await tab.do("Input.insertText", text=words)
            for kind in ("keyDown", "keyUp"):
                await tab.do(
                    "Input.dispatchKeyEvent", type=kind, key="Enter", text="\r", windowsVirtualKeyCode=13, code="Enter"
                )

        await type_in("wrong")
        await tab.until("at('asked').innerText === 'That token was not accepted.'")
        await type_in(token)
        await tab.until(f"!at('main').hidden && {row('workloads', 'echo')}.includes('process')")
        assert await tab.value("at('ask').hidden")
        assert "is an operator" not in await tab.value("at('doors').innerText")
        kept = "JSON.stringify([location.href, document.cookie, {...localStorage}, {...sessionStorage}])"
        assert token not in await tab.value(kept)
        assert not any(token in url for _, url in tab.sent)
        await tab.do("Page.reload")
        await tab.until("!at('ask').hidden && at('main').hidden")


async def test_the_keyboard_reaches_everything_and_pictures_have_words(read):
    """Focus stays where it is while the page updates itself."""
    running, tab = read
    await running.invoke("dies")
    await tab.until("document.querySelector('#failures button') !== null")
    await tab.do("Input.dispatchKeyEvent", type="keyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert await tab.value("document.activeElement.innerText") == "Story"
    before = await tab.value("at('clock').innerText")
    await tab.until(f"at('clock').innerText !== '{before}'")
    assert await tab.value("document.activeElement.innerText") == "Story"
    assert await tab.value("[...document.querySelectorAll('svg[role=img]')].every(each => each.ariaLabel)")
    assert await tab.value("[...document.querySelectorAll('table')].every(each => each.tHead)")
    assert await tab.value("[...document.querySelectorAll('input')].every(each => each.labels.length)")
