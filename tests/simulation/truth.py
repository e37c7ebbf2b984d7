"""The audit: what every caller was told, held against what guests noted outside themselves, and against the events.

`lies` names everything that does not agree; `tally` counts what was seen, so that a run that sees nothing is found out.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from simulation.callers import Call
from simulation.fleet import Crashed, Entry, Fleet, Overcommitted
from simulation.guests import wish_of
from simulation.scenarios import RUN_WITHIN_S
from substrate_seam.errors import Ran, Reason
from substrate_seam.events import (
    CallRefused,
    CleanupFailed,
    CleanupLate,
    DefectFound,
    ExchangeEnded,
    InvocationAccepted,
    InvocationEnded,
    InvocationRefused,
    NodeDraining,
    NodeResumed,
    SlotFreed,
    SlotTaken,
)

STATUS = {
    **dict.fromkeys(("bad-request", "bad-session"), (400, 408, 417, 431, 501, 505)),
    "unauthenticated": (401,),
    "forbidden": (403,),
    **dict.fromkeys(("unknown-workload", "not-found"), (404,)),
    "body-timeout": (408,),
    "cancelled": (409,),
    "body-too-large": (413,),
    "caller-limit": (429,),
    "internal": (500,),
    "guest-failed": (502,),
    **dict.fromkeys(("overloaded", "capacity", "queue-timeout", "memory", "draining"), (503,)),
    **dict.fromkeys(("boot-failed", "restore-failed", "not-ready", "unknown-digest", "incompatible"), (503,)),
    **dict.fromkeys(("node-unreachable", "dependency-unavailable"), (503,)),
    "guest-timeout": (504,),
}
"""With which statuses a reason may be told; the listener has its own for heads that it refuses."""
MAY_HAVE_RUN = {"guest-failed", "guest-timeout", "internal"}
RETRY_AFTER = {"caller-limit", "overloaded", "capacity", "queue-timeout", "draining"}


EXCUSES = {
    # A node answers a call that it gives up when it has cleared up after it; one that can't is silent.
    "node-unreachable": {"wires_break", "partitions", "crashes", "front_stops", "cleaning_fails"},
    "guest-failed": {
        *("exchanges_fail", "starts_fail", "bases_fail", "wires_break", "partitions", "crashes", "drains", "cancels"),
        "front_stops",
    },
    "draining": {"drains", "front_stops"},
    "cancelled": {"cancels"},
    "boot-failed": {"starts_fail", "exchanges_fail", "bases_fail"},
    "restore-failed": {"starts_fail", "bases_fail", "demands", "exchanges_fail"},
    "incompatible": {"demands", "rude_callers"},
    "caller-limit": {"rush"},
    "overloaded": {"rude_callers"},
    "dependency-unavailable": {"rude_callers"},
}
"""Without one of these themes nobody may hear such a thing."""
OF_THE_GUEST = {"fc-start", "fc-node", "fc-isolation", "server-timing", "x-fc-queue-wait-ms"}
NODE_UNHEARD = ("was lost while it ran", "nor said why", "was delivered here before")
"""Words of errors that had to be told without what the node knows."""
ENDING_S = 0.5
"""Longer than it may take to end a guest that is to be ended."""
LEAVING_S = 1.0
"""Longer than it may take until a caller's hang-up has ended its guest."""


