"""What callers of a real system see, wired either way."""

import asyncio
import base64
import json
import re
import signal
import sys
from typing import Any

import httpx
import pytest

from e2e.system import System, until
from real_parts import needs

pytestmark = [needs("user-namespaces", "pidfd"), pytest.mark.asyncio(loop_scope="module")]


async def run_python(running: System, code: str, **fields: object) -> dict[str, object]:
    reply = await running.invoke("python", body=json.dumps({"code": code, **fields}).encode())
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def test_a_snippet_runs_and_its_output_comes_back(running):
    """The first real input of this system: code in, what it printed out."""
    answer = await run_python(running, "print(6*7)")
    assert (answer["stdout"], answer["exit_code"], answer["error"]) == ("42\n", 0, None)


async def test_files_travel_in_and_changed_ones_travel_out(running):
    """An agent's files are there for the snippet, and what it changed comes back."""
    given = [{"path": "in/data.txt", "content_b64": base64.b64encode(b"21").decode()}]
    code = "n = int(open('in/data.txt').read()); open('out.txt', 'w').write(str(n * 2))"
    answer = await run_python(running, code, files=given)
    assert answer["files"] == [{"path": "out.txt", "content_b64": base64.b64encode(b"42").decode()}]


async def test_a_call_sees_nothing_of_the_one_before(running):
    """Files, variables, processes and the host name of one call are not there in the next."""
    leave = (
        "import builtins, pathlib, subprocess, socket\n"
        "builtins.left = 1\n"
        "for place in ('.', '/tmp', '/dev/shm'):\n"
        "    pathlib.Path(place, 'left').write_text('x')\n"
        "subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "print(socket.gethostname())"
    )
    look = (
        "import builtins, json, pathlib, socket\n"
        "print(json.dumps({'files': [p for p in ('left', '/tmp/left', '/dev/shm/left') if pathlib.Path(p).exists()],\n"
        "  'variable': hasattr(builtins, 'left'), 'host': socket.gethostname(),\n"
        "  'sleepers': [p.name for p in pathlib.Path('/proc').iterdir() if p.name.isdigit()\n"
        "               and b'sleep' in (p / 'cmdline').read_bytes()]}))"
    )
    first = await run_python(running, leave)
    assert first["exit_code"] == 0, first
    second = await run_python(running, look)
    seen = json.loads(str(second["stdout"]))
    assert (seen["files"], seen["variable"], seen["sleepers"]) == ([], False, [])
    assert seen["host"] != str(first["stdout"]).strip()


async def test_every_answer_says_where_it_came_from(running):
    """Id, start, node, isolation and where the time went are on each reply of a guest."""
    reply = await running.invoke("echo", body=b"hello")
    assert (reply.status_code, reply.content) == (200, b"hello")
    assert reply.headers["fc-node"] == "node-1"
    assert reply.headers["fc-isolation"] == "process"
    assert reply.headers["fc-start"] == "cold"
    assert len(reply.headers["fc-invocation-id"]) == 32
    assert "queue;dur=" in reply.headers["server-timing"]
    assert running.journal() == [(reply.headers["fc-invocation-id"], 1)]


async def test_a_parked_guest_is_used_and_replaced(running):
    """With a pool a call finds a guest that stands ready."""
    reply = await running.invoke("parked")
    assert reply.headers["fc-start"] == "pool"
    reply = await running.invoke("parked", headers={"fc-require-start": "cold"})
    assert reply.status_code == 200


async def test_pieces_of_a_reply_arrive_as_they_are_made(running):
    """Each piece is flushed; nobody waits for the whole."""
    loop = asyncio.get_running_loop()
    async with running.client.stream("POST", running.front.url + "/invoke/flows?stream") as reply:
        arrived_s = [loop.time() async for _ in reply.aiter_lines()]
    assert len(arrived_s) == 5
    assert arrived_s[-1] - arrived_s[0] > 0.3  # it takes 0.4 s to make them


