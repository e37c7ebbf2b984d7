"""Whatever happens to the whole system, nobody is lied to, nothing runs twice, and nothing is left."""

import json
import os
import re
import subprocess
import sys
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fakes.vmm import At
from real_parts import SEEDS_PLAIN, simulation_seeds
from simulation.callers import MANNERS
from simulation.fleet import Fleet
from simulation.play import Lived, live, live_through
from simulation.scenarios import THEMES
from substrate_cluster.admission import Admission
from substrate_cluster.ingress import headers
from substrate_cluster.ingress.exchange import Exchange as FrontExchange
from substrate_cluster.ingress.exchange import HangUpWatch
from substrate_cluster.nodes.remote import RemoteInvoking
from substrate_cluster.placement import executor as placing
from substrate_node.calls import Calls
from substrate_node.holding import Holding
from substrate_node.invoker import Claim
from substrate_node.ledger import Lease, Ledger
from substrate_node.node import LocalNode
from substrate_node.pool import Pool
from substrate_node.reaper import Reaper
from substrate_node.slots import Slots
from substrate_node.vmm import VmmError
from substrate_node.vsockhttp import Exchange as GuestExchange
from substrate_seam.errors import Ran, Reason, SubstrateError
from substrate_seam.events import InvocationEnded

TESTS = Path(__file__).parents[1]

NEVER_TOLD = {Reason.DUPLICATE, Reason.INTERNAL, Reason.UNKNOWN_DIGEST}
"""The first is told as another; the second would be a defect; the third, placement sees to before it is told."""
MUST_BE_SEEN = {
    *(f"told {reason}" for reason in Reason if reason not in NEVER_TOLD),
    *("told whole-answer", "told part-of-answer", "told nothing", "told refused-connection"),
    *("ended client-left", "ended cut-short", "ended lost-after-commit"),
    *("placed again after node-unreachable", "placed again after unknown-digest"),
    "placed again after a second sending met the first",
    *("start cold", "start warm", "start pool", "cancel says no", "cancel says maybe"),
    *("event base.adopted", "event base.condemned", "event cleanup.failed", "event cleanup.late", "event guest.parked"),
    *(f"fault {at}" for at in At),
    *(f"theme {theme}" for theme in THEMES),
    *(f"manner {manner}" for manner in MANNERS),
    *("machines 0", "machines 1", "machines 3"),
}


def test_whatever_happens_every_caller_is_told_the_truth_and_nothing_is_left():
    """Callers of every manner, accidents at every place; and each kind of answer really came about."""
    seeds = simulation_seeds()
    lived = in_many_processes(seeds) if len(seeds) > 1 else live_through(seeds)  # one is for a debugger
    seen = lived.seen
    print(*(f"{count:8} {what}" for what, count in sorted(seen.items())), sep="\n")  # noqa: T201  # if it fails
    assert not lived.failures, "\n\n".join(lived.failures)
    if len(seeds) >= SEEDS_PLAIN:
        assert not (missing := MUST_BE_SEEN - seen.keys()), f"never seen: {sorted(missing)}"
        told = sum(count for what, count in seen.items() if what.startswith("told "))
        assert seen["told whole-answer"] > told / 3


def in_many_processes(seeds: range) -> Lived:
    """Live through the seeds with every processor there is."""
    shares = os.cpu_count() or 1
    program = [sys.executable, "-W", "error", "-m", "simulation.play"]
    ranges = [[str(seeds.start + share), str(seeds.stop), str(shares)] for share in range(shares)]
    lives = [subprocess.Popen([*program, *each], cwd=TESTS, stdout=subprocess.PIPE) for each in ranges]
    lived = Lived(Counter(), [], [])
    for each in lives:
        said, _ = each.communicate()
        assert each.returncode == 0
        seen, traces, failures = json.loads(said)
        lived.seen.update(seen)
        lived.traces.extend(traces)
        lived.failures.extend(failures)
    return lived


def test_a_seed_of_the_whole_system_replays_exactly_also_in_another_process():
    """The same callbacks in the same order at the same times, and the same answers."""
    seeds = range(4)
    here, again, there = live_through(seeds), live_through(seeds), in_many_processes(seeds)
    assert here == again
    assert here.seen == there.seen
    assert sorted(here.traces) == sorted(there.traces)
    assert len(set(here.traces)) == len(seeds)


def _told_as_not_run(self: RemoteInvoking, error: Exception) -> SubstrateError:
    return self._node.unreachable(str(error))


def _ended_as_if_whole(self: FrontExchange, error: SubstrateError, fail: Any = FrontExchange.fail) -> Any:
    return self.end() if self.status and not self.complete else fail(self, error)