class Audit:
    """One fleet at its end, and the calls that were made on it."""

    def __init__(self, fleet: Fleet, calls: list[Call], *, themes: Iterable[str]) -> None:
        self.fleet = fleet
        self.themes = set(themes)
        self.calls = calls
        self.entries: dict[str, list[Entry]] = defaultdict(list)
        for entry in fleet.journal:
            self.entries[entry.invocation].append(entry)
        self.accepted: Counter[str] = Counter()
        self.refused: dict[str, list[CallRefused]] = defaultdict(list)
        self.ended: dict[str, list[InvocationEnded]] = defaultdict(list)
        self.ended_at_s: dict[str, float] = {}
        self.freed_at_s: dict[str, float] = {}
        for at_s, _, event in fleet.events:
            self._sort(event, at_s)

    def _sort(self, event: object, at_s: float) -> None:
        match event:
            case InvocationAccepted():
                self.accepted[event.invocation_id] += 1
            case InvocationEnded():
                self.ended[event.invocation_id].append(event)
                self.ended_at_s[event.invocation_id] = at_s
            case CallRefused():
                self.refused[event.invocation_id].append(event)
            case SlotFreed(invocation_id=str()):
                self.freed_at_s[event.invocation_id] = at_s

    def lies(self) -> Iterator[str]:
        """Everything that is not as it was told."""
        yield from self._lies_of_events()
        known = {call.invocation for call in self.calls}
        for invocation, entries in self.entries.items():
            if len(entries) > 1:
                yield f"{invocation} ran {len(entries)} times: {entries}"
            if not self.accepted[invocation]:
                yield f"{invocation} ran and was never accepted"
            if invocation not in known:
                yield f"{invocation!r} ran and nobody asked for it"
        for invocation in {**self.accepted, **self.ended}:
            if (self.accepted[invocation], len(self.ended[invocation])) != (1, 1):
                yield f"{invocation} was accepted {self.accepted[invocation]} times: {self.ended[invocation]}"
        for call in self.calls:
            yield from (f"call {call.number}: {lie}" for lie in self._lies_to(call))
            yield from (f"call {call.number}: {lie}" for lie in self._delays_of(call))
        yield from self._lies_about_cancels()

    def _lies_of_events(self) -> Iterator[str]:
        """Defects, and what must never be so at any moment."""
        sessions: dict[str, tuple[str, str, str | None]] = {}  # of the calls accepted, where they run one at a time
        running: dict[tuple[str, ...], str] = {}
        drained_at_s: dict[str, float] = {}  # by when the last call of a node should have ended
        tidy = "cleaning_fails" not in self.themes  # otherwise a call is told of only when its guest is really gone
        for at_s, source, event in self.fleet.events:
            match event:
                case NodeDraining():
                    drained_at_s[source] = at_s + event.within_s
                case NodeResumed():
                    drained_at_s.pop(source, None)
                case ExchangeEnded() if tidy and at_s > drained_at_s.get(source, at_s) + ENDING_S:
                    yield f"{source}: a call outlived the drain that was to be over at {drained_at_s[source]}: {event}"
                case DefectFound() | Overcommitted():
                    yield f"{source}: {event}"
                case CleanupFailed() | CleanupLate() if self.themes.isdisjoint({"cleaning_fails", "bases_fail"}):
                    yield f"{source}: {event}, for which there is no reason"
                case ExchangeEnded() if event.guest_ms > (RUN_WITHIN_S + ENDING_S) * 1e3:
                    yield f"{source}: a guest ran for {event.guest_ms} ms: {event}"
                case InvocationAccepted(workload="seats", session=str()):
                    sessions[event.invocation_id] = (event.workload, event.caller, event.session)
                case SlotTaken(invocation_id=str()) if event.invocation_id in sessions:
                    session = (source, *map(str, sessions[event.invocation_id]))
                    if session in running:
                        yield f"{event.invocation_id} and {running[session]} of {session} run at once"
                    running[session] = event.invocation_id
                case SlotFreed(invocation_id=str()) if event.invocation_id in sessions:
                    running.pop((source, *map(str, sessions[event.invocation_id])), None)
                case Crashed():
                    drained_at_s.pop(source, None)
                    running = {session: call for session, call in running.items() if session[0] != source}

    def _delays_of(self, call: Call) -> Iterator[str]:
        """A guest that outlives its caller's interest."""
        left_at_s, invocation = call.left_at_s, call.invocation
        if left_at_s is None or "cleaning_fails" in self.themes:
            return
        if self.ended_at_s.get(invocation, 0.0) > left_at_s + LEAVING_S:
            yield f"it ended {self.ended_at_s[invocation] - left_at_s:.3f} s after its caller had left"
        reached = self.themes.isdisjoint({"partitions", "crashes"})
        if reached and self.freed_at_s.get(invocation, 0.0) > left_at_s + LEAVING_S:
            yield f"its slot was freed {self.freed_at_s[invocation] - left_at_s:.3f} s after its caller had left"

    def _lies_to(self, call: Call) -> Iterator[str]:
        """What its caller was told wrongly."""
        ran = len(self.entries.get(call.invocation, ()))
        told = self._told_inside(call)
        if told is not None and told.ran is Ran.NO and ran:
            yield f"it ran, and the events deny it: {told}"
        if not call.sent:
            if ran or told:
                yield "it was never sent, and yet heard of"
            return
        if not call.status:
            cut_short = (
                told is not None and told.status and told.reason
            )  # and what was sent of it was lost with the cut
            awaited = call.is_first or self.accepted[call.invocation]  # a front may close between two calls
            if awaited and not (call.left or cut_short):
                yield f"it got no answer: {call.broken or 'nothing came'}"
            return
        if call.broken and not call.whole and "bytes behind" in call.broken:
            yield call.broken
        if "fc-error" in call.headers:
            yield from self._lies_in_error(call, ran)
        else:
            yield from self._lies_in_answer(call, ran, told)

    def _told_inside(self, call: Call) -> InvocationEnded | None:
        ended = self.ended.get(call.invocation)
        return ended[0] if ended else None

    def _lies_in_error(self, call: Call, ran: int) -> Iterator[str]:
        reason, said = call.headers["fc-error"], call.headers.get("fc-ran")
        if call.status not in STATUS.get(reason, ()):
            yield f"{reason} was told with status {call.status}"
        if said != ("maybe" if reason in MAY_HAVE_RUN else "no"):
            yield f"{reason} was told with fc-ran {said}"
        if said == "no" and ran:
            yield f"{reason} says that it did not run, and it did"
        if reason in RETRY_AFTER and not call.headers.get("retry-after", "").isdigit():
            yield f"{reason} does not say when to try again"
        if not call.whole and not call.left:
            yield f"its error broke off: {call.broken}"
        yield from self._lies_about_its_guest(call, ran)
        own_fault = reason == "guest-failed" and wish_of(call.guest_target).die
        if EXCUSES.get(reason, self.themes).isdisjoint(self.themes) and not own_fault:
            yield f"it heard {reason}, for which there is no reason: {call.answer.decode()}"
        ids = (call.headers.get("fc-invocation-id", ""), call.invocation)
        # What the listener refuses by itself, it tells under an id of its own.
        strayed = reason in {"bad-request", "body-timeout"} and int(ids[0] or "0", 16) >= 1 << 64
        if ids[0] != ids[1] and not strayed:
            yield f"its error names {ids[0]}"
        inside = [event.reason for event in (*self.ended.get(ids[0], ()), *self.refused.get(ids[0], ()))]
        if inside != [reason] and not call.left:
            yield f"it heard {reason}, and the events say {inside}"

    def _lies_about_its_guest(self, call: Call, ran: int) -> Iterator[str]:
        """Whoever ran something and could say so has told by which guest."""
        told, ended = OF_THE_GUEST & call.headers.keys(), self._told_inside(call)
        why = ended.message if ended else call.answer.decode()  # a caller who left may have read the half of it
        if told and told != OF_THE_GUEST:
            yield f"its error tells only {sorted(told)} of its guest"
        if ran and not told and not any(words in why for words in NODE_UNHEARD):
            yield f"it ran, and its error tells nothing of its guest: {why}"
        if ran and told and call.headers["fc-node"] != self.entries[call.invocation][0].node:
            yield f"it ran on {self.entries[call.invocation][0].node}, and was told {call.headers['fc-node']}"

    def _lies_in_answer(self, call: Call, ran: int, told: InvocationEnded | None) -> Iterator[str]:
        if ran != 1:
            yield f"a guest answered, and it ran {ran} times"
        if call.headers.get("fc-invocation-id") != call.invocation or (
            call.headers.get("x-meant-for") != call.invocation
        ):
            yield f"it got the answer to {call.headers}"
        if call.status != call.meant_status:
            yield f"the guest said {call.meant_status}, the caller heard {call.status}"
        if not call.headers.keys() >= OF_THE_GUEST:
            yield f"the head of the answer lacks something: {call.headers}"
        elif call.headers["fc-node"] != self.entries[call.invocation][0].node:
            yield f"it ran on {self.entries[call.invocation][0].node}, and was told {call.headers['fc-node']}"
        if "fc-ran" in call.headers or call.headers["server-timing"] == "queue;dur=0":
            yield "a guest passed for the substrate"
        if not call.meant.startswith(call.answer):
            yield f"what it heard is not what the guest said: {call.answer[:200]!r} for {call.meant[:200]!r}"
        if call.whole and call.answer != call.meant:
            yield f"its answer looks whole at {len(call.answer)} of {len(call.meant)} bytes"
        assert told is not None
        if call.whole and not call.left and (told.reason, told.status) != (None, call.status):
            yield f"it got a whole answer, and the events say {told}"
        if not call.whole and not call.left and told.reason is None:
            yield f"its answer broke off ({call.broken}), and the events know no reason: {told}"

    def _lies_about_cancels(self) -> Iterator[str]:
        for cancelled in self.fleet.cancels:
            if cancelled.ran is Ran.NO and any(
                entry.boot_id == cancelled.boot_id for entry in self.entries.get(cancelled.invocation, ())
            ):
                yield f"{cancelled} says that it did not run there, and it did"


