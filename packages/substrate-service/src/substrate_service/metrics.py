"""Events as Prometheus metrics, named `substrate_*`.

Counting costs a few dictionary operations for each event; text is made only when somebody asks. Labels are bounded:
workloads by name, and words of our own. Callers, sessions, guests and nodes are never labels.
"""

from __future__ import annotations

import bisect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from msgspec import Struct
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from substrate_seam import events as e
from substrate_seam.events import Event
from substrate_seam.report import NodeReport

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""What `Metrics.exposition` is written in."""

_SERIES_MAX: Final = 1000
_BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

Labels = tuple[str, ...]
Measured = tuple[Any, ...]
"""A number, and then the labels it belongs to."""
Rule = Callable[[Any], Measured | None]
Rules = Mapping[type[Event], Rule]
"""What each kind of event means for one metric; None is nothing."""


class Metrics(Collector):
    """An `Emit` that counts, and what it has counted, in Prometheus's words."""

    def __init__(self) -> None:
        self._metrics = _metrics()
        self._observed = _observed()
        self._report: Callable[[], NodeReport] | None = None
        self._events = _Counter("events", "Everything that happened, by the name of its event.", ("event",), {})
        self._by_kind: dict[type[Event], list[tuple[Rule, Callable[[Measured], None]]]] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def __call__(self, event: Event) -> None:
        """Count the event."""
        kind = type(event)
        for rule, record in self._by_kind.get(kind) or self._rules_for(kind):
            if (measured := rule(event)) is not None:
                record(measured)

    def _rules_for(self, kind: type[Event]) -> list[tuple[Rule, Callable[[Measured], None]]]:
        """What is done with a kind of event that was not met before."""
        counted = (1, str(kind.__struct_config__.tag))
        rules = [(metric.rules[kind], metric.record) for metric in self._metrics if kind in metric.rules]
        return self._by_kind.setdefault(kind, [(lambda _: counted, self._events.record), *rules])

    def watch(self, report: Callable[[], NodeReport]) -> None:
        """Tell from now on what a node of this daemon says of itself: `report` is asked whenever somebody scrapes."""
        self._report = report

    def exposition(self) -> bytes:
        """Everything counted so far, as `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def published(self) -> tuple[Published, ...]:
        """What there is to be counted, whether it has been or not."""
        return tuple(metric.published() for metric in (self._events, *self._metrics, *self._observed))

    def collect(self) -> Iterator[Family]:
        """Every metric (the registry calls this)."""
        yield from (metric.family() for metric in (self._events, *self._metrics))
        if self._report is not None:
            report = self._report()
            yield from (metric.of(report) for metric in self._observed)


class Published(Struct, frozen=True):
    """One metric as scrapers find it: counters have their `_total`."""

    name: str
    kind: str
    labels: tuple[str, ...]
    about: str


class _Metric(ABC):
    """One metric and its values, by labels; too many combinations of them become one, `other`."""

    def __init__(self, name: str, about: str, labels: Labels, rules: Rules) -> None:
        self.rules = rules
        self._name = f"substrate_{name}"
        self._about = about
        self._labels = labels
        self._values: dict[Labels, Any] = {}

    def published(self) -> Published:
        """How scrapers find it."""
        family = self.family()
        name = f"{self._name}_total" if family.type == "counter" else self._name
        return Published(name, family.type, self._labels, self._about)

    @abstractmethod
    def record(self, measured: Measured) -> None:
        """Take one measurement."""

    @abstractmethod
    def family(self) -> Family:
        """What was measured so far."""

    def _key(self, labels: Labels) -> Labels:
        if labels in self._values or len(self._values) < _SERIES_MAX:
            return labels
        return ("other",) * len(labels)


class _Counter(_Metric):
    """Adds up."""

    def record(self, measured: Measured) -> None:
        labels = measured[1:]
        try:
            self._values[labels] += measured[0]
        except KeyError:
            key = self._key(labels)
            self._values[key] = self._values.get(key, 0) + measured[0]

    def family(self) -> Family:
        family = CounterMetricFamily(self._name, self._about, labels=self._labels)
        for labels, value in self._values.items():
            family.add_metric(labels, value)
        return family


class _Gauge(_Metric):
    """Remembers the last value."""

    def record(self, measured: Measured) -> None:
        self._values[self._key(measured[1:])] = measured[0]

    def family(self) -> Family:
        family = GaugeMetricFamily(self._name, self._about, labels=self._labels)
        for labels, value in self._values.items():
            family.add_metric(labels, value)
        return family


class _Observed(_Gauge):
    """Is read from a node's report when it is asked for; what has the same labels is added up."""

    def __init__(self, name: str, about: str, labels: Labels, read: Callable[[NodeReport], Iterable[Measured]]) -> None:
        super().__init__(name, about, labels, {})
        self._read = read

    def of(self, report: NodeReport) -> Family:
        """What the report says."""
        self._values.clear()
        for value, *labels in self._read(report):
            key = self._key(tuple(labels))
            self._values[key] = self._values.get(key, 0) + value
        return self.family()


