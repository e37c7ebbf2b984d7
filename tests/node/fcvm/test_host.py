"""A daemon's node: microVMs where they are possible, with what an earlier daemon left of them gone in any case."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from node.fcvm.rig import Double
from node.fcvm.test_node import Bench
from substrate_guest import isolation
from substrate_node.fcvm import FirecrackerVmm, MicroVmRules
from substrate_node.host import hosted_node
from substrate_node.images.store import locked
from substrate_node.vmm import VmmError
from substrate_seam.errors import GuestUnavailable
from substrate_seam.events import Event, OrphanRemoved, WarningRaised
from substrate_seam.invocation import Isolation
from substrate_seam.workload import Workload, WorkloadSpec


def settings(double: Double, root: Path, **changes: object) -> SimpleNamespace:
    """Of a node over the double."""
    rules = double.rules()
    usual = {
        "node_id": "n1",
        "arch": "amd64",
        "pod_uid": None,
        "state_root": root / "state",
        "memory_mib": 1024,
        "boot_within_s": 30.0,
        "audit_journal": None,
        "firecracker_bin": rules.firecracker,
        "kernel_image": rules.kernel,
        "kernel_initrd": None,
        "kernel_boot_args": "mine",
        "harness_init": "/init",
        "jailer": "off",
        "guest_oom_score_adj": 500,
    }
    return SimpleNamespace(**(usual | changes))


def hosted(node_settings: SimpleNamespace, events: list[Event]):
    """A node with these settings."""
    argv = isolation.argv()
    return hosted_node(node_settings, daemon="test", prefix="TEST_", guest_argv=argv, emit=events.append)


@pytest.fixture
def possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """KVM may be missing on the machine that tests; the double needs none."""
    monkeypatch.setattr(MicroVmRules, "possible", lambda _self: True)


def microvm(double: Double, **members: object) -> Workload:
    """A workload with a root file system."""
    return Workload.of(WorkloadSpec(name="vm", rootfs_path=str(double.rootfs()), memory_mib=16, vcpus=1, **members))


@pytest.mark.usefixtures("possible")
async def test_a_rootfs_gets_a_microvm_and_a_command_a_process(tmp_path: Path):
    """With the settings that the Go daemon had for them."""
    double, events = Double(tmp_path / "bin"), []
    async with hosted(settings(double, tmp_path), events) as host:
        assert isinstance(host.vmms[0], FirecrackerVmm)
        bench = Bench()
        bench.node = host.node
        work = microvm(double, guest="go-shim", ready_path="/")
        await host.node.ensure(work)
        reply, body = await bench.call(work)
        assert (body, reply.started.isolation) == (b"hello", Isolation.MICROVM)
        source = next(each["body"] for each in double.requests() if each["path"] == "/boot-source")
        assert source["boot_args"] == "mine init=/init"


@pytest.mark.usefixtures("possible")
async def test_what_an_earlier_daemon_left_is_told(tmp_path: Path):
    """Guests, and bases that can't be used any more."""
    double, events = Double(tmp_path / "bin"), []
    left = tmp_path / "state" / "run" / "inv-left"
    left.mkdir(parents=True)
    (left / "microvm").touch()
    for part in (tmp_path / "state", tmp_path / "state" / "run"):
        part.chmod(0o700)
    shelf = tmp_path / "state" / "bases" / "key"
    (shelf / "b1").mkdir(parents=True)
    (shelf / "current").symlink_to("b1")
    async with hosted(settings(double, tmp_path), events):
        assert [event.guest for event in events if isinstance(event, OrphanRemoved)] == ["inv-left"]
        (told,) = [event.message for event in events if isinstance(event, WarningRaised) and "base" in event.message]
        assert told.startswith("base b1 is removed: its manifest can't be read")
        assert not left.exists()


async def test_what_a_build_of_an_image_left_when_it_was_killed_is_gone_at_the_start(tmp_path: Path):
    """One that is still going on is left alone."""
    images = tmp_path / "state" / "images" / "sha256"
    for key in ("dead", "alive"):
        (images / f".building-{key}" / "half").mkdir(parents=True)
    (tmp_path / "state").chmod(0o700)
    with locked(images / ".lock-alive", waiting=None) as ours:
        assert ours
        async with hosted(settings(Double(tmp_path / "bin"), tmp_path), []):
            assert [path.name for path in images.glob(".building-*")] == [".building-alive"]


async def test_without_firecracker_a_rootfs_is_refused_and_leftovers_go_all_the_same(tmp_path: Path):
    """It says what to install."""
    double, events = Double(tmp_path / "bin"), []
    left = tmp_path / "state" / "run" / "inv-left"
    left.mkdir(parents=True, mode=0o700)
    (tmp_path / "state").chmod(0o700)
    (left / "microvm").touch()
    nowhere = settings(double, tmp_path, firecracker_bin=Path("/nowhere/firecracker"))
    async with hosted(nowhere, events) as host:
        assert [event.guest for event in events if isinstance(event, OrphanRemoved)] == ["inv-left"]
        with pytest.raises(GuestUnavailable, match="Firecracker and a guest kernel installed"):
            await host.node.ensure(microvm(double))


@pytest.mark.usefixtures("possible")
async def test_a_jail_that_was_asked_for_and_cannot_be_had_ends_the_start(tmp_path: Path):
    """Isolation is never less than what was asked for."""
    double = Double(tmp_path / "bin")
    double.jailer.unlink()
    with pytest.raises(VmmError, match="microVMs can't be jailed"):
        async with hosted(settings(double, tmp_path, jailer="on"), []):
            pytest.fail("it can't have started")
