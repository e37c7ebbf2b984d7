"""The truth audit, for users: misbehave towards a running system, then hold every answer against the guests' journal.

The daemon must keep a journal (`FC_INVOKE_AUDIT_JOURNAL`): each guest then writes down, outside itself, the invocation
it is about to act on. Three things must hold whatever went wrong: `ran: no` has no entry, a guest's answer has exactly
one, and no invocation has two.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from random import Random

import httpx
import msgspec
from msgspec import Struct

from fc_invoke.client import unanswered
from substrate_service.snapshot import Snapshot

SETTLED_WITHIN_S = 30.0
_LOOK_EVERY_S = 0.02
_HEAD_BYTES_MAX = 65_536


class Answer(Struct, frozen=True, kw_only=True):
    """What one caller was told. `invocation_id` is empty if it left before it learned its id."""

    behaviour: str
    invocation_id: str = ""
    status: int = 0
    ran: str = ""
    whole: bool = False


class Violation(Struct, frozen=True):
    """An answer, or an invocation, that the journal contradicts."""

    invocation_id: str
    words: str


class Load(Struct, frozen=True, kw_only=True):
    """How much to misbehave: so many calls of a workload, so many at a time, by these dice."""

    workload: str
    calls: int
    at_once: int
    dice: Random


class AuditImpossible(Exception):
    """The system can't be audited; the message says what is missing."""


def judge(answers: Iterable[Answer], journal: Iterable[tuple[str, int]]) -> list[Violation]:
    """Hold what callers were told against what guests wrote down."""
    acted = Counter(invocation_id for invocation_id, _ in journal)
    found = [Violation(invocation_id, f"it acted {times} times") for invocation_id, times in acted.items() if times > 1]
    for answer in answers:
        times = acted[answer.invocation_id]
        if answer.ran == "no" and times:
            found.append(
                Violation(answer.invocation_id, f"its caller was told `ran: no` ({answer.status}), and it ran")
            )
        if answer.whole and not answer.ran and not times:
            found.append(Violation(answer.invocation_id, f"its caller got {answer.status} of a guest that never acted"))
    return found


async def audit(
    urls: Sequence[str],
    journals: Sequence[str],
    load: Load,
    *,
    token: str | None,
    admin_token: str | None,
    progress: Callable[[int], None],
) -> tuple[list[Answer], list[Violation]]:
    """Make calls of mixed manners, and judge the answers.

    `urls` are public listeners, `journals` admin listeners of the daemons that keep journals. Raises
    `AuditImpossible`. The workload must answer any body with a status below 500; the built-in `echo` does.
    """
    async with _client(token) as client, _client(admin_token) as operator:
        await _read_journals(operator, journals)  # fail before any load if there is none
        answers = await _misbehave(client, urls, load, progress)
        await settled(operator, journals, load.workload, within_s=SETTLED_WITHIN_S)
        journal = await _read_journals(operator, journals)
    return answers, judge(answers, journal)


async def _misbehave(
    client: httpx.AsyncClient, urls: Sequence[str], load: Load, progress: Callable[[int], None]
) -> list[Answer]:
    answers: list[Answer] = []
    left, dice = iter(range(load.calls)), load.dice

    async def caller() -> None:
        for _ in left:
            manner = dice.choice(_MANNERS)
            url = f"{dice.choice(urls)}/invoke/{load.workload}"
            answers.append(await manner(client, url, dice))
            progress(len(answers))

    async with asyncio.TaskGroup() as callers:
        for _ in range(load.at_once):
            callers.create_task(caller())
    return answers


async def _patient(client: httpx.AsyncClient, url: str, dice: Random) -> Answer:
    """Send a body, read the whole reply."""
    return await _call(client, url, dice, behaviour="patient")


async def _demanding(client: httpx.AsyncClient, url: str, dice: Random) -> Answer:
    """Insist on a start that may not be there."""
    return await _call(client, url, dice, behaviour="demanding", headers={"fc-require-start": "pool"})


async def _leaving(client: httpx.AsyncClient, url: str, dice: Random) -> Answer:
    """Leave at a moment of one's own."""
    with suppress(TimeoutError):
        async with asyncio.timeout(dice.random() * 0.3):
            return await _call(client, url, dice, behaviour="leaving")
    return Answer(behaviour="leaving")


