"""What a seed stands for: a fleet, the calls made on it and what goes wrong, all drawn beforehand from its dice."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from msgspec import Struct

from fakes.vmm import At, Latencies
from simulation.callers import MANNERS, Call, Manner
from simulation.fleet import BODY_BYTES_MAX, NAMES, Design, Fault
from simulation.guests import Wish

TABLE: Mapping[str, dict[str, Any]] = {
    "cold": {"command": ["run"], "concurrency": 2, "queue": 8},
    "warm": {"command": ["run"], "concurrency": 4, "queue": 16, "warmBase": True},
    "pool": {"command": ["run"], "concurrency": 4, "queue": 16, "warmBase": True, "pool": 2},
    "seats": {"command": ["run"], "concurrency": 4, "queue": 8, "sessioned": True},
    "tiny": {"command": ["run"], "concurrency": 1, "queue": 1},
    "strict": {"command": ["run"], "concurrency": 2, "queue": 0, "callers": ["anna"]},
    "shim": {"rootfsPath": "/images/shim", "concurrency": 2, "queue": 4},
    "sealed": {"command": ["run"]},
}
"""`sealed` runs nowhere: every monitor refuses it."""
EVERYBODY = tuple(name for name in TABLE if name not in {"strict", "sealed"})
RUN_WITHIN_S = 3.0
SHORT = {"memMib": 256, "startTimeout": "2s", "requestTimeout": f"{RUN_WITHIN_S:g}s"}


class Trouble(Struct, frozen=True):
    """Something that happens at a moment: `kind` is what, `node` where (a number), `for_s` until when it lasts."""

    at_s: float
    kind: str
    node: int = 0
    for_s: float = 0.0
    size: int = 0


@dataclass
class Visit:
    """A caller comes at a moment, makes calls on one connection, and goes."""

    at_s: float
    manner: Manner
    calls: list[Call]

    def __repr__(self) -> str:
        said = ", ".join(f"{call.number}: {call.method} {call.target[:90]}" for call in self.calls)
        return f"at {self.at_s:.3f} {self.manner}: {said}"


@dataclass
class Scenario:
    """One seed, drawn."""

    themes: tuple[str, ...]
    design: Design
    names: tuple[str, ...]
    """The workloads in its table: those that somebody asks for."""
    visits: list[Visit] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)

    def __str__(self) -> str:
        design = {name: getattr(self.design, name) for name in self.design.__struct_fields__ if name != "table"}
        lines = [f"themes {', '.join(self.themes)}; {design}", *map(repr, self.visits), *map(repr, self.troubles)]
        return "\n  ".join(lines)

    @property
    def calls(self) -> list[Call]:
        """All calls, in the order of their numbers."""
        return [call for visit in self.visits for call in visit.calls]


def table(dice: Random, names: Iterable[str], **changes: object) -> str:
    """A workload table with these workloads; `changes` overrules fields of every one."""
    generation = str(dice.randrange(1000))
    entries: dict[str, dict[str, Any]] = {name: {**SHORT, **TABLE[name], **changes} for name in names}
    for entry in entries.values():
        if "command" in entry:
            entry["env"] = {"GENERATION": generation}  # a new digest
    return json.dumps(entries)


class _Draft:
    """A scenario in the making; themes change it."""

    def __init__(self, dice: Random) -> None:
        self.dice = dice
        self.design: dict[str, Any] = {"machines": dice.choice([0, 0, 1, 1, 3])}
        self.changes: dict[str, object] = {}
        self.faults: list[Fault] = []
        self.troubles: list[Trouble] = []
        self.visits: list[Visit] = []
        self.span_s = dice.choice([0.5, 2.0, 4.0])
        self.workloads: tuple[str, ...] = tuple(dice.sample(EVERYBODY, dice.randint(1, 3)))
        self.callers = dice.randint(2, 9)
        self.rude = dice.choice([0.0, 0.0, 0.3])
        self.slow = 1.0
        self._numbers = 0

    @property
    def machines(self) -> int:
        return max(1, self.design["machines"])

    def moment(self) -> float:
        return self.dice.uniform(0.0, self.span_s)

    def fault(self, at: At | str, **how: Any) -> None:
        self.faults.append(Fault(At(at), tuple(how.items())))

    def trouble(self, kind: str, *, for_s: float = 0.0, size: int = 0) -> None:
        self.troubles.append(Trouble(self.moment(), kind, self.dice.randrange(self.machines), for_s, size))

    def wish(self) -> Wish:
        dice = self.dice
        odd = dice.random()
        return Wish(
            status=200 if dice.random() < 0.8 else dice.choice([201, 204, 304, 404, 418, 500, 503]),
            pieces=dice.choice([0, 0, 1, 3, 8]),
            size=dice.choice([10, 100, 1000, 5000]) if dice.random() < 0.95 else 60_000,
            chunked=dice.randrange(2),
            pace_ms=dice.choice([0, 0, 10, 200]),
            after_ms=int(self.slow * dice.choice([0, 0, 5, 50, 400])),
            die=int(odd < 0.02),
            hang=int(0.02 < odd < 0.04),
            forge=int(dice.random() < 0.2),
        )

    def call(self, workload: str | None = None, **changes: Any) -> Call:
        """A call with everything right about it, unless changed."""
        dice, self._numbers = self.dice, self._numbers + 1
        workload = workload or dice.choice(self.workloads)
        query = self.wish().query
        query = query and f"?{query}"
        method, session = "POST", ""
        if workload == "seats" or dice.random() < 0.1:
            session = dice.choice(["s1", "s2", "s3"])
        fields = [("authorization", f"Bearer {dice.choice(NAMES)}")]
        if workload != "shim" and dice.random() < 0.25:
            method = dice.choice(["GET", "HEAD", "PUT", "POST", "DELETE"])
            target, guest_target = f"/http/{workload}/a/b{query}", f"/a/b{query}"
            fields += [("fc-session", session)] if session else []
        else:
            path = f"/{session}" if session else ""
            target, guest_target = f"/invoke/{workload}{path}{query}", f"/invoke{path}{query}"
        size = dice.choice([0, 1, 20, 500, 3000]) if dice.random() < 0.95 else dice.randrange(BODY_BYTES_MAX)
        if size and dice.random() < 0.3:
            fields.append(("transfer-encoding", "chunked"))
        given = {
            "number": self._numbers,
            "workload": workload,
            "method": method,
            "target": target,
            "guest_target": guest_target,
            "fields": tuple(fields),
            "body": dice.randbytes(size),
        }
        return Call(**(given | changes))

    def visit(self, kind: str | None = None, *calls: Call) -> None:
        """A caller, in some manner."""
        dice = self.dice
        if kind is None:
            kind = dice.choice(list(MANNERS)) if dice.random() < self.rude else "patient"
        if not calls:
            several = dice.randint(2, 4) if kind == "pipeliner" or (kind == "patient" and dice.random() < 0.2) else 1
            calls = tuple(self.call() for _ in range(several))
        if kind == "expecter":
            calls = tuple(self._expecting(call) for call in calls)
        pause_s = dice.choice([0.0, 0.01, 0.1, 0.5, 3.5])
        manner = Manner(kind, fraction=dice.random(), pause_s=pause_s, rude=dice.random() < 0.5)
        self.visits.append(Visit(self.moment(), manner, list(calls)))

    def _expecting(self, call: Call) -> Call:
        return Call(
            **{name: getattr(call, name) for name in ("number", "workload", "method", "target", "guest_target")},
            fields=(*call.fields, ("expect", "100-continue")),
            body=call.body or b"something",
        )

    def done(self, themes: tuple[str, ...]) -> Scenario:
        for _ in range(self.callers):
            self.visit()
        if "latencies" in self.design:  # guests may be slow, but not so slow that none can ever start
            self.changes.pop("startTimeout", None)
        self.visits.sort(key=lambda visit: visit.at_s)
        self.troubles.sort(key=lambda trouble: trouble.at_s)
        asked = {call.target.split("/")[2].partition("?")[0] for visit in self.visits for call in visit.calls}
        names = tuple(name for name in TABLE if name in asked)
        design = Design(table=table(self.dice, names, **self.changes), faults=tuple(self.faults), **self.design)
        return Scenario(themes, design, names, self.visits, self.troubles)


Theme = Callable[[_Draft], None]


def calm(draft: _Draft) -> None:
    """Nothing goes wrong."""


def starts_fail(draft: _Draft) -> None:
    """Guests do not start, or not in time, or not from their base."""
    dice = draft.dice
    draft.workloads = (*draft.workloads, dice.choice(["warm", "pool"]))
    for _ in range(dice.randint(1, 3)):
        at = dice.choice([At.BOOT, At.RESTORE, At.DIAL, At.HEALTHZ, At.READY, At.RESTORED, At.ACCEPTED])
        effects: list[dict[str, Any]] = [
            {"fail": "out of luck"},
            {"hang": True},
            {"die": True},
            {"delay_s": dice.choice([0.1, 0.6, 2.5])},
        ]
        how = dice.choice(effects)
        draft.fault(at, **how, times=dice.choice([1, 2, None]), chance=dice.choice([0.3, 1.0]))
    draft.design["contact_cap_s"] = dice.choice([None, 0.15])
    draft.design["latencies"] = Latencies(
        boot_s=dice.choice([0.02, 0.3]), ready_after_s=dice.choice([0.0, 0.5]), restore_s=dice.choice([0.005, 0.3])
    )


def exchanges_fail(draft: _Draft) -> None:
    """Guests die, hang, hang up or talk nonsense while they answer."""
    dice = draft.dice
    stages = [At.CONNECTED, At.REQUEST, At.BEFORE_HEAD, At.WITHIN_HEAD, At.AFTER_HEAD, At.MID_BODY, At.AFTER_BODY]
    for _ in range(dice.randint(1, 4)):
        at = dice.choice(stages)
        effects: list[dict[str, Any]] = [
            {"fail": "reset"},
            {"hang": True},
            {"die": True},
            {"close": True},
            {"delay_s": dice.choice([0.1, 1.0, 5.0])},
            {"die": True, "delay_s": 0.05},
        ]
        how = dice.choice(effects)
        if at in {At.CONNECTED, At.BEFORE_HEAD, At.AFTER_BODY} and dice.random() < 0.3:
            how = {"say": dice.choice([b"what?\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 101 X\r\n\r\n"])}
        draft.fault(at, **how, times=dice.choice([1, 3, None]), chance=dice.choice([0.3, 1.0]))


def cleaning_fails(draft: _Draft) -> None:
    """Guests are hard to kill, and leave things that are hard to remove."""
    dice = draft.dice
    for at in dice.sample([At.KILL, At.DISCARD, At.DISCARD_BASE], 2):
        how: dict[str, Any] = {"fail": "busy"} if dice.random() < 0.6 else {"delay_s": dice.choice([0.5, 3.0, 12.0])}
        draft.fault(at, **how, times=dice.randint(1, 4))
    draft.rude = 0.6


def bases_fail(draft: _Draft) -> None:
    """Bases can't be made, found or used."""
    dice = draft.dice
    draft.workloads = ("warm", "pool")
    for at in dice.sample([At.CAPTURE, At.ADOPT, At.RESTORE, At.DISCARD_BASE], 2):
        how: dict[str, Any] = {"fail": "torn"} if dice.random() < 0.7 else {"delay_s": 1.0}
        draft.fault(at, **how, times=dice.choice([1, 4, 8]))
    if dice.random() < 0.5:
        draft.trouble("kill-guest")