async def _first_piece_alone(self: FrontExchange, body: bytes, piece: Any = FrontExchange.piece) -> None:
    if not self.body_bytes:
        await piece(self, body)


def _told_only_of_success(self: Fleet, event: Any, emit: Any = Fleet.emit) -> None:
    if not (isinstance(event, InvocationEnded) and event.reason):
        emit(self, event)


def _lined_up_regardless(self: Slots[Any], queue: Any, ticket: Any) -> None:
    queue.waiting += 1
    queue.lines.setdefault(ticket.caller, {})[ticket] = None


def _taken_and_left(self: Pool, digest: str) -> Any:
    bay = self._bays.get(digest)
    return next(iter(bay.parked)) if bay is not None and bay.parked else None


def _leased_anyway(self: Ledger, mib: int) -> Lease:
    return Lease(self, mib)


async def _tried_once(self: Reaper, step: Any, *, what: str) -> None:
    with suppress(VmmError):
        await step()


def _ignored(*_: object) -> None:
    """What is called in vain."""


async def _nothing(*_: object, **__: object) -> None:
    """Do nothing."""


class Plant(NamedTuple):
    """A defect: in the theme it shows, what the audit must say of it, and what replaces `name` of `where`."""

    theme: str
    said: str
    where: object
    name: str
    instead: object


PLANTED = {
    "a break after the commit is told as if nothing ran": Plant(
        "wires_break", "says that it did not run|ran 2 times", RemoteInvoking, "_lost", _told_as_not_run
    ),
    "a guest that failed is asked again": Plant(
        "exchanges_fail", "ran [23] times", placing, "GuestUnavailable", SubstrateError
    ),
    "a reply that broke is ended like a whole one": Plant(
        "exchanges_fail", "looks whole", FrontExchange, "fail", _ended_as_if_whole
    ),
    "a piece of an answer is lost": Plant("calm", "looks whole", FrontExchange, "piece", _first_piece_alone),
    "memory is not given back": Plant("calm", "MiB", Lease, "release", lambda _lease: None),
    "a guest is not ended": Plant("calm", "guest inv-", Holding, "end_at_once", lambda _holding: True),
    "a place of a caller is not given back": Plant(
        "calm", "calls of .* admitted", Admission, "_leave", lambda _admission, _caller, _bytes: None
    ),
    "a failure ends without an event": Plant(
        "exchanges_fail", r"was accepted 1 times: \[\]", Fleet, "emit", _told_only_of_success
    ),
    "a cancelled id starts all the same": Plant(
        "cancels", "says that it did not run there", Calls, "fence", lambda _calls, _id: Ran.NO
    ),
    "a guest may take for ever": Plant(
        "exchanges_fail", "ran for", GuestExchange, "bound", lambda _exchange, _seconds, *, on_expiry: on_expiry
    ),
    "a session runs two calls at once": Plant("calm", "at once", Slots, "_line_up", _lined_up_regardless),
    "a guest is given to two calls": Plant("calm", "no reason", Pool, "take", _taken_and_left),
    "guests take more memory than there is": Plant(
        "memory_is_short", "Overcommitted", Ledger, "reserve", _leased_anyway
    ),
    "a clean-up that fails is not tried again": Plant(
        "cleaning_fails", "discard|kill|MiB", Reaper, "insist", _tried_once
    ),
    "a drain does not end calls": Plant("drains", "outlived the drain", LocalNode, "_end_calls", lambda _node: None),
    "an error tells nothing of its guest": Plant(
        "exchanges_fail", "tells nothing of its guest", Claim, "_mark", lambda _claim, _error: None
    ),
    "a guest's fields pass for ours": Plant("calm", "internal was told", headers, "_NEVER_OUT_PREFIXES", (b"proxy-",)),
    "a caller's hang-up is not noticed": Plant(
        "rude_callers", "after its caller", HangUpWatch, "fire", lambda _watch: None
    ),
}


@pytest.mark.parametrize("defect", PLANTED)
def test_a_planted_defect_is_found_out(defect: str, monkeypatch: pytest.MonkeyPatch):
    """The audit is worth something: each of these is found within a few seeds."""
    plant = PLANTED[defect]
    monkeypatch.setattr(plant.where, plant.name, plant.instead)
    found = []
    for seed in range(SEEDS_PLAIN // 10):
        try:
            live(seed, plant.theme)
        except Exception as failure:  # noqa: BLE001  # whatever it broke, the story must tell
            found.append("".join(traceback.format_exception(failure)))
            if re.search(plant.said, found[-1]):
                return
    pytest.fail("\n".join(["it was not found out, but this was:", *found[:1]]))
