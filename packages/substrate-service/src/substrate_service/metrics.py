"""Events as Prometheus metrics, named `substrate_*`.

Counting costs a few dictionary operations for each event; text is made only when somebody asks. Labels are bounded:
workloads by name, and words of our own. Callers, sessions, guests and nodes are never labels.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any, Final

from msgspec import Struct
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from substrate_seam import events as e
from substrate_seam.events import Emit, Event
from substrate_seam.report import NodeReport

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""What `Metrics.exposition` is written in."""

_SERIES_MAX: Final = 1000
_BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

Labels = tuple[str, ...]
Measured = tuple[Any, ...]
"""A number, and then the labels it belongs to."""


class On(Struct, frozen=True):
    """What a kind of event means for a metric: `measure` gives a number, or None for nothing.

    `labels` has those that are the same for the whole kind; each other one is the event's own field of that name.
    """

    measure: Callable[[Any], Any]
    labels: Mapping[str, str]


def on(measure: Callable[[Any], Any] = lambda _: 1, **labels: str) -> On:
    """Measure events of a kind; without `measure`, count them."""
    return On(measure, labels)


class Metrics(Collector):
    """A `Sink` that counts, and what it has counted, in Prometheus's words."""

    def __init__(self) -> None:
        self._metrics = _metrics()
        self._observed = _observed()
        self._report: Callable[[], NodeReport] | None = None
        self._events = _Counter("events", "Everything that happened, by the name of its event.", ("event",), {})
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def sink(self, kind: type[Event]) -> Emit:
        """What is done with events of a kind.

        Where an event is counted depends on few of its fields: it is worked out for the first one of each combination.
        """
        tag = str(kind.__struct_config__.tag)
        rules = [
            (self._events, on(event=tag)),
            *((each, each.rules[kind]) for each in self._metrics if kind in each.rules),
        ]
        fields = sorted({field for metric, rule in rules for field in metric.fields(rule)})
        place_of: Callable[[Event], object] = attrgetter(*fields) if fields else lambda _: None
        places: dict[object, list[Emit]] = {}

        def count(event: Event) -> None:
            place = place_of(event)
            if (takers := places.get(place)) is None:
                takers = [metric.taker(event, rule) for metric, rule in rules]
                if len(places) < _SERIES_MAX:
                    places[place] = takers
            for take in takers:
                take(event)

        return count

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
    """One metric and its series, by labels; too many combinations of them become one, `other`."""

    def __init__(self, name: str, about: str, labels: Labels, rules: Mapping[type[Event], On]) -> None:
        self.rules = rules
        self._name = f"substrate_{name}"
        self._about = about
        self._labels = labels
        self._series: dict[Labels, list[Any]] = {}

    def published(self) -> Published:
        """How scrapers find it."""
        family = self.family()
        name = f"{self._name}_total" if family.type == "counter" else self._name
        return Published(name, family.type, self._labels, self._about)

    def fields(self, rule: On) -> Iterator[str]:
        """The fields of an event that are labels."""
        return (label for label in self._labels if label not in rule.labels)

    def taker(self, event: Event, rule: On) -> Emit:
        """What takes this event, and any other of its kind that has the same labels."""
        labels = (rule.labels.get(label) or _word(getattr(event, label)) for label in self._labels)
        return self._taker(self._at(tuple(labels)), rule.measure)

    @abstractmethod
    def _taker(self, series: list[Any], measure: Callable[[Any], Any]) -> Emit: ...

    @abstractmethod
    def family(self) -> Family:
        """What was measured so far."""

    def _at(self, labels: Labels) -> list[Any]:
        if labels not in self._series and len(self._series) >= _SERIES_MAX:
            labels = ("other",) * len(labels)
        return self._series.setdefault(labels, self._nothing())

    def _nothing(self) -> list[Any]:
        return [None]


def _word(value: object) -> str:
    return "none" if value is None else str(value)


class _Counter(_Metric):
    """Adds up."""

    def _taker(self, series: list[Any], measure: Callable[[Any], Any]) -> Emit:
        def add(event: Event) -> None:
            if (amount := measure(event)) is not None:
                series[0] = amount + (series[0] or 0)

        return add

    def family(self) -> Family:
        family = CounterMetricFamily(self._name, self._about, labels=self._labels)
        _add_known(family, self._series)
        return family


class _Gauge(_Metric):
    """Remembers the last value."""

    def _taker(self, series: list[Any], measure: Callable[[Any], Any]) -> Emit:
        def show(event: Event) -> None:
            series[0] = measure(event)

        return show

    def family(self) -> Family:
        family = GaugeMetricFamily(self._name, self._about, labels=self._labels)
        _add_known(family, self._series)
        return family


