"""Calling your own workload in tests: each call in a real process guest of its own, and what became of it.

The fixture `substrate` of `fc_invoke.pytest_plugin` is made of this; it needs no pytest itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import quote

import httpx
from msgspec import Struct

from fc_invoke.client import fetch_story, open_client

STARTED_WITHIN_S, TOLD_WITHIN_S, ENDED_WITHIN_S = 60.0, 10.0, 15.0
_NOT_STARTED = {"boot-failed", "restore-failed", "not-ready", "incompatible"}

Event = dict[str, Any]


class NotStarted(Exception):
    """The workload, or what serves it, does not start; the message says why, with the workload's own traceback."""


class Receipt(Struct, frozen=True, kw_only=True):
    """What one call was given and took; what is not known, or never was, is None. A `start` is warm, cold or pool."""

    guest: str | None = None
    start: str | None = None
    isolation: str | None = None
    queue_ms: float | None = None
    ready_ms: float | None = None
    guest_ms: float | None = None
    total_ms: float | None = None
    cpu_ms: float | None = None
    peak_mib: float | None = None


class Reply(Struct, frozen=True, kw_only=True):
    """The whole answer to one call, whose guest is gone by now, and all that is known of the call.

    `error` and `ran` are set if the answer is none of the guest's. `console` is what the guest printed, `events` the
    story that `fc-invoke explain` tells.
    """

    request: str
    status_code: int
    headers: httpx.Headers
    content: bytes
    events: list[Event]

    @property
    def id(self) -> str:
        """The id of the invocation."""
        return str(self.headers["fc-invocation-id"])

    @property
    def error(self) -> str | None:
        """Why there is no answer of the guest's, such as `guest-timeout`."""
        error: str | None = self.headers.get("fc-error")
        return error

    @property
    def ran(self) -> str | None:
        """Whether the workload may have acted all the same: `no` or `maybe`."""
        ran: str | None = self.headers.get("fc-ran")
        return ran

    @property
    def text(self) -> str:
        """The body as UTF-8."""
        return self.content.decode(errors="replace")

    def json(self) -> Any:  # noqa: ANN401  # JSON is any of its types
        """The body as JSON; raises `ValueError` when it is not."""
        return json.loads(self.content)

    @property
    def console(self) -> str:
        """What the guest printed, standard output and errors together."""
        return "\n".join(
            event["console"] for event in self.events if event["event"] == "guest.gone" and "console" in event
        )

    @property
    def receipt(self) -> Receipt:
        """What the call was given and took."""
        known: Event = {}
        for event in self.events:
            known |= {name: event[name] for name in Receipt.__struct_fields__ if event.get(name) is not None}
        return Receipt(**known)

    def __str__(self) -> str:
        """The call in a line, and what its guest printed below."""
        came = self.error or f"{self.receipt.start} start"
        return "\n  | ".join([f"{self.request} -> {self.status_code}, {came}, {self.id}", *self.console.splitlines()])