async def test_a_large_reply_arrives_whole(running):
    """20 MB through every buffer on the way."""
    reply = await running.invoke("flows?big")
    assert len(reply.content) == 20_000_000


OF_THE_GUEST = ("fc-start", "fc-node", "fc-isolation", "server-timing", "x-fc-queue-wait-ms")

FAILURES = [
    ("/invoke/nobody", {}, 404, "unknown-workload", "no"),
    ("/elsewhere", {}, 404, "not-found", "no"),
    ("/invoke/echo/..%2f..", {}, 400, "bad-session", "no"),
    ("/invoke/echo", {"headers": {"fc-require-isolation": "microvm"}}, 503, "incompatible", "no"),
    ("/invoke/echo", {"headers": {"fc-require-start": "warm"}}, 503, "incompatible", "no"),
    ("/invoke/echo", {"headers": {"fc-require-start": "quick"}}, 400, "bad-request", "no"),
    ("/invoke/echo", {"headers": {"host": "evil.example"}}, 403, "forbidden", "no"),
    ("/invoke/echo", {"headers": {"origin": "https://evil.example"}}, 403, "forbidden", "no"),
    ("/invoke/echo", {"content": b"x" * 9_000_000}, 413, "body-too-large", "no"),
    ("/invoke/hasty?sleep", {}, 504, "guest-timeout", "maybe"),
    ("/invoke/flows?die-before", {}, 502, "guest-failed", "maybe"),
]


async def test_each_failure_is_told_as_documented(running):
    """Status, `fc-error` and `fc-ran` are the table's, and the words name the command that explains it."""
    for path, options, *documented in FAILURES:
        reply = await running.client.post(running.front.url + path, **options)
        assert [reply.status_code, reply.headers["fc-error"], reply.headers["fc-ran"]] == documented, path
        invocation_id = reply.headers["fc-invocation-id"]
        assert f"fc-invoke explain {invocation_id}" in reply.text
        had_guest = reply.headers["fc-ran"] == "maybe"
        assert [name in reply.headers for name in OF_THE_GUEST] == [had_guest] * len(OF_THE_GUEST), path
        assert ((invocation_id, 1) in running.journal()) == (reply.headers["fc-ran"] == "maybe"), path


@pytest.mark.parametrize(("what", "status"), [("sleep", 504), ("die-before", 502)])
async def test_a_call_that_failed_is_told_of_its_guest_as_its_reply_would_have(running, what, status):
    """How it was started, where, how well it was kept apart, and where the time went."""
    reply = await running.invoke(f"hasty?{what}")
    assert reply.status_code == status
    assert [reply.headers[name] for name in OF_THE_GUEST[:3]] == ["cold", "node-1", "process"]
    assert "ready;dur=" in reply.headers["server-timing"]
    await until(lambda: running.front.seen("invocation.ended"))
    (ended,) = running.front.seen("invocation.ended")
    assert (ended["start"], ended["node"]) == ("cold", "node-1")


async def test_how_guests_were_started_is_counted_also_of_calls_that_failed(start):
    """By the daemon that callers speak to, on its live page and in its metrics."""
    async with start() as running:
        for what, status in (("flows?print", 200), ("flows?die-before", 502), ("hasty?sleep", 504)):
            assert (await running.invoke(what)).status_code == status
        refused = await running.invoke("hasty", headers={"fc-require-start": "warm"})
        assert refused.status_code == 503
        live = (await running.client.get(running.front.admin_url + "/v1/live")).json()
        traffic = live["traffic"]
        assert (traffic["ended"], traffic["failed"], traffic["starts"]) == (4, 3, {"cold": 3})
        metrics = (await running.client.get(running.front.admin_url + "/metrics")).text
        counts = re.findall(r'substrate_invocation_seconds_count\{start="cold",workload="\w+"\} (\S+)', metrics)
        assert sum(map(float, counts)) == 3