async def _half_sent(_: httpx.AsyncClient, url: str, dice: Random) -> Answer:
    """Promise more of a body than is ever sent, and leave."""
    target = httpx.URL(url)
    ssl = target.scheme == "https" or None
    try:
        reader, writer = await asyncio.open_connection(target.host, target.port or (443 if ssl else 80), ssl=ssl)
    except OSError as error:
        raise AuditImpossible(f"{url}: {error}") from error
    head = f"POST {target.raw_path.decode()} HTTP/1.1\r\nhost: {target.netloc.decode()}\r\ncontent-length: 1000\r\n\r\n"
    writer.write(head.encode() + bytes(dice.randrange(1000)))
    with suppress(OSError):
        await writer.drain()
    await asyncio.sleep(dice.random() * 0.05)
    writer.transport.abort()
    with suppress(OSError):
        await writer.wait_closed()
    with suppress(OSError):
        await reader.read(_HEAD_BYTES_MAX)
    return Answer(behaviour="half-sent")


async def _call(
    client: httpx.AsyncClient, url: str, dice: Random, *, behaviour: str, headers: dict[str, str] | None = None
) -> Answer:
    answer = Answer(behaviour=behaviour)
    try:
        async with client.stream("POST", url, content=dice.randbytes(dice.randrange(2000)), headers=headers) as reply:
            answer = Answer(
                behaviour=behaviour,
                invocation_id=reply.headers.get("fc-invocation-id", ""),
                status=reply.status_code,
                ran=reply.headers.get("fc-ran", ""),
            )
            if reply.status_code in {401, 403, 404}:
                raise AuditImpossible(f"{url}: {(await reply.aread()).decode('utf-8', 'replace').strip()}")
            async for _ in reply.aiter_bytes():
                pass
        return Answer(
            behaviour=behaviour,
            invocation_id=answer.invocation_id,
            status=answer.status,
            ran=answer.ran,
            whole=True,
        )
    except httpx.ConnectError as error:
        raise AuditImpossible(unanswered(url, error, option="--url")) from error
    except httpx.HTTPError:  # the daemon aborted the reply: the caller was told nothing more
        return answer


_MANNERS: list[Callable[[httpx.AsyncClient, str, Random], Awaitable[Answer]]] = [
    _patient,
    _patient,
    _demanding,
    _leaving,
    _half_sent,
]


async def settled(operator: httpx.AsyncClient, journals: Sequence[str], workload: str, *, within_s: float) -> None:
    """Return when each node says that no call of the workload waits or runs: until then a guest may still act.

    After `within_s` seconds it returns as well; others may call the workload all the time. Raises `AuditImpossible`.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            for url in journals:
                while await _is_called(operator, url, workload):  # noqa: ASYNC110  # another process, which only answers
                    await asyncio.sleep(_LOOK_EVERY_S)


async def _is_called(operator: httpx.AsyncClient, url: str, workload: str) -> bool:
    now = msgspec.json.decode(await _told(operator, url, "/v1/live"), type=Snapshot)
    return any(each.busy or each.waiting for each in now.workloads if each.workload == workload)


async def _read_journals(operator: httpx.AsyncClient, journals: Sequence[str]) -> list[tuple[str, int]]:
    entries: list[tuple[str, int]] = []
    for url in journals:
        lines = json.loads(await _told(operator, url, "/v1/audit"))["entries"]
        entries += [(line.split()[0], int(line.split()[1])) for line in lines]
    return entries


async def _told(operator: httpx.AsyncClient, url: str, path: str) -> bytes:
    """What an admin listener answers. Raises `AuditImpossible`."""
    try:
        answer = await operator.get(f"{url}{path}")
    except httpx.HTTPError as error:
        raise AuditImpossible(unanswered(url, error, option="--admin-url or --journal")) from error
    if answer.status_code != 200:
        raise AuditImpossible(f"{url}{path}: {answer.text.strip()}")
    return answer.content


def _client(token: str | None) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(headers=headers, limits=limits, timeout=httpx.Timeout(None, connect=5.0), trust_env=False)