def wires_break(draft: _Draft) -> None:
    """Connections between front and nodes, and those of callers, break at some byte."""
    dice = draft.dice
    draft.design["machines"] = dice.choice([1, 3])
    draft.design["wire_cuts"] = dice.choice([0.2, 0.6])
    draft.design["front_cuts"] = dice.choice([0.0, 0.2])
    draft.callers += 4
    for _ in range(dice.randint(0, 3)):
        draft.trouble("cut")


def partitions(draft: _Draft) -> None:
    """Nodes fall silent, or refuse, and come back."""
    draft.design["machines"] = draft.dice.choice([1, 3])
    for _ in range(draft.dice.randint(1, 2)):
        draft.trouble(draft.dice.choice(["silence", "refuse"]), for_s=draft.dice.choice([0.1, 1.0, 8.0]))


def crashes(draft: _Draft) -> None:
    """Node daemons die with all their guests, and start anew."""
    draft.design["machines"] = draft.dice.choice([1, 3])
    for _ in range(draft.dice.randint(1, 3)):
        draft.trouble("crash", for_s=draft.dice.choice([0.0, 0.2, 2.0]))


def drains(draft: _Draft) -> None:
    """Nodes are drained, with more or less time, and take calls again."""
    for _ in range(draft.dice.randint(1, 2)):
        draft.trouble("drain", for_s=draft.dice.choice([0.0, 0.3, 2.0]))


