"""A whole daemon with microVMs over the double, killed wherever it is, and what its successor makes of the rest."""

import asyncio
import signal
from pathlib import Path
from random import Random
from typing import Any

import pytest

from e2e.system import System, system, until
from e2e.test_lives import refused_or_cut
from node.fcvm.rig import Double
from node.fcvm.test_node import processes_of
from real_parts import is_full, needs

DAEMON = Path(__file__).with_name("over_doubles.py")
HANGS_IN = {
    "boot": ["PUT /machine-config", "PUT /boot-source", "PUT /drives/rootfs", "PUT /vsock", "PUT /actions"],
    "capture": ["PATCH /vm", "PUT /snapshot/create"],
    "restore": ["PUT /snapshot/load"],
}
"""Calls of Firecracker's API that a machine never answers, so that the daemon is killed in the middle of them."""
STAGES = [*HANGS_IN, "parked", "exchange"]
WORKLOADS = ("one", "two")

pytestmark = needs("pidfd")


def place(stage: str, dice: Random) -> list[dict[str, Any]]:
    """What the double is to do so that the daemon stops in this stage: with its first machine there, or the second."""
    if stage not in HANGS_IN:
        return []
    on, after = dice.choice(HANGS_IN[stage]), dice.random() < 0.5
    passes = {"on": on, "after": after, "do": "sleep", "seconds": 0, "times": dice.randint(0, 1)}
    return [passes, {"on": on, "after": after, "do": "hang", "times": 1}]


def reached(stage: str, running: System, double: Double) -> bool:
    """Whether the daemon is in this stage."""
    if stage in HANGS_IN:
        return (double.root / "double.json.used-1-0").exists()
    if stage == "parked":
        return len(running.node.seen("guest.parked")) >= len(WORKLOADS)
    return bool(running.journal()) and len(good_bases(running)) == len(WORKLOADS)


def good_bases(running: System) -> set[Path]:
    """Those that are published."""
    return {link.resolve() for link in (running.state_root / "bases").glob("*/current")}


@pytest.mark.parametrize(
    ("seed", "jail"),
    [
        pytest.param(seed, jail, marks=needs("root") if jail == "on" else ())
        for seed in range(20 if is_full() else len(STAGES))
        for jail in (("off", "on") if is_full() else ("on" if seed % 2 else "off",))
    ],
)
async def test_a_daemon_killed_with_microvms_leaves_good_bases_and_nothing_else(seed: int, jail: str, tmp_path: Path):
    """Under load, in every stage of a machine's life: machines go, half-made bases too, finished ones start warm."""
    dice, stage = Random(seed), STAGES[seed % len(STAGES)]
    double = Double(tmp_path / "bin")
    rules = double.rules()
    table = {name: vm(double.told(f"{name}.ext4")) for name in WORKLOADS}
    settings = {
        "FIRECRACKER_BIN": str(rules.firecracker),
        "KERNEL_IMAGE": str(rules.kernel),
        "JAILER": jail,
        "BOOT_READY_TIMEOUT": "60s",
    }
    double.set(*place(stage, dice))
    async with system("single", tmp_path, table, daemon=DAEMON, **settings) as running, asyncio.TaskGroup() as calls:
        if stage in {"boot", "exchange"}:
            for number in range(4):
                calls.create_task(refused_or_cut(running, f"{WORKLOADS[number % 2]}?after_s=60"))
        await until(lambda: reached(stage, running, double), within_s=60.0)
        await asyncio.sleep(dice.random() * 0.05)
        alive = processes_of(double.root)
        running.node.signal(signal.SIGKILL)
        await running.node.ended()
    run, bases = running.state_root / "run", running.state_root / "bases"
    left = set(run.iterdir())
    assert alive
    assert left
    good = good_bases(running)
    assert stage in HANGS_IN or len(good) == len(WORKLOADS)
    assert stage != "capture" or list(bases.glob("*/.*")), "no base is half-made"
    assert len(running.journal()) == len(set(running.journal()))

    double.set()
    boots = double.calls().count("PUT /boot-source")
    async with system("single", tmp_path, table, daemon=DAEMON, **settings) as following:
        assert not set(alive) & set(processes_of(double.root))
        assert not left & set(run.iterdir())
        node = following.node
        await until(lambda: len(node.seen("base.adopted") + node.seen("base.built")) == len(WORKLOADS), within_s=60.0)
        assert {event["base"] for event in node.seen("base.adopted")} == {base.name for base in good}
        assert double.calls().count("PUT /boot-source") - boots == len(WORKLOADS) - len(good)
        for name in WORKLOADS:
            reply = await following.invoke(name, body=b"again", headers={"fc-require-start": "warm"})
            assert (reply.status_code, reply.content) == (200, b"again"), reply.text
            assert reply.headers["fc-isolation"] == ("microvm-jailed" if jail == "on" else "microvm")
        await following.at_rest(parked=len(WORKLOADS))
        assert len([base for base in bases.glob("*/*") if not base.is_symlink()]) == len(WORKLOADS)
        node.signal(signal.SIGTERM)
        assert await node.ended() == 0
    assert not processes_of(double.root)
    assert not list(run.iterdir())
    assert not [path for path in running.state_root.rglob("*") if path.is_socket()]
    assert not [group for group in double.cgroups.glob("*/*") if group.is_dir()]


def vm(rootfs: Path) -> dict[str, object]:
    """A workload whose guests do as they are told, with a base and a guest that stands ready."""
    return {"rootfsPath": str(rootfs), "guest": "substrate", "memMib": 32, "vcpus": 1, "warmBase": True, "pool": 1}
