"""A real Chromium, without a window, told what to do over its DevTools protocol on a pair of pipes."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

PATIENCE_S = 20.0
_FLAGS = [
    "--headless",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-gpu",
    "--disable-sync",
    "--font-render-hinting=none",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
    "--no-proxy-server",
]


class Refused(Exception):
    """Chromium could not do what it was told."""


class Browser:
    """One Chromium. What it tells by itself goes to the tab that it concerns."""

    def __init__(self, commands: asyncio.StreamWriter) -> None:
        self._commands = commands
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._tabs: dict[str, Tab] = {}

    async def do(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Give one command and wait for what comes of it. Raises `Refused`."""
        number = next(self._numbers)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        command = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        self._commands.write(json.dumps(command).encode() + b"\0")
        async with asyncio.timeout(PATIENCE_S):
            told = await answer
        if "error" in told:
            raise Refused(f"{method}: {told['error']['message']}")
        return told["result"]

    @asynccontextmanager
    async def stranger(self) -> AsyncIterator[Tab]:
        """A tab whose reader has never been anywhere, for the length of the block: nothing of it is kept."""
        context = (await self.do("Target.createBrowserContext"))["browserContextId"]
        try:
            yield await self.tab(browserContextId=context)
        finally:
            await self.do("Target.disposeBrowserContext", browserContextId=context)

    async def tab(self, *, width: int = 1180, height: int = 900, **where: str) -> Tab:
        """A new tab of that size in pixels, in UTC and English."""
        target = (await self.do("Target.createTarget", url="about:blank", **where))["targetId"]
        session = (await self.do("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        tab = self._tabs[session] = Tab(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            await tab.do(f"{domain}.enable")
        await tab.do("Emulation.setTimezoneOverride", timezoneId="UTC")
        await tab.do("Emulation.setLocaleOverride", locale="en-GB")
        await tab.resize(width, height)
        return tab

    def take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            answer = self._asked.pop(message["id"])
            if not answer.done():
                answer.set_result(message)
        elif (tab := self._tabs.get(message.get("sessionId", ""))) is not None:
            tab.take(message["method"], message["params"])


class Tab:
    """One page in the browser; `complaints` are what its console said against it, `sent` the requests it made."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session
        self.complaints: list[str] = []
        self.sent: list[tuple[str, str]] = []

    async def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        return await self._browser.do(method, self._session, **parameters)

    async def resize(self, width: int, height: int) -> None:
        await self.do(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def prefer(self, scheme: str) -> None:
        """Be a reader who likes `light` or `dark`."""
        await self.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def open(self, url: str) -> None:
        """Go somewhere and wait until it is there. Raises `Refused`."""
        told = await self.do("Page.navigate", url=url)
        if "errorText" in told:
            raise Refused(f"{url}: {told['errorText']}")
        await self.until("document.readyState === 'complete'")

    async def value(self, script: str) -> Any:
        """What an expression comes to in the page; a promise is awaited. Raises `Refused` with what it throws."""
        told = await self.do(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
            allowUnsafeEvalBlockedByCSP=False,
        )
        if "exceptionDetails" in told:
            thrown = told["exceptionDetails"]
            raise Refused(thrown.get("exception", {}).get("description", thrown["text"]))
        return told["result"].get("value")

    async def until(self, script: str, *, within_s: float = PATIENCE_S) -> Any:
        """Wait until an expression is true in the page; what it came to."""
        try:
            async with asyncio.timeout(within_s):
                while True:
                    with suppress(Refused):  # the page may be on its way to another one
                        if value := await self.value(script):
                            return value
                    await asyncio.sleep(0.02)  # what another program does can only be looked at
        except TimeoutError:
            raise AssertionError(f"never true: {script}; the page says: {await self.text()}") from None

    async def text(self) -> str:
        """What a reader sees."""
        return str(await self.value("document.body ? document.body.innerText : ''"))

    async def picture(self) -> bytes:
        """The whole page as PNG, as wide as the tab."""
        width, height = await self.value("[innerWidth, document.documentElement.scrollHeight]")
        await self.resize(width, height)
        return base64.b64decode((await self.do("Page.captureScreenshot", format="png"))["data"])

    def take(self, method: str, about: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            thrown = about["exceptionDetails"]
            self.complaints.append(thrown.get("exception", {}).get("description", thrown["text"]))
        elif method == "Runtime.consoleAPICalled" and about["type"] in {"error", "warning", "assert"}:
            self.complaints.append(" ".join(str(each.get("value", each)) for each in about["args"]))
        elif method == "Log.entryAdded" and about["entry"]["level"] in {"error", "warning"}:
            self.complaints.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.sent.append((about["request"]["method"], about["request"]["url"]))


@asynccontextmanager
async def chromium(directory: Path, *flags: str) -> AsyncIterator[Browser]:
    """A browser of one's own for the length of the block; it knows nothing and leaves nothing but in `directory`."""
    commands_r, commands_w = os.pipe()
    events_r, events_w = os.pipe()
    unboxed = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's own rule for root
    arguments = ["chromium", *_FLAGS, *unboxed, f"--user-data-dir={directory / 'profile'}", *flags, "about:blank"]
    log = (directory / "chromium.log").open("ab")
    try:
        child = await asyncio.create_subprocess_exec(
            "bash",
            "-c",
            f'exec "$@" 3<&{commands_r} 4>&{events_w} {commands_r}<&- {events_w}>&-',
            "bash",
            *arguments,
            env={"PATH": os.environ["PATH"], "HOME": str(directory), "LANG": "C.UTF-8"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(commands_r, events_w),
            start_new_session=True,
        )
    finally:
        os.close(commands_r)
        os.close(events_w)
        log.close()
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, os.fdopen(commands_w, "wb"))
    browser = Browser(asyncio.StreamWriter(transport, protocol, None, loop))
    reader = asyncio.StreamReader(limit=2**26)
    events, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(events_r, "rb"))
    try:
        async with asyncio.TaskGroup() as duties:
            listening = duties.create_task(_listen(reader, browser), name="listen to chromium")
            yield browser
            listening.cancel()
    finally:
        transport.close()
        events.close()
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # a group of its own: whatever it started
        await child.wait()


async def _listen(reader: asyncio.StreamReader, browser: Browser) -> None:
    with suppress(asyncio.IncompleteReadError):
        while True:
            browser.take(json.loads((await reader.readuntil(b"\0"))[:-1]))
