"""Traces: from the environment to a collector, and what becomes of a daemon whose collector is not there."""

import inspect
import threading
import time

import pytest

from fakes.collector import collector
from substrate_seam.errors import Ran, Reason
from substrate_seam.events import (
    BaseBuilt,
    BaseFailed,
    ExchangeEnded,
    GuestClaimed,
    InvocationAccepted,
    InvocationEnded,
    InvocationRefused,
    SlotFreed,
    SlotTaken,
    WarningRaised,
)
from substrate_seam.invocation import Isolation, Start
from substrate_seam.tracing import Sampler
from substrate_service.settings import EnvironmentReader, SettingsInvalid
from substrate_service.tracing import TracingSettings, export, read_tracing, traced
from substrate_service.tracing.export import Exporter, NotSent
from substrate_service.tracing.spans import Spans

ID = "0123456789abcdef" * 2
TRACE = f"00-{'a' * 32}-{ID[16:]}-01"
MS = 1_000_000


def read(**environment):
    reader = EnvironmentReader(environment, prefix="X_")
    settings = read_tracing(reader, environment, service="fc-invoke", version="1")
    reader.finish()
    return settings


# Settings.


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "c:4317", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_TRACES_SAMPLER": "nonsense"},
    ],
)
def test_without_an_endpoint_there_are_no_traces(environment):
    assert read(**environment) is None


def test_the_standard_variables_are_read():
    settings = read(
        OTEL_EXPORTER_OTLP_ENDPOINT="http://collector:4317",
        OTEL_SERVICE_NAME="mine",
        OTEL_RESOURCE_ATTRIBUTES="zone=a%20b, rack=2",
        OTEL_TRACES_SAMPLER="parentbased_traceidratio",
        OTEL_TRACES_SAMPLER_ARG="0.25",
        OTEL_BSP_SCHEDULE_DELAY="5",
    )
    assert settings == TracingSettings(
        endpoint="collector:4317",
        resource={"zone": "a b", "rack": "2", "service.name": "mine", "service.version": "1"},
        sampler=Sampler(parent=True, ratio=0.25),
        unused=("OTEL_BSP_SCHEDULE_DELAY",),
    )


def test_everything_that_is_wrong_is_told_at_once():
    wrong = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "https://collector",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json",
        "OTEL_RESOURCE_ATTRIBUTES": "zone",
        "OTEL_TRACES_SAMPLER": "sometimes",
        "OTEL_TRACES_SAMPLER_ARG": "2",
    }
    with pytest.raises(SettingsInvalid) as invalid:
        read(**wrong)
    assert {problem.variable for problem in invalid.value.problems} == set(wrong)


# Spans.


def spans_of(*events):
    """The spans that some events make, by name; each event comes a second after the one before."""
    made = []
    spans = Spans(made.append, clock=iter_ns().__next__, hide=lambda text: "#" + text[:1])
    for event in events:
        spans(event)
    return {span.name: span for span in made}, spans


def iter_ns():
    now_ns = 0
    while True:
        now_ns += 1000 * MS
        yield now_ns


ACCEPTED = InvocationAccepted(
    invocation_id=ID,
    workload="w",
    caller="a",
    body_bytes=1,
    session="secret",
    trace=TRACE,
    parent=f"00-{'a' * 32}-{'c' * 16}-01",
)
TAKEN = SlotTaken(invocation_id=ID, workload="w", busy=1, waiting=0, free_mib=1, queue_ms=7.0, trace=TRACE)
CLAIMED = GuestClaimed(
    invocation_id=ID,
    attempt=1,
    workload="w",
    guest="g",
    start=Start.WARM,
    isolation=Isolation.MICROVM,
    queue_ms=7.0,
    claim_ms=30.0,
    ready_ms=25.0,
    wait_ready_ms=5.0,
)
EXCHANGED = ExchangeEnded(
    invocation_id=ID,
    attempt=1,
    workload="w",
    guest="g",
    guest_ms=50.0,
    body_bytes=3,
    status=200,
    cpu_ms=12.5,
    peak_mib=33.0,
    head_ms=40.0,
    release_ms=4.0,
)
FREED = SlotFreed(invocation_id=ID, workload="w", busy=0, waiting=0, free_mib=1)
ENDED = InvocationEnded(
    invocation_id=ID,
    workload="w",
    caller="a",
    status=200,
    ran=Ran.MAYBE,
    total_ms=99.0,
    start=Start.WARM,
    node="n",
)


