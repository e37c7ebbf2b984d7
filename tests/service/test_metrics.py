"""Events become Prometheus metrics with bounded labels, whatever happens."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.every_event import KINDS, made_up
from substrate_seam.errors import Ran, Reason
from substrate_seam.events import (
    BaseBuilt,
    CallRefused,
    DefectFound,
    InvocationAccepted,
    InvocationEnded,
    NodeConnected,
    NodeLost,
    SlotTaken,
)
from substrate_seam.invocation import Isolation
from substrate_seam.report import NodeReport, WorkloadReport
from substrate_service.metrics import Metrics
from substrate_service.sinks import all_to, fan_out


def samples(metrics):
    """Every sample of the exposition, by name and labels."""
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value for family in families for sample in family.samples
    }


def accepted(invocation_id="i1"):
    return InvocationAccepted(invocation_id=invocation_id, workload="w", caller="c", body_bytes=10)


def ended(invocation_id="i1", **fields):
    told = {"workload": "w", "caller": "c", "status": 200, "ran": Ran.MAYBE, "total_ms": 3.0, **fields}
    return InvocationEnded(invocation_id=invocation_id, **told)


def told(*events):
    metrics = Metrics()
    emit = fan_out(metrics.sink)
    for event in events:
        emit(event)
    return samples(metrics)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_event_is_counted(kind):
    assert told(made_up(kind), made_up(kind))[("substrate_events_total", kind.__struct_config__.tag)] == 2


def test_everything_is_named_substrate_except_what_the_process_itself_tells():
    names = {name for name, *_ in told(*map(made_up, KINDS))}
    assert {name for name in names if not name.startswith(("substrate_", "process_"))} == set()
    assert len(names) > 40


def test_an_invocation_is_counted_by_what_its_caller_was_told():
    seen = told(
        accepted("i1"),
        accepted("i2"),
        accepted("i3"),
        ended("i1", body_bytes=7),
        ended("i2", status=503, ran=Ran.NO, reason=Reason.CAPACITY, client_left=True),
    )
    assert seen[("substrate_invocations_total", "200", "maybe", "none", "w")] == 1
    assert seen[("substrate_invocations_total", "503", "capacity", "no", "w")] == 1
    assert seen[("substrate_invocations_in_flight",)] == 1
    assert seen[("substrate_request_body_bytes_total", "w")] == 30
    assert seen[("substrate_reply_body_bytes_total", "w")] == 7
    assert seen[("substrate_callers_left_total", "w")] == 1


def test_durations_are_sorted_into_cumulative_buckets_of_seconds():
    seen = told(*(BaseBuilt(workload="w", base="b", build_ms=ms) for ms in (1.0, 30.0, 400_000.0)))
    assert seen[("substrate_base_build_seconds_bucket", "0.001", "w")] == 1
    assert seen[("substrate_base_build_seconds_bucket", "0.025", "w")] == 1
    assert seen[("substrate_base_build_seconds_bucket", "0.05", "w")] == 2
    assert seen[("substrate_base_build_seconds_bucket", "300", "w")] == 2
    assert seen[("substrate_base_build_seconds_bucket", "+Inf", "w")] == 3
    assert seen[("substrate_base_build_seconds_count", "w")] == 3
    assert seen[("substrate_base_build_seconds_sum", "w")] == pytest.approx(400.031)


def test_a_gauge_shows_the_last_value():
    taken = [SlotTaken(workload="w", busy=busy, waiting=busy + 1, free_mib=100 - busy) for busy in (1, 2)]
    seen = told(*taken)
    assert seen[("substrate_slots_busy", "w")] == 2
    assert seen[("substrate_queue_waiting", "w")] == 3


def test_what_a_node_says_of_itself_is_told_as_it_is_when_somebody_asks():
    """Versions of one workload are added up; a guest that left the pool is no longer told."""
    parked = 2

    def report():
        one, other = (WorkloadReport(name="w", concurrency=2, parked=parked, serving=1, making=each) for each in (0, 1))
        workloads = {"1": one, "2": other, "3": None}
        about = {"node_id": "n", "boot_id": "b", "isolation": Isolation.PROCESS, "arch": "amd64"}
        return NodeReport(**about, size_mib=1000, free_mib=100 * parked, workloads=workloads)

    metrics = Metrics()
    assert ("substrate_guests", "parked", "w") not in samples(metrics)
    metrics.watch(report)
    seen = samples(metrics)
    assert [seen[("substrate_guests", state, "w")] for state in ("serving", "parked", "making")] == [2, 4, 1]
    assert (seen[("substrate_memory_free_mib",)], seen[("substrate_node_memory_limit_mib",)]) == (200, 1000)
    parked = 0
    seen = samples(metrics)
    assert (seen[("substrate_guests", "parked", "w")], seen[("substrate_memory_free_mib",)]) == (0, 0)


def test_nodes_are_counted_once_however_often_they_reconnect():
    seen = told(
        NodeConnected(node="a", boot_id="1"),
        NodeConnected(node="a", boot_id="2"),
        NodeConnected(node="b", boot_id="1"),
        NodeLost(node="b", message="silent"),
        NodeLost(node="b", message="silent"),
    )
    assert seen[("substrate_nodes_connected",)] == 1


def test_more_label_values_than_anybody_can_read_become_one():
    seen = told(*(ended(workload=f"w{number}") for number in range(1500)))
    counts = {labels: value for labels, value in seen.items() if labels[0] == "substrate_invocations_total"}
    assert len(counts) == 1001
    assert counts[("substrate_invocations_total", "other", "other", "other", "other")] == 500
    assert sum(counts.values()) == 1500


def test_two_daemons_in_one_process_count_apart():
    metrics = Metrics()
    fan_out(Metrics().sink)(accepted())
    assert ("substrate_events_total", "invocation.accepted") not in samples(metrics)


# Several sinks.


def test_every_sink_hears_every_event_in_order():
    first, second = [], []
    emit = fan_out(all_to(first.append), all_to(second.append))
    emit(accepted())
    emit(ended())
    assert first == second == [accepted(), ended()]


def test_a_sink_that_fails_harms_no_other_and_is_told_of_once():
    heard = []

    def broken(event):
        raise LookupError("out of order")

    emit = fan_out(all_to(broken), all_to(heard.append))
    emit(accepted())
    emit(ended())
    assert [type(event) for event in heard] == [DefectFound, InvocationAccepted, InvocationEnded]
    assert "out of order" in heard[0].message


def test_a_call_refused_at_the_front_keeps_its_reason():
    refused = CallRefused(invocation_id="i", reason=Reason.FORBIDDEN, status=403, message="m")
    assert told(refused)[("substrate_calls_refused_total", "403", "forbidden")] == 1
