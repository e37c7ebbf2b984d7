"""A busy minute of a made-up daemon, the same each time: what the guided tour shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from random import Random

from starlette.types import ASGIApp

from substrate_cluster.ingress import admin_app
from substrate_cluster.stories import whole_story
from substrate_node.procvm.probe import MEASURES, reported
from substrate_seam.errors import Ran, Reason
from substrate_seam.events import (
    CallRefused,
    DaemonStarted,
    Event,
    ExchangeEnded,
    GuestClaimed,
    InvocationAccepted,
    InvocationEnded,
    InvocationPlaced,
    NodeLost,
    SlotFreed,
    SlotTaken,
    WarningRaised,
)
from substrate_seam.invocation import Isolation, Start
from substrate_seam.report import NodeReport, WorkloadReport
from substrate_service.live import Live
from substrate_service.page import page
from substrate_service.snapshot import Snapshot
from substrate_service.stories import Stories

NOW_S, UP_S = 20_000.0, 11_520.0
NOW_MS = 1_767_268_800_000  # noon of a New Year's Day, UTC
FAILED = "5b0e7c1d94aa42e08f6d3c2b1a907e55"

_OF_A_LAPTOP = {"echo": (0.5, 3.2, (0.0, 0.94, 0.06)), "python": (0.3, 21.0, (0.0, 0.9, 0.1))}
_OF_A_FLEET = {
    # calls a second, median ms, and how often they start parked, warm and cold
    "echo": (6.0, 3.2, (0.92, 0.07, 0.01)),
    "agent": (2.5, 38.0, (0.80, 0.18, 0.02)),
    "thumbnail": (1.2, 140.0, (0.0, 0.96, 0.04)),
    "scan": (0.4, 900.0, (0.5, 0.5, 0.0)),
}
_SILENT = "10.0.0.13:8443 did not answer within 5.0 s"
_DOOR = "Anybody may call who reaches the public listener: see {}TOKENS_FILE."
_GUARDED, _PLAIN = Isolation.MICROVM_JAILED, Isolation.PROCESS


class Scene:
    """A daemon as it stands at noon: an agent of three nodes, in good order or in `trouble`, or a laptop's `alone`."""

    def __init__(self, *, trouble: bool = False, alone: bool = False) -> None:
        self._trouble, self._alone = trouble, alone
        self._now_s = NOW_S - UP_S
        self._live = Live(clock=lambda: self._now_s, wall_ms=lambda: NOW_MS + round(1000 * (self._now_s - NOW_S)))
        self._stories = Stories(clock=lambda: round(1e9 * self._now_s))
        daemon = "fc-invoke" if alone else "cluster-agent"
        self._tell(self._now_s, DaemonStarted(daemon=daemon, version="0.1.0", listen="", admin=""))
        called = _OF_A_LAPTOP if alone else _OF_A_FLEET
        moments = [*_calls(called, Random(7)), *(_accidents() if trouble else ())]
        for at_s, event in sorted(moments, key=lambda each: each[0]):
            self._tell(at_s, event)
        self._now_s = NOW_S

    def snapshot(self) -> Snapshot:
        """What the daemon would answer."""
        if self._alone:
            return self._live.snapshot(nodes=[_laptop()], lost={}, reasons=[], doors=[_DOOR.format("FC_INVOKE_")])
        lost = {"node-3": _SILENT} if self._trouble else {}
        doors = [_DOOR.format("CLUSTER_AGENT_")] if self._trouble else []
        nodes = [_node("node-1", 15_360, 9_216), _node("node-2", 15_360, 11_008, draining=self._trouble)]
        if not self._trouble:
            nodes.append(_node("node-3", 7_680, 5_120))
        return self._live.snapshot(nodes=nodes, lost=lost, reasons=[], doors=doors)

    def app(self) -> ASGIApp:
        """Its admin listener."""
        return admin_app(
            ready=list,
            metrics=lambda: b"",
            story=partial(whole_story, own=self._stories.story, nodes={}),
            live=self.snapshot,
            page=page(),
            host=("", _isolation()) if self._alone else None,
            authenticator=None,
            allowed_hosts={"127.0.0.1"},
            mint_id=lambda: "e" * 32,
            emit=lambda _: None,
        )

    def _tell(self, at_s: float, event: Event) -> None:
        self._now_s = at_s
        for sink in (self._live.sink, self._stories.sink):
            if (take := sink(type(event))) is not None:
                take(event)


Moment = tuple[float, Event]


