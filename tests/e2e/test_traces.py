"""One trace of one call, wired either way, as a real collector gets it."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import partial

import pytest
import pytest_asyncio

from e2e.conftest import workloads
from e2e.system import Process, System, lent, system, until
from fakes.collector import Collector, collector
from real_parts import needs

pytestmark = needs("user-namespaces", "pidfd")

CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def collecting() -> Iterator[Collector]:
    with collector() as there:
        yield there


def both_ends_of_a_call(collecting: Collector) -> bool:
    """Whether front and node have each sent the last that they know of one."""
    return bool(collecting.named("vm_release") and collecting.named("fc_invoke"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(kind, collecting, tmp_path_factory) -> AsyncIterator[System]:
    """A system that tells the collector; all of it has found the way."""
    told = {"OTEL_EXPORTER_OTLP_ENDPOINT": collecting.endpoint}
    table = {name: entry for name, entry in workloads().items() if name == "patient"}
    async with system(kind, tmp_path_factory.mktemp(kind), table, **told) as running:
        collecting.spans.clear()
        await running.invoke("patient")
        await asyncio.to_thread(collecting.wait, partial(both_ends_of_a_call, collecting))
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def traced(shared, collecting) -> AsyncIterator[System]:
    """That system for one test, to whose calls alone the spans belong."""
    collecting.spans.clear()
    async with lent(shared, parked=0) as mine:
        yield mine


@pytest.mark.asyncio(loop_scope="module")
async def test_agent_node_and_guest_join_the_trace_of_the_caller(traced, collecting, kind):
    """Under the Go daemon's names, each span below that of the call, and that below the caller's."""
    trace_id, parent_id = CALLER
    headers = {"traceparent": f"00-{trace_id}-{parent_id}-01", "tracestate": "a=b"}
    reply = await traced.invoke("patient/s-1?heard", headers=headers)
    await asyncio.to_thread(collecting.wait, partial(both_ends_of_a_call, collecting))
    mine = {span.name: span for span in collecting.spans if span.trace_id == trace_id}
    root = mine.pop("fc_invoke")
    assert set(mine) == {"acquire_slot", "firecracker_boot", "guest_wait_ready", "guest_exec", "vm_release"}
    assert (root.parent_id, root.kind) == (parent_id, 2)
    assert {span.parent_id for span in mine.values()} == {root.span_id}
    assert reply.json() == {"traceparent": f"00-{trace_id}-{root.span_id}-01", "tracestate": "a=b"}
    assert root.attributes["fc.workload"] == "patient"
    assert root.attributes["fc.pool_hit"] is False
    assert root.attributes["fc.invocation_id"] == reply.headers["fc-invocation-id"]
    assert "s-1" not in str(root.attributes["fc.session"])
    assert mine["vm_release"].attributes["fc.guest.cpu_ms"] > 0
    assert mine["vm_release"].attributes["fc.guest.peak_rss_mib"] > 1
    for earlier, later in (("acquire_slot", "firecracker_boot"), ("firecracker_boot", "guest_exec")):
        assert mine[earlier].start_ns <= mine[later].start_ns + 1_000_000
    services = {"single": ("fc-invoke", "fc-invoke"), "split": ("cluster-agent", "node-daemon")}[kind]
    assert (root.service, mine["guest_exec"].service) == services


@pytest.mark.asyncio(loop_scope="module")
async def test_a_call_that_fails_marks_the_span_where_it_failed(traced, collecting):
    """And what was not sampled is not sent, though its guest hears of it."""
    await traced.invoke("patient?heard", headers={"traceparent": f"00-{'1' * 32}-{'2' * 16}-00"})
    reply = await traced.invoke("patient?die-before")
    assert reply.status_code == 502
    await asyncio.to_thread(collecting.wait, partial(both_ends_of_a_call, collecting))
    (failed,) = collecting.named("guest_exec")
    (root,) = collecting.named("fc_invoke")
    assert "exit status 3" in root.error
    assert failed.error
    assert root.trace_id == reply.headers["fc-invocation-id"]
    assert (root.attributes["fc.error"], root.attributes["fc.ran"]) == ("guest-failed", "maybe")


def about_traces(process: Process) -> list[dict[str, object]]:
    return [event for event in process.seen("warning.raised") if "traces are not sent" in str(event["message"])]


async def test_a_collector_that_is_away_costs_one_line_and_no_call(start):
    """Neither while it serves, nor at its end."""
    async with start(OTEL_EXPORTER_OTLP_ENDPOINT="127.0.0.1:9") as running:
        for _ in range(2):
            assert (await running.invoke("patient")).status_code == 200
        for process in running.processes:
            await until(
                lambda p=process: [e for e in p.seen("warning.raised") if "traces are not sent" in e["message"]]
            )
            process.signal(15)
        for process in running.processes:
            assert await process.ended() == 0
            assert not process.other_lines, process.other_lines
            assert len(about_traces(process)) == 1