async def test_a_guest_that_dies_at_its_start_tells_why(running):
    """The caller hears how it ended and what it said last; nothing ran, and no guest is left."""
    reply = await running.invoke("dies")
    assert (reply.status_code, reply.headers["fc-error"], reply.headers["fc-ran"]) == (503, "boot-failed", "no")
    assert "exit status 1" in reply.text
    assert "no such model" in reply.text


async def test_a_guest_that_dies_within_its_reply_breaks_the_connection(running):
    """A truncated reply never looks complete."""
    with pytest.raises(httpx.RemoteProtocolError):
        await running.invoke("flows?die-within")


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(running):
    """One runs, one waits, the third hears 503 with Retry-After; nothing of it ran."""
    async with asyncio.TaskGroup() as calls:
        first = calls.create_task(running.invoke("narrow?linger"))
        second = calls.create_task(running.invoke("narrow?linger"))
        await until(lambda: running.node.seen("call.queued"))
        third = await running.invoke("narrow")
    assert (first.result().status_code, second.result().status_code) == (200, 200)
    assert (third.status_code, third.headers["fc-error"], third.headers["fc-ran"]) == (503, "capacity", "no")
    assert int(third.headers["retry-after"]) >= 1


async def test_two_hundred_callers_share_four_slots(start, table):
    """Every one of them is answered by a guest of its own, if there is time for all; and each acted once."""
    table["echo"] |= {"warmBase": True, "startTimeout": "10m", "requestTimeout": "10m"}
    async with start(CALLER_LIMIT="200") as running:
        async with asyncio.TaskGroup() as calls:
            bodies = [b"%d" % number for number in range(200)]
            tasks = [calls.create_task(running.invoke("echo", body=body, timeout=None)) for body in bodies]
        replies = [task.result() for task in tasks]
        assert [(reply.status_code, reply.content) for reply in replies] == [(200, body) for body in bodies]
        assert sorted(running.journal()) == sorted((reply.headers["fc-invocation-id"], 1) for reply in replies)
        await running.at_rest(parked=3)  # one of them is what clones are made of


@pytest.mark.parametrize("stage", ["upload", "head", "body"])
async def test_when_the_caller_leaves_the_guest_is_killed(running, stage):
    """Wherever the caller is when it hangs up, slot and guest are free at once."""
    if stage == "upload":
        host, port = running.front.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /invoke/flows HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\nhalf")
        await writer.drain()
        writer.transport.abort()
        assert running.journal() == []
        return
    what = {"head": "sleep", "body": "endless"}[stage]
    async with asyncio.TaskGroup() as calls:
        call = calls.create_task(leave_within(running, what, stage))
        await running.acted()
        if stage == "head":
            call.cancel()
    await until(lambda: running.node.seen("guest.gone"), within_s=5.0)  # its time limit is 10 s: that does not end it


async def leave_within(running: System, what: str, stage: str) -> None:
    async with running.client.stream("POST", running.front.url + f"/invoke/flows?{what}") as reply:
        async for _ in reply.aiter_bytes():
            if stage == "body":
                return


async def whole_story(running: System, reply: httpx.Response) -> dict[str, Any]:
    """What the front's admin listener tells of a call once its guest is gone, which no reply waits for."""
    await until(lambda: running.node.seen("slot.freed"), within_s=30.0)
    story = await running.client.get(f"{running.front.admin_url}/v1/invocations/{reply.headers['fc-invocation-id']}")
    assert story.status_code == 200, story.text
    return dict(story.json())


async def test_the_whole_story_of_a_call_is_told_in_one_place(running):
    """Every step of an invocation in order, the node's part included, wherever the node is."""
    story = await whole_story(running, await running.invoke("echo", body=b"x"))
    names = [event["event"] for event in story["events"]]
    assert [name for name in names if name != "invocation.ended"] == [
        *("invocation.accepted", "invocation.placed", "slot.taken", "guest.claimed"),
        *("exchange.ended", "guest.gone", "slot.freed"),
    ]
    assert story["summary"]["status"] == 200
    assert story["summary"]["guest_end"] == "its node ended it, after its reply was whole"
    assert "silent" not in story