def _add_known(family: CounterMetricFamily | GaugeMetricFamily, series: Mapping[Labels, list[Any]]) -> None:
    """What has not been measured is not told: it is no 0."""
    for labels, [value] in series.items():
        if value is not None:
            family.add_metric(labels, value)


class _Observed(_Gauge):
    """Is read from a node's report when it is asked for; what has the same labels is added up."""

    def __init__(self, name: str, about: str, labels: Labels, read: Callable[[NodeReport], Iterable[Measured]]) -> None:
        super().__init__(name, about, labels, {})
        self._read = read

    def of(self, report: NodeReport) -> Family:
        """What the report says."""
        self._series.clear()
        for value, *labels in self._read(report):
            series = self._at(tuple(labels))
            series[0] = value + (series[0] or 0)
        return self.family()


class _Members(_Metric):
    """Counts who is there: a measurement is True or False, and a name."""

    def __init__(self, name: str, about: str, labels: Labels, rules: Mapping[type[Event], On]) -> None:
        super().__init__(name, about, labels, rules)
        self._present: set[str] = set()

    def _taker(self, series: list[Any], measure: Callable[[Any], Any]) -> Emit:
        def note(event: Event) -> None:
            present, name = measure(event)
            if present:
                self._present.add(name)
            else:
                self._present.discard(name)

        return note

    def family(self) -> Family:
        return GaugeMetricFamily(self._name, self._about, value=len(self._present))