class Served:
    """One workload on a port of its own, served as `fc-invoke dev` serves it; a context manager."""

    def __init__(
        self,
        target: str,
        *,
        path: Path,
        memory_mib: int = 256,
        timeout_s: float = 30.0,
        env: Mapping[str, str] | None = None,
        calls: list[Reply] | None = None,
    ) -> None:
        """`target` is `module:attribute` below `path`; `calls` gets every reply. Nothing runs before it is entered."""
        self._arguments = [
            *("dev", target, "--json", "--lifeline", "--port=0", "--admin-port=0", "--name=app"),
            *(f"--path={path}", f"--memory={memory_mib}", f"--timeout={timeout_s:g}s"),
            *(f"--env={name}={value}" for name, value in (env or {}).items()),
        ]
        self._calls = [] if calls is None else calls
        self._undo = ExitStack()
        self._news = threading.Condition()
        self._ended: set[tuple[str, str]] = set()
        self._addresses: Event | None = None
        self._said: list[str] = []
        self._closed = False

    def __enter__(self) -> Self:
        """Start it; raises `NotStarted` when it can't be served at all."""
        with self._undo as undo:
            daemon = subprocess.Popen(
                [sys.executable, "-m", "fc_invoke", *self._arguments],
                stdin=subprocess.PIPE,  # which ends with this process, however that ends
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            undo.callback(_end, daemon)
            assert daemon.stdin is not None
            undo.enter_context(daemon.stdin)
            assert daemon.stderr is not None
            undo.enter_context(daemon.stderr)
            reader = threading.Thread(target=self._read, args=(daemon.stderr,), name="substrate-events", daemon=True)
            reader.start()
            undo.callback(reader.join)
            undo.callback(_stop, daemon)
            with self._news:
                self._news.wait_for(lambda: self._addresses or self._closed, STARTED_WITHIN_S)
            if self._addresses is None:
                raise NotStarted("\n".join(self._said) or f"it did not listen within {STARTED_WITHIN_S:.0f} s")
            self.url = f"http://{self._addresses['listen']}"
            self._admin_url = f"http://{self._addresses['admin']}"
            self._client = undo.enter_context(open_client(self.url, token=None))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it; nothing of it is left."""
        self._undo.close()

    def post(self, path: str | None = None, *, session: str | None = None, **options: Any) -> Reply:  # noqa: ANN401
        """POST `/invoke`, or `/invoke/{session}`, or `path`; `options` are those of `httpx.Client.request`."""
        return self.request("POST", path, session=session, **options)

    def get(self, path: str = "/", **options: Any) -> Reply:  # noqa: ANN401  # httpx's own
        """GET a path."""
        return self.request("GET", path, **options)

    def request(self, method: str, path: str | None, *, session: str | None = None, **options: Any) -> Reply:  # noqa: ANN401
        """Call it, and wait for the whole reply and the end of its guest. Raises `NotStarted`."""
        with self.stream(method, path, session=session, **options) as response:
            response.read()
        return self._calls[-1]

    @contextmanager
    def stream(
        self,
        method: str,
        path: str | None = None,
        *,
        session: str | None = None,
        **options: Any,  # noqa: ANN401
    ) -> Iterator[httpx.Response]:
        """Call it, and read the reply as it comes; what is known of the call is the last of `calls` afterwards."""
        if path is None:
            segments = session.split("/") if session else []
            url = "/".join(["/invoke/app", *(quote(segment, safe="") for segment in segments)])
        else:
            url = f"/http/app/{path.removeprefix('/')}"
        with self._client.stream(method, url, **options) as response:
            yield response
        self._remember(f"{method} {url}", response)

    @property
    def calls(self) -> list[Reply]:
        """Every call so far, the newest last."""
        return self._calls

    def _remember(self, request: str, response: httpx.Response) -> None:
        invocation_id = response.headers["fc-invocation-id"]
        with self._news:
            self._news.wait_for(lambda: self._is_over(invocation_id) or self._closed, TOLD_WITHIN_S)
        story = fetch_story(self._admin_url, invocation_id, token=None)
        reply = Reply(
            request=request,
            status_code=response.status_code,
            headers=response.headers,
            content=_content(response),
            events=story["events"],
        )
        self._calls.append(reply)
        if reply.error in _NOT_STARTED:
            raise NotStarted(reply.text)

    def _is_over(self, invocation_id: str) -> bool:
        """Whether its caller has been answered, and its slot, if it had one, is free again: then its guest is gone."""
        said = {event for event, of in self._ended if of == invocation_id}
        answered = not said.isdisjoint({"invocation.ended", "call.refused"})
        return answered and ("slot.taken" not in said or "slot.freed" in said)

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                event = {"event": "", "message": line.rstrip()}
            with self._news:
                if event["event"] == "daemon.started":
                    self._addresses = event
                elif not event["event"] or event.get("level") in {"warning", "error"}:
                    self._said.append(event.get("message", line))
                elif "invocation_id" in event:
                    self._ended.add((event["event"], event["invocation_id"]))
                self._news.notify_all()
        with self._news:
            self._closed = True
            self._news.notify_all()


class Substrate:
    """What the fixture gives: serves workloads, and remembers every call of them."""

    def __init__(self, root: Path) -> None:
        """`root` is where relative paths begin."""
        self.calls: list[Reply] = []
        self._root = root
        self._undo = ExitStack()
        self._served: dict[str, Served] = {}

    def serve(
        self,
        target: str,
        *,
        path: str | os.PathLike[str] = ".",
        memory_mib: int = 256,
        timeout_s: float = 30.0,
        env: Mapping[str, str] | None = None,
    ) -> Served:
        """Serve `module:attribute` below `path`, by default the root of the tests; the same again if asked for again.

        Raises `NotStarted`.
        """
        asked = repr((target, path, memory_mib, timeout_s, sorted((env or {}).items())))
        if asked not in self._served:
            served = Served(
                target,
                path=self._root / path,
                memory_mib=memory_mib,
                timeout_s=timeout_s,
                env=env,
                calls=self.calls,
            )
            self._served[asked] = self._undo.enter_context(served)
        return self._served[asked]

    def close(self) -> None:
        """End everything that is served."""
        self._undo.close()


def _content(response: httpx.Response) -> bytes:
    try:
        return response.content
    except httpx.ResponseNotRead:  # whoever streamed it had it piece by piece
        return b""


def _stop(daemon: subprocess.Popen[str]) -> None:
    daemon.terminate()
    with suppress(subprocess.TimeoutExpired):
        daemon.wait(ENDED_WITHIN_S)
        return
    daemon.kill()


def _end(daemon: subprocess.Popen[str]) -> None:
    daemon.kill()
    daemon.wait()