def tally(audit: Audit) -> Counter[str]:
    """What was seen: every kind of answer, refusal, start and way to end, by name."""
    seen: Counter[str] = Counter()
    for call in audit.calls:
        seen[_told(call)] += 1
        if call.whole and "fc-start" in call.headers:
            seen[f"start {call.headers['fc-start']}"] += 1
    for _, _, event in audit.fleet.events:
        match event:
            case InvocationEnded(reason=Reason.GUEST_FAILED) if "was lost while it ran" in event.message:
                seen["ended lost-after-commit"] += 1
            case InvocationEnded(client_left=True):
                seen["ended client-left"] += 1
            case InvocationEnded(reason=Reason.INTERNAL):
                seen["ended cut-short"] += 1
            case InvocationRefused() if "while the call waited there" in event.message:
                seen["placed again after a second sending met the first"] += 1
            case InvocationRefused():
                seen[f"placed again after {event.reason}"] += 1
            case _:
                seen[f"event {event.__struct_config__.tag}"] += 1
    seen.update(audit.fleet.fired)
    for cancelled in audit.fleet.cancels:
        seen[f"cancel says {cancelled.ran}"] += 1
    return seen


def _told(call: Call) -> str:
    if not call.sent:
        return "told refused-connection"
    if not call.status:
        return "told nothing"
    if "fc-error" in call.headers:
        return f"told {call.headers['fc-error']}"
    return "told whole-answer" if call.whole else "told part-of-answer"