def reloads(draft: _Draft) -> None:
    """The table changes while calls are made."""
    for _ in range(draft.dice.randint(1, 3)):
        draft.trouble("reload", size=draft.dice.randrange(1 << 30))
    if draft.dice.random() < 0.3:
        draft.trouble("forget", size=draft.dice.randrange(1 << 30))


def cancels(draft: _Draft) -> None:
    """Calls are cancelled on some node, at some moment after they were accepted; some guests are slow to reach."""
    draft.slow = 2.0
    draft.fault(At.DIAL, delay_s=0.02, times=None, chance=draft.dice.choice([0.0, 0.5]))
    for _ in range(draft.dice.randint(2, 6)):
        draft.trouble("cancel", for_s=draft.dice.choice([0.0, 0.001, 0.02, 0.3]), size=draft.dice.randrange(1 << 30))


def memory_is_short(draft: _Draft) -> None:
    """Few guests fit, and the node's size changes."""
    dice = draft.dice
    draft.design["memory_mib"] = dice.choice([256, 512, 700, 1024])
    draft.workloads = tuple(dice.sample(("warm", "pool", "cold", "shim"), 2))
    draft.changes["queue"] = dice.choice([1, 4, 16])
    draft.slow = dice.choice([1.0, 4.0])
    draft.callers += 4
    for _ in range(dice.randint(0, 3)):
        draft.trouble("limit", for_s=dice.choice([0.2, 2.0]), size=dice.choice([0, 200, 256, 600]))