def _calls(called: Mapping[str, tuple[float, float, Sequence[float]]], dice: Random) -> Iterator[Moment]:
    """A minute of calls, with ten seconds in which all of them take longer."""
    for name, (per_second, median_ms, shares) in called.items():
        for _ in range(round(60 * per_second)):
            at_s = NOW_S - 60 * dice.random()
            start = dice.choices([Start.POOL, Start.WARM, Start.COLD], shares)[0]
            slower = {Start.POOL: 1.0, Start.WARM: 1.8, Start.COLD: 9.0}[start] * (2.4 if 30 < NOW_S - at_s < 40 else 1)
            total_ms = median_ms * slower * dice.lognormvariate(0, 0.35)
            call = {"invocation_id": f"{dice.getrandbits(128):032x}", "workload": name, "caller": "ci"}
            yield at_s, InvocationAccepted(**call, body_bytes=120)
            yield at_s, InvocationEnded(**call, status=200, ran=Ran.MAYBE, total_ms=total_ms, start=start)


def _accidents() -> Iterator[Moment]:
    """A guest that takes too long, a full queue, a web page that is turned away, a node that falls silent."""
    call = {"invocation_id": FAILED, "workload": "thumbnail"}
    run = {**call, "guest": "vm-2f9c", "attempt": 1}
    late = {"reason": Reason.GUEST_TIMEOUT, "message": "the workload took longer than its requestTimeout of 10 s"}
    claimed = {"queue_ms": 0.4, "claim_ms": 38.1, "ready_ms": 36.9, "start": Start.WARM, "isolation": _GUARDED}
    ended = {"caller": "ci", "status": 504, "ran": Ran.MAYBE, "start": Start.WARM, "node": "node-1", **late}
    for after_s, event in (
        (0.0, InvocationAccepted(**call, caller="ci", body_bytes=48_211)),
        (0.0003, InvocationPlaced(invocation_id=FAILED, attempt=1, node="node-1", because="warm", candidates=2)),
        (0.0011, SlotTaken(**call, busy=4, waiting=0, free_mib=9_216, queue_ms=0.4)),
        (0.0392, GuestClaimed(**run, **claimed, base="7c1e")),
        (10.0392, ExchangeEnded(**run, **late, guest_ms=10_000.0, body_bytes=0, cpu_ms=9_871.0, peak_mib=212.0)),
        (10.0467, SlotFreed(**call, busy=3, waiting=0, free_mib=9_472, held_ms=10_045.6)),
        (10.0470, InvocationEnded(**call, **ended, total_ms=10_047.0)),
    ):
        yield NOW_S - 14 + after_s, event
    refused = {"invocation_id": "c0ffee0dd5e94b7b8a1f20f4d5a6e711", "workload": "scan", "caller": "ci"}
    why = {"reason": Reason.QUEUE_TIMEOUT, "message": "a slot of 'scan' did not come free within 30.0 s"}
    yield NOW_S - 9, InvocationEnded(**refused, **why, status=503, ran=Ran.NO, total_ms=30_000.0)
    for after_s in range(3):
        away = {"invocation_id": f"{after_s:032x}", "reason": Reason.FORBIDDEN, "status": 403}
        yield NOW_S - 6 + after_s, CallRefused(**away, message="forbidden")
    yield NOW_S - 21, NodeLost(node="node-3", message=_SILENT)
    unparked = "a guest of 'scan' could not be parked: it ended while parked: exit status 137"
    yield (
        NOW_S - 20,
        WarningRaised(message=unparked, hint="The next try is in 4 s; calls still start their own guests."),
    )


def _node(name: str, size_mib: int, free_mib: int, *, draining: bool = False) -> NodeReport:
    return NodeReport(
        node_id=name,
        boot_id="b1",
        size_mib=size_mib,
        free_mib=free_mib,
        isolation=_GUARDED,
        arch="amd64",
        full=True,
        draining=draining,
        workloads={
            "1": WorkloadReport(name="echo", concurrency=8, busy=1, serving=1, parked=4, base="a", isolation=_PLAIN),
            "2": WorkloadReport(
                name="agent", concurrency=8, busy=3, serving=2, parked=2, making=1, base="b", isolation=_GUARDED
            ),
            "3": WorkloadReport(name="thumbnail", concurrency=4, busy=2, serving=2, base="c", isolation=_GUARDED),
            "4": WorkloadReport(
                name="scan", concurrency=2, busy=2, serving=2, waiting=3, parked=1, base="d", isolation=_GUARDED
            ),
        },
    )


def _laptop() -> NodeReport:
    warm = {"concurrency": 4, "base": "a", "isolation": _PLAIN}
    return NodeReport(
        node_id="laptop",
        boot_id="b1",
        size_mib=14_100,
        free_mib=13_588,
        isolation=_PLAIN,
        arch="amd64",
        full=True,
        workloads={
            "1": WorkloadReport(name="echo", **warm),
            "2": WorkloadReport(name="python", busy=1, serving=1, **warm),
        },
    )


def _isolation() -> list[dict[str, object]]:
    """An ordinary user's host: all that can be had without root."""
    lacking = {"control-group": "no control group may be made below /user.slice"}
    return reported(dict.fromkeys(MEASURES, "") | lacking).facts