class _Histogram(_Metric):
    """Sorts seconds into buckets; a measurement is in milliseconds."""

    def _nothing(self) -> list[Any]:
        return [0] * (len(_BOUNDS_S) + 1) + [0.0]

    def _taker(self, series: list[Any], measure: Callable[[Any], Any]) -> Emit:
        def sort_in(event: Event) -> None:
            value_s = measure(event) / 1000
            series[bisect_left(_BOUNDS_S, value_s)] += 1
            series[-1] += value_s

        return sort_in

    def family(self) -> Family:
        family = HistogramMetricFamily(self._name, self._about, labels=self._labels)
        bounds = [*map(str, _BOUNDS_S), "+Inf"]
        for labels, (*buckets, sum_s) in self._series.items():
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
            {e.InvocationEnded: on()},
        ),
        _Histogram(
            "invocation_seconds",
            "From the request being whole to the end of its invocation.",
            ("workload", "start"),
            {e.InvocationEnded: on(lambda x: x.total_ms)},
        ),
        _Members(
            "invocations_in_flight",
            "Invocations that were accepted and have not ended.",
            (),
            {
                e.InvocationAccepted: on(lambda x: (True, x.invocation_id)),
                e.InvocationEnded: on(lambda x: (False, x.invocation_id)),
            },
        ),
        _Counter(
            "request_body_bytes",
            "Bytes of request bodies.",
            ("workload",),
            {e.InvocationAccepted: on(lambda x: x.body_bytes)},
        ),
        _Counter(
            "reply_body_bytes",
            "Bytes of reply bodies that were passed on.",
            ("workload",),
            {e.InvocationEnded: on(lambda x: x.body_bytes)},
        ),
        _Counter(
            "callers_left",
            "Invocations whose caller left before their end.",
            ("workload",),
            {e.InvocationEnded: on(lambda x: 1 if x.client_left else None)},
        ),
        _Counter(
            "attempts_placed",
            "Attempts that were sent to a node, by why there.",
            ("because",),
            {e.InvocationPlaced: on()},
        ),
        _Counter(
            "attempts_refused",
            "Attempts that could not start; nothing ran.",
            ("reason",),
            {e.InvocationRefused: on()},
        ),
        _Counter(
            "calls_refused",
            "Requests that were turned away before they became an invocation.",
            ("reason", "status"),
            {e.CallRefused: on()},
        ),
        _Members(
            "nodes_connected",
            "Nodes that are heard.",
            (),
            {e.NodeConnected: on(lambda x: (True, x.node)), e.NodeLost: on(lambda x: (False, x.node))},
        ),
        _Counter("nodes_lost", "Nodes that fell silent.", (), {e.NodeLost: on()}),
        # The node.
        _Gauge(
            "queue_waiting",
            "Calls that wait for a slot.",
            ("workload",),
            dict.fromkeys((e.CallQueued, e.SlotTaken, e.SlotFreed), on(lambda x: x.waiting)),
        ),
        _Gauge(
            "slots_busy",
            "Slots that are taken.",
            ("workload",),
            dict.fromkeys((e.SlotTaken, e.SlotFreed), on(lambda x: x.busy)),
        ),
        _Counter(
            "guests_claimed",
            "Guests that were claimed for an invocation.",
            ("workload", "start", "isolation"),
            {e.GuestClaimed: on()},
        ),
        _Histogram(
            "queue_seconds",
            "Waiting for a slot.",
            ("workload",),
            {e.GuestClaimed: on(lambda x: x.queue_ms)},
        ),
        _Histogram(
            "claim_seconds",
            "From a slot to a guest that is running.",
            ("workload", "start"),
            {e.GuestClaimed: on(lambda x: x.claim_ms)},
        ),
        _Histogram(
            "ready_seconds",
            "From a running guest to its readiness.",
            ("workload", "start"),
            {e.GuestClaimed: on(lambda x: x.ready_ms)},
        ),
        _Counter(
            "starts_failed",
            "Ways of starting a guest that failed.",
            ("workload", "start"),
            {e.StartFailed: on()},
        ),
        _Counter(
            "exchanges",
            "Exchanges with guests that ended, by why they failed.",
            ("workload", "reason"),
            {e.ExchangeEnded: on()},
        ),
        _Histogram(
            "exchange_seconds",
            "Exchanges with guests.",
            ("workload",),
            {e.ExchangeEnded: on(lambda x: x.guest_ms)},
        ),
        _Counter(
            "guest_cpu_seconds",
            "CPU time of guests, where it was measured.",
            ("workload",),
            {e.ExchangeEnded: on(lambda x: x.cpu_ms / 1000 if x.cpu_ms is not None else None)},
        ),
        _Counter(
            "invocations_fenced",
            "Invocations that were cancelled, by whether they may have run.",
            ("ran",),
            {e.InvocationFenced: on()},
        ),
        _Counter(
            "guests_gone",
            "Guests that have left the host, by who ended them.",
            ("workload", "ended_by"),
            {e.GuestGone: on()},
        ),
        _Counter(
            "guests_parked",
            "Ready guests that were put into the pool.",
            ("workload",),
            {e.GuestParked: on()},
        ),
        _Counter(
            "bases",
            "Warm bases, by what became of them.",
            ("workload", "outcome"),
            {
                e.BaseBuilt: on(outcome="built"),
                e.BaseAdopted: on(outcome="adopted"),
                e.BaseFailed: on(outcome="failed"),
                e.BaseCondemned: on(outcome="condemned"),
            },
        ),
        _Histogram(
            "base_build_seconds",
            "Building a warm base.",
            ("workload",),
            {e.BaseBuilt: on(lambda x: x.build_ms)},
        ),
        _Members(
            "workloads_known",
            "Workloads that the node knows.",
            (),
            {e.WorkloadEnsured: on(lambda x: (True, x.digest)), e.WorkloadDropped: on(lambda x: (False, x.digest))},
        ),
        _Gauge(
            "node_draining",
            "1 while the node takes no new invocations.",
            (),
            {e.NodeDraining: on(), e.NodeResumed: on(lambda _: 0)},
        ),
        _Gauge(
            "node_limits_generation",
            "Generation of the limits that the node keeps to.",
            (),
            {e.NodeLimited: on(lambda x: x.generation)},
        ),
        _Counter(
            "orphans_removed",
            "What earlier daemons left behind and was removed.",
            (),
            {e.OrphanRemoved: on()},
        ),
        # The daemon.
        _Gauge(
            "daemon_info",
            "Which daemon this is; always 1.",
            ("daemon", "version"),
            {e.DaemonStarted: on()},
        ),
        _Gauge(
            "daemon_stopping",
            "1 once the daemon was asked to stop.",
            (),
            {e.DaemonStarted: on(lambda _: 0), e.DaemonStopping: on()},
        ),
        _Gauge(
            "catalog_workloads",
            "Workloads in the table that is in force.",
            (),
            {e.CatalogLoaded: on(lambda x: x.workloads)},
        ),
        _Counter(
            "catalog_loads",
            "Workload tables that were read, by what became of them.",
            ("outcome",),
            {e.CatalogLoaded: on(outcome="loaded"), e.CatalogRefused: on(outcome="refused")},
        ),
        _Counter("warnings", "What an operator should know.", (), {e.WarningRaised: on()}),
        _Counter(
            "cleanups",
            "Cleanups that did not go as they should.",
            ("outcome",),
            {e.CleanupLate: on(outcome="late"), e.CleanupFailed: on(outcome="failed")},
        ),
        _Counter("defects", "Defects of this software.", (), {e.DefectFound: on()}),
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
