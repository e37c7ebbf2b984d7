"""The scenarios, by name, each with what it needs of the machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from bench.results import Outcome


class Size(Struct, frozen=True):
    """How much a run does: alternating repeats, and calls of each burst (at most `POOL`, where guests are parked)."""

    repeats: int = 15
    calls: int = 1000
    streams: int = 1000
    workloads: int = 1000
    waiting: int = 10_000
    clones: int = 100
    large_replies: int = 3


class Scenario(Struct, frozen=True):
    """One comparison. `run` gets an empty directory of its own."""

    name: str
    run: Callable[[Path, Size], Outcome]
    programs: tuple[str, ...] = ()


def all_scenarios() -> dict[str, Scenario]:
    """Every scenario, in the order in which they are run."""
    from bench.scenarios import exchange, fresh, parked, reply, restore_microvm, scale, split, streams

    modules = (exchange, fresh, parked, split, reply, streams, scale, restore_microvm)
    return {module.SCENARIO.name: module.SCENARIO for module in modules}