class _Members(_Metric):
    """Counts who is there: a measurement is True or False, and a name."""

    def record(self, measured: Measured) -> None:
        present, name = measured
        if present:
            self._values[(name,)] = True
        else:
            self._values.pop((name,), None)

    def family(self) -> Family:
        return GaugeMetricFamily(self._name, self._about, value=len(self._values))


class _Histogram(_Metric):
    """Sorts seconds into buckets; a measurement is in milliseconds."""

    def record(self, measured: Measured) -> None:
        key = self._key(measured[1:])
        if (buckets := self._values.get(key)) is None:
            buckets = self._values[key] = [0] * (len(_BOUNDS_S) + 1) + [0.0]
        value_s = measured[0] / 1000
        buckets[bisect.bisect_left(_BOUNDS_S, value_s)] += 1
        buckets[-1] += value_s

    def family(self) -> Family:
        family = HistogramMetricFamily(self._name, self._about, labels=self._labels)
        bounds = [*map(str, _BOUNDS_S), "+Inf"]
        for labels, (*buckets, sum_s) in self._values.items():
            counts = itertools.accumulate(buckets)
            family.add_metric(labels, list(zip(bounds, counts, strict=True)), sum_value=sum_s)
        return family


def _metrics() -> tuple[_Metric, ...]:
    """Every metric, nothing counted yet. What is measured comes first in each tuple, then its labels."""
    return (
        # The front.
        _Counter(
            "invocations",
            "Invocations that ended, by what their callers were told.",
            ("workload", "status", "reason", "ran"),
            {e.InvocationEnded: lambda x: (1, x.workload, str(x.status), x.reason or "none", x.ran)},
        ),
        _Histogram(
            "invocation_seconds",
            "From the request being whole to the end of its invocation.",
            ("workload", "start"),
            {e.InvocationEnded: lambda x: (x.total_ms, x.workload, x.start or "none")},
        ),
        _Members(
            "invocations_in_flight",
            "Invocations that were accepted and have not ended.",
            (),
            {
                e.InvocationAccepted: lambda x: (True, x.invocation_id),
                e.InvocationEnded: lambda x: (False, x.invocation_id),
            },
        ),
        _Counter(
            "request_body_bytes",
            "Bytes of request bodies.",
            ("workload",),
            {e.InvocationAccepted: lambda x: (x.body_bytes, x.workload)},
        ),
        _Counter(
            "reply_body_bytes",
            "Bytes of reply bodies that were passed on.",
            ("workload",),
            {e.InvocationEnded: lambda x: (x.body_bytes, x.workload)},
        ),
        _Counter(
            "callers_left",
            "Invocations whose caller left before their end.",
            ("workload",),
            {e.InvocationEnded: lambda x: (1, x.workload) if x.client_left else None},
        ),
        _Counter(
            "attempts_placed",
            "Attempts that were sent to a node, by why there.",
            ("because",),
            {e.InvocationPlaced: lambda x: (1, x.because)},
        ),
        _Counter(
            "attempts_refused",
            "Attempts that could not start; nothing ran.",
            ("reason",),
            {e.InvocationRefused: lambda x: (1, x.reason)},
        ),
        _Counter(
            "calls_refused",
            "Requests that were turned away before they became an invocation.",
            ("reason", "status"),
            {e.CallRefused: lambda x: (1, x.reason, str(x.status))},
        ),
        _Members(
            "nodes_connected",
            "Nodes that are heard.",
            (),
            {e.NodeConnected: lambda x: (True, x.node), e.NodeLost: lambda x: (False, x.node)},
        ),
        _Counter("nodes_lost", "Nodes that fell silent.", (), {e.NodeLost: lambda _: (1,)}),
        # The node.
        _Gauge(
            "queue_waiting",
            "Calls that wait for a slot.",
            ("workload",),
            dict.fromkeys((e.CallQueued, e.SlotTaken, e.SlotFreed), lambda x: (x.waiting, x.workload)),
        ),
        _Gauge(
            "slots_busy",
            "Slots that are taken.",
            ("workload",),
            dict.fromkeys((e.SlotTaken, e.SlotFreed), lambda x: (x.busy, x.workload)),
        ),
        _Counter(
            "guests_claimed",
            "Guests that were claimed for an invocation.",
            ("workload", "start", "isolation"),
            {e.GuestClaimed: lambda x: (1, x.workload, x.start, x.isolation)},
        ),
        _Histogram(
            "queue_seconds",
            "Waiting for a slot.",
            ("workload",),
            {e.GuestClaimed: lambda x: (x.queue_ms, x.workload)},
        ),
        _Histogram(
            "claim_seconds",
            "From a slot to a guest that is running.",
            ("workload", "start"),
            {e.GuestClaimed: lambda x: (x.claim_ms, x.workload, x.start)},
        ),
        _Histogram(
            "ready_seconds",
            "From a running guest to its readiness.",
            ("workload", "start"),
            {e.GuestClaimed: lambda x: (x.ready_ms, x.workload, x.start)},
        ),
        _Counter(
            "starts_failed",
            "Ways of starting a guest that failed.",
            ("workload", "start"),
            {e.StartFailed: lambda x: (1, x.workload, x.start)},
        ),
        _Counter(
            "exchanges",
            "Exchanges with guests that ended, by why they failed.",
            ("workload", "reason"),
            {e.ExchangeEnded: lambda x: (1, x.workload, x.reason or "none")},
        ),
        _Histogram(
            "exchange_seconds",
            "Exchanges with guests.",
            ("workload",),
            {e.ExchangeEnded: lambda x: (x.guest_ms, x.workload)},
        ),
        _Counter(
            "guest_cpu_seconds",
            "CPU time of guests, where it was measured.",
            ("workload",),
            {e.ExchangeEnded: lambda x: (x.cpu_ms / 1000, x.workload) if x.cpu_ms is not None else None},
        ),
        _Counter(
            "invocations_fenced",
            "Invocations that were cancelled, by whether they may have run.",
            ("ran",),
            {e.InvocationFenced: lambda x: (1, x.ran)},
        ),
        _Counter(
            "guests_gone",
            "Guests that have left the host, by who ended them.",
            ("workload", "ended_by"),
            {e.GuestGone: lambda x: (1, x.workload, "itself" if x.exit else "node")},
        ),
        _Counter(
            "guests_parked",
            "Ready guests that were put into the pool.",
            ("workload",),
            {e.GuestParked: lambda x: (1, x.workload)},
        ),
        _Counter(
            "bases",
            "Warm bases, by what became of them.",
            ("workload", "outcome"),
            {
                e.BaseBuilt: lambda x: (1, x.workload, "built"),
                e.BaseAdopted: lambda x: (1, x.workload, "adopted"),
                e.BaseFailed: lambda x: (1, x.workload, "failed"),
                e.BaseCondemned: lambda x: (1, x.workload, "condemned"),
            },
        ),
        _Histogram(
            "base_build_seconds",
            "Building a warm base.",
            ("workload",),
            {e.BaseBuilt: lambda x: (x.build_ms, x.workload)},
        ),
        _Members(
            "workloads_known",
            "Workloads that the node knows.",
            (),
            {e.WorkloadEnsured: lambda x: (True, x.digest), e.WorkloadDropped: lambda x: (False, x.digest)},
        ),
        _Gauge(
            "node_draining",
            "1 while the node takes no new invocations.",
            (),
            {e.NodeDraining: lambda _: (1,), e.NodeResumed: lambda _: (0,)},
        ),
        _Gauge(
            "node_limits_generation",
            "Generation of the limits that the node keeps to.",
            (),
            {e.NodeLimited: lambda x: (x.generation,)},
        ),
        _Counter(
            "orphans_removed",
            "What earlier daemons left behind and was removed.",
            (),
            {e.OrphanRemoved: lambda _: (1,)},
        ),
        # The daemon.
        _Gauge(
            "daemon_info",
            "Which daemon this is; always 1.",
            ("daemon", "version"),
            {e.DaemonStarted: lambda x: (1, x.daemon, x.version)},
        ),
        _Gauge(
            "daemon_stopping",
            "1 once the daemon was asked to stop.",
            (),
            {e.DaemonStarted: lambda _: (0,), e.DaemonStopping: lambda _: (1,)},
        ),
        _Gauge(
            "catalog_workloads",
            "Workloads in the table that is in force.",
            (),
            {e.CatalogLoaded: lambda x: (x.workloads,)},
        ),
        _Counter(
            "catalog_loads",
            "Workload tables that were read, by what became of them.",
            ("outcome",),
            {e.CatalogLoaded: lambda _: (1, "loaded"), e.CatalogRefused: lambda _: (1, "refused")},
        ),
        _Counter("warnings", "What an operator should know.", (), {e.WarningRaised: lambda _: (1,)}),
        _Counter(
            "cleanups",
            "Cleanups that did not go as they should.",
            ("outcome",),
            {e.CleanupLate: lambda _: (1, "late"), e.CleanupFailed: lambda _: (1, "failed")},
        ),
        _Counter("defects", "Defects of this software.", (), {e.DefectFound: lambda _: (1,)}),
    )


def _observed() -> tuple[_Observed, ...]:
    """What a node says of itself rather than what happened to it."""
    return (
        _Observed(
            "guests",
            "Guests: serving a call, ready in the pool (parked), or being made ready for it (making).",
            ("workload", "state"),
            lambda report: (
                (count, each.name, state)
                for each in report.workloads.values()
                if each is not None
                for state, count in (("serving", each.serving), ("parked", each.parked), ("making", each.making))
            ),
        ),
        _Observed("memory_free_mib", "Memory that no guest has, in MiB.", (), lambda report: [(report.free_mib,)]),
        _Observed(
            "node_memory_limit_mib",
            "Memory that the node may give to guests, in MiB.",
            (),
            lambda report: [(report.size_mib,)],
        ),
    )
