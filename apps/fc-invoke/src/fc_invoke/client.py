"""Calls to a running daemon, for people at a terminal: one invocation, or the story of one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from msgspec import Struct

_PHASES = ("queue_ms", "claim_ms", "ready_ms", "guest_ms", "total_ms")
_USED = (("cpu_ms", "CPU", "ms"), ("peak_mib", "peak", "MiB"))


class Call(Struct, frozen=True):
    """What to call, and with which body."""

    workload: str
    session: str | None
    body: bytes


class Unreachable(Exception):
    """A daemon could not be asked; the message says where and why."""


def open_client(url: str, *, token: str | None) -> httpx.Client:
    """A client of one listener. It waits as long as the daemon does: the daemon bounds every call.

    Raises `Unreachable` for what is no URL.
    """
    check_url(url)
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(None, connect=5.0), trust_env=False)


def check_url(url: str) -> None:
    """Raise `Unreachable` for what names no listener because it does not say how to speak to it."""
    if not url.startswith(("http://", "https://")):
        raise Unreachable(f"{url} is no URL: its http:// is missing. Say http://{url}")


def unanswered(url: str, error: Exception, *, option: str) -> str:
    """Why a listener could not be asked, and, if nobody listens, with which option to name another."""
    if isinstance(error, httpx.ConnectError):
        return f"no daemon answers at {url}: {error}. Start one with `fc-invoke`, or name its listener with {option}."
    return f"{url}: {error}"


def read_body(data: str | None, file: str | None) -> bytes:
    """The body that the command line names: text, a file (`@file` for curl's users), or `-` for standard input.

    Raises `OSError`.
    """
    if data is not None and data.startswith("@"):
        file = data[1:]
    if file is not None:
        return sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    return (data or "").encode()


def told_errors(verb: Callable[[], int]) -> int:
    """Do what a command does; what it can't do becomes words on standard error, and status 1."""
    try:
        return verb()
    except BrokenPipeError:  # no fault: whoever reads our output has seen enough
        raise
    except (Unreachable, OSError) as error:
        print(f"fc-invoke: {error}", file=sys.stderr)
        return 1


def read_token(path: str | None) -> str | None:
    """The token in a file, or None without one. Raises `OSError`."""
    return Path(path).read_text().strip() if path is not None else None


def invoke(url: str, admin_url: str, call: Call, *, token: str | None, admin_token: str | None) -> int:
    """Call a workload: its answer on standard output, where the time went on standard error. 0 if it went well."""
    segments = [call.workload, *(call.session.split("/") if call.session else ())]
    path = "/invoke/" + "/".join(quote(segment, safe="") for segment in segments)
    try:
        with (
            open_client(url, token=token) as client,
            client.stream("POST", path, content=call.body, headers={"content-type": "application/json"}) as reply,
        ):
            for piece in reply.iter_bytes():
                sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()
    except httpx.HTTPError as error:
        raise Unreachable(unanswered(url, error, option="--url")) from error
    invocation_id = reply.headers.get("fc-invocation-id", "")
    print(f"\n\n{reply.status_code} {_origin(reply)}   invocation {invocation_id}", file=sys.stderr)
    try:
        print(told(fetch_story(admin_url, invocation_id, token=admin_token)), file=sys.stderr)
    except Unreachable as error:
        print(f"{reply.headers.get('server-timing', '')}\n(no story: {error})", file=sys.stderr)
    return 0 if reply.status_code < 400 else 1


def explain(admin_url: str, invocation_id: str, *, admin_token: str | None) -> int:
    """Tell the whole story of one invocation on standard output."""
    print(told(fetch_story(admin_url, invocation_id, token=admin_token)))
    return 0


def fetch_story(admin_url: str, invocation_id: str, *, token: str | None) -> dict[str, Any]:
    """The events of one invocation. Raises `Unreachable` when the daemon is, or knows nothing of it."""
    try:
        with open_client(admin_url, token=token) as client:
            answer = client.get(f"/v1/invocations/{quote(invocation_id, safe='')}")
        if answer.status_code != 200:
            raise Unreachable(f"{admin_url}: {answer.text.strip()}")
        return dict(answer.json())
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise Unreachable(unanswered(admin_url, error, option="--admin-url")) from error


def told(story: dict[str, Any]) -> str:
    """A story in lines: the sum of it; then milliseconds since its beginning, what happened, the details."""
    lines = [*_summed(story["summary"]), ""]
    lines += [f"(node {node!r} tells nothing: {why})" for node, why in story.get("silent", {}).items()]
    for event in story["events"]:
        details = "  ".join(f"{key}={_brief(value)}" for key, value in event.items() if key not in {"at_ms", "event"})
        lines.append(f"{event['at_ms']:>10.1f} ms  {event['event']:<22} {details}")
    return "\n".join(lines)


def _summed(summary: dict[str, Any]) -> list[str]:
    """What became of an invocation, in a few lines, as far as it is known."""
    phases = [f"{name.removesuffix('_ms')} {summary[name]:.1f} ms" for name in _PHASES if name in summary]
    used = [f"{label} {summary[name]:.1f} {unit}" for name, label, unit in _USED if summary.get(name) is not None]
    facts = {
        "call": _joined(summary, "workload", "caller", "status", "ran", "reason", "message"),
        "guest": _joined(summary, "guest", "node", "isolation", "start", "attempt"),
        "end": summary.get("guest_end", ""),
        "time": ", ".join(phases),
        "used": ", ".join(used),
    }
    return [f"{name:<6} {words}" for name, words in facts.items() if words]


def _joined(summary: dict[str, Any], *names: str) -> str:
    return "  ".join(f"{name}={_brief(summary[name])}" for name in names if summary.get(name))


def _origin(reply: httpx.Response) -> str:
    reason = reply.headers.get("fc-error")
    if reason is not None:
        return f"{reason}, ran: {reply.headers.get('fc-ran')}"
    return f"from a guest ({reply.headers.get('fc-isolation')}, {reply.headers.get('fc-start')} start)"


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