def rush(draft: _Draft) -> None:
    """Far more callers than slots, at once."""
    dice = draft.dice
    draft.callers = dice.choice([60, 200]) if dice.random() < 0.15 else 20
    draft.workloads = dice.choice([("warm",), ("pool",), ("cold",), ("tiny", "cold"), ("seats",)])
    draft.changes["queue"] = dice.choice([2, 10, 30])
    if dice.random() < 0.5:
        draft.changes["startTimeout"] = dice.choice(["100ms", "400ms"])
    draft.design["caller_limit"] = dice.choice([6, 64])
    draft.span_s = dice.choice([0.05, 0.5])
    draft.slow = dice.choice([0.5, 3.0])


def front_stops(draft: _Draft) -> None:
    """The front, or the one process, is asked to stop while it works."""
    draft.slow = 4.0
    draft.trouble("stop", for_s=draft.dice.choice([0.0, 0.2, 5.0]))


def rude_callers(draft: _Draft) -> None:
    """Callers leave, stall, dawdle, and ask for what they must not."""
    dice = draft.dice
    draft.rude = 0.9
    draft.design["body_budget_bytes"] = dice.choice([4_000, 1 << 22])
    for _ in range(dice.randint(3, 6)):
        draft.visit(*dice.choice(WRONGS)(draft))
    if dice.random() < 0.2:
        draft.trouble("away", for_s=0.5)