async def test_a_story_says_what_the_guest_used(running):
    """CPU time and peak memory as measured, of work that is known, and how long each phase took."""
    reply = await running.invoke("patient?work")
    assert reply.text == "80000000"
    summary = (await whole_story(running, reply))["summary"]
    assert 100 <= summary["cpu_ms"] < 5000
    assert 76 <= summary["peak_mib"] < 500
    assert summary["guest_ms"] >= 100
    assert {"queue_ms", "claim_ms", "ready_ms", "total_ms"} <= summary.keys()


async def test_a_story_counts_the_memory_of_a_process_that_had_ended(running):
    """A workload's child took 95 MiB and was gone before the reply."""
    reply = await running.invoke("flows?feast")
    assert reply.status_code == 200
    assert 95 <= (await whole_story(running, reply))["summary"]["peak_mib"] < 150


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("die-before", "it ended by itself: exit status 3"),
        ("sleep", "its node ended it: the guest did not finish within 0.5 s"),
        ("leave", "its node ended it: its caller left before the reply was whole"),
    ],
)
async def test_explain_says_who_ended_the_guest_and_why(running, what, words):
    """From the front's story alone, which the command fetches by the id that every answer names."""
    if what == "leave":
        async with running.client.stream("POST", running.front.url + "/invoke/flows?endless") as reply:
            await anext(reply.aiter_bytes())
    else:
        reply = await running.invoke(f"hasty?{what}")
    await until(lambda: running.node.seen("slot.freed"), within_s=30.0)
    explain = ["-m", "fc_invoke", "explain", reply.headers["fc-invocation-id"], "--admin-url", running.front.admin_url]
    said = await asyncio.create_subprocess_exec(sys.executable, *explain, stdout=asyncio.subprocess.PIPE)
    out, _ = await said.communicate()
    assert said.returncode == 0
    (end,) = [line for line in out.decode().splitlines() if line.startswith("end ")]
    assert end == f"end    {words}"


@pytest.mark.parametrize("kind", ["split"])  # one process is gone as a whole
async def test_a_node_that_is_gone_is_named_and_the_rest_is_told(start):
    """An agent tells what it knows itself."""
    async with start() as running:
        reply = await running.invoke("echo")
        running.node.signal(signal.SIGKILL)
        await running.node.ended()
        url = f"{running.front.admin_url}/v1/invocations/{reply.headers['fc-invocation-id']}"
        story = (await running.client.get(url)).json()
        assert "node-1" in story["silent"]
        assert story["summary"]["status"] == 200


async def test_what_a_call_printed_is_in_its_story(running):
    """Its author finds it there; the daemon's own log does not have it."""
    reply = await running.invoke("flows?print")
    assert reply.text == "done"
    await until(lambda: running.node.seen("guest.gone"))
    url = f"{running.node.admin_url}/v1/invocations/{reply.headers['fc-invocation-id']}"
    events = (await running.client.get(url)).json()["events"]
    assert [event["console"] for event in events if event["event"] == "guest.gone"] == ["from within"]
    assert "console" not in running.node.seen("guest.gone")[-1]


async def test_metrics_and_probes_answer_on_the_admin_listener(running):
    """Prometheus text, `/healthz`, and a `/readyz` that is content."""
    await running.invoke("echo")
    for process in running.processes:
        metrics = await running.client.get(process.admin_url + "/metrics")
        assert "substrate_" in metrics.text
        assert (await running.client.get(process.admin_url + "/healthz")).text == "ok\n"
        ready = (await running.client.get(process.admin_url + "/readyz")).text
        assert ready.startswith("ok\n")
        has_guests = process is running.node
        assert ("no network but its own loopback" in ready) == has_guests