def test_a_call_becomes_the_spans_of_the_go_daemon():
    made, spans = spans_of(ACCEPTED, TAKEN, CLAIMED, EXCHANGED, FREED, ENDED)
    took = {name: (span.end_ns - span.start_ns) / MS for name, span in made.items()}
    assert took == {
        "acquire_slot": 7,
        "snapshot_restore": 20,
        "guest_wait_ready": 5,
        "guest_exec": 40,
        "vm_release": 4,
        "fc_invoke": 99,
    }
    assert made["snapshot_restore"].end_ns == made["guest_wait_ready"].start_ns - 1000 * MS  # told a second earlier
    assert made["vm_release"].attributes == {"fc.guest.cpu_ms": 12.5, "fc.guest.peak_rss_mib": 33.0}
    assert made["fc_invoke"].attributes["fc.session"] == "#s"
    assert (made["fc_invoke"].span_id, made["fc_invoke"].parent_id) == (ID[16:], "c" * 16)
    assert {span.trace_id for span in made.values()} == {"a" * 32}
    assert {span.parent_id for name, span in made.items() if name != "fc_invoke"} == {ID[16:]}
    assert not any(span.error for span in made.values())
    assert not spans._calls


def test_what_is_not_sampled_leaves_nothing():
    unsampled = TRACE[:-2] + "00"
    accepted, taken = (
        type(event)(**{name: getattr(event, name) for name in event.__struct_fields__} | {"trace": unsampled})
        for event in (ACCEPTED, TAKEN)
    )
    made, spans = spans_of(accepted, taken, CLAIMED, EXCHANGED, FREED, ENDED)
    assert not made
    assert not spans._calls


def test_a_try_that_ran_nothing_is_a_moment_of_the_call():
    refused = InvocationRefused(invocation_id=ID, attempt=1, node="n1", reason=Reason.CAPACITY, message="full")
    made, _ = spans_of(ACCEPTED, refused, ENDED)
    (moment,) = made["fc_invoke"].moments
    assert moment.attributes == {"fc.node": "n1", "fc.error": "capacity", "fc.attempt": 1}


def test_a_base_has_a_trace_of_its_own():
    made, _ = spans_of(BaseBuilt(workload="w", base="b", build_ms=500.0, capture_ms=200.0))
    build, save = made["base_snapshot_build"], made["snapshot_save"]
    assert (save.trace_id, save.parent_id, build.parent_id) == (build.trace_id, build.span_id, "")
    assert save.end_ns - save.start_ns == 200 * MS
    made, _ = spans_of(BaseFailed(workload="w", message="no", retry_in_s=1.0))
    assert made["base_snapshot_build"].error == "no"


# Sending.


def settings(endpoint):
    return TracingSettings(endpoint=endpoint, resource={"service.name": "fc-invoke"}, sampler=Sampler(True, 1.0))


def test_what_was_made_before_the_end_has_been_sent_at_the_end():
    told = []
    with collector() as there:
        with traced(settings(there.endpoint), emit=told.append, hide=str) as spans:
            for event in (ACCEPTED, TAKEN, CLAIMED, EXCHANGED, FREED, ENDED):
                spans(event)
        assert {span.name for span in there.spans} >= {"fc_invoke", "guest_exec", "vm_release"}
        assert {span.service for span in there.spans} == {"fc-invoke"}
    assert told == []


def test_a_collector_that_comes_back_gets_what_waited():
    told = []
    with collector() as there:
        there.refuse = True
        with traced(settings(there.endpoint), emit=told.append, hide=str) as spans:
            spans(BaseFailed(workload="w", message="no", retry_in_s=1.0))
            there.wait(lambda: there.requests)
            there.refuse = False
        assert [span.name for span in there.spans] == ["base_snapshot_build"]
    (warning,) = told
    assert isinstance(warning, WarningRaised)
    assert "come back later" in warning.message


class Stuck:
    """A line on which nothing moves until it is cut."""

    def __init__(self):
        self.cut = threading.Event()

    def send(self, spans, *, within_s):
        assert self.cut.wait(10.0)
        raise NotSent("it was cut")

    def close(self):
        self.cut.set()


def test_a_collector_that_hangs_delays_no_event_and_the_end_only_for_so_long():
    told = []
    line = Stuck()
    exporter = Exporter(lambda: line, warn=told.append)
    exporter.start()
    began_s = time.monotonic()
    for _ in range(export.QUEUE_MAX + 10):
        exporter.put("span")
    exporter.close(within_s=0.2)
    assert time.monotonic() - began_s < 5.0
    assert told[-1] == f"{export.QUEUE_MAX + 10} spans were not sent"
    assert inspect.signature(exporter.close).parameters["within_s"].default <= 5.0, "what daemons wait"


def test_without_the_extra_there_is_one_line():
    def open_line():
        raise RuntimeError("the extra `otel` is not installed (No module named 'grpc')")

    told = []
    exporter = Exporter(open_line, warn=told.append)
    exporter.start()
    exporter.close()
    assert told == ["traces are not sent: the extra `otel` is not installed (No module named 'grpc')"]