def demands(draft: _Draft) -> None:
    """Callers insist on how they are served."""
    dice = draft.dice
    draft.workloads = (*draft.workloads, "warm")
    if dice.random() < 0.5:
        draft.fault(At.RESTORE, fail="torn", times=None)
        draft.visit("patient", draft.call("warm", fields=(_ANNA, ("fc-require-start", "warm"))))
    for _ in range(dice.randint(2, 5)):
        call = draft.call(dice.choice(["warm", "pool", "cold"]))
        demand = dice.choice(
            [
                *(("fc-require-start", start) for start in ("cold", "warm", "pool")),
                *(("fc-require-isolation", least) for least in ("process", "microvm", "microvm-jailed")),
            ]
        )
        call = draft.call(call.workload, fields=(*call.fields[:1], demand))
        draft.visit("patient", call)


def _wrong(kind: str = "patient", **changes: Any) -> Callable[[_Draft], tuple[Any, ...]]:
    return lambda draft: (kind, draft.call(**changes))


def _raw(data: bytes) -> Callable[[_Draft], tuple[Any, ...]]:
    return lambda draft: ("patient", draft.call(raw=data))


_ANNA = ("authorization", "Bearer anna")
WRONGS: tuple[Callable[[_Draft], tuple[Any, ...]], ...] = (
    _wrong(target="/invoke/nobody", fields=(_ANNA,)),
    _wrong(target="/else/where", fields=(_ANNA,)),
    _wrong(target="/invoke/cold/..", fields=(_ANNA,)),
    _wrong(target="/invoke/cold/%ff", fields=(_ANNA,)),
    _wrong(target="/http/shim/x", fields=(_ANNA,)),
    _wrong(method="GET", target="/invoke/cold", fields=(_ANNA,), body=b""),
    _wrong(target="/invoke/strict", fields=(("authorization", "Bearer bert"),)),
    _wrong(target="/invoke/sealed", fields=(_ANNA,)),
    _wrong(fields=()),
    _wrong(fields=(("authorization", "Bearer eve"),)),
    _wrong(fields=(_ANNA, ("origin", "http://evil.example"))),
    _wrong(fields=(_ANNA, ("fc-require-start", "yesterday"))),
    _wrong(fields=(_ANNA, ("fc-require-luck", "much"))),
    _wrong(body=bytes(BODY_BYTES_MAX + 1), fields=(_ANNA,)),
    _wrong(body=bytes(BODY_BYTES_MAX + 1), fields=(_ANNA, ("transfer-encoding", "chunked"))),
    _wrong(body=bytes(3_900), fields=(_ANNA,), kind="slow_uploader"),
    _wrong(body=bytes(3_900), fields=(_ANNA, ("transfer-encoding", "chunked")), kind="slow_uploader"),
    _raw(b"GET / HTTP/1.1\r\nhost: front\r\nno colon\r\n\r\n"),
    _raw(b"POST /invoke/cold HTTP/1.0\r\nhost: front\r\n\r\n"),
    _raw(b"POST /invoke/cold HTTP/1.1\r\nhost: front\r\n" + b"a: b\r\n" * 101 + b"\r\n"),
    _raw(b"POST /invoke/cold HTTP/1.1\r\nhost: front\r\nauthoriz"),
    _raw(b"POST /invoke/cold HTTP/1.1\r\nhost: front\r\ntransfer-encoding: gzip\r\n\r\n"),
)
"""Calls with something wrong about them."""

THEMES: Mapping[str, Theme] = {
    theme.__name__: theme
    for theme in (
        *(calm, starts_fail, exchanges_fail, cleaning_fails, bases_fail, wires_break, partitions, crashes),
        *(drains, reloads, cancels, memory_is_short, rush, front_stops, rude_callers, demands),
    )
}


def draw(dice: Random, *themes: str) -> Scenario:
    """The scenario of some dice: one to three themes at once, unless they are given."""
    draft = _Draft(dice)
    chosen = themes or tuple(dice.sample(list(THEMES), dice.choice([1, 1, 2, 3])))
    for theme in chosen:
        THEMES[theme](draft)
    return draft.done(chosen)
