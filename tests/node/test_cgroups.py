"""Control groups of guests, on a directory that looks like the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.procvm_rig import ProcessRig
from node.vmm_contract import NOBODY
from real_parts import needs
from substrate_guest import isolation
from substrate_node.processes.cgroups import ControlGroups, NoControlGroups
from substrate_node.procvm import ProcessVmm
from substrate_node.procvm.group import GuestGroup
from substrate_node.procvm.probe import MEMORY_BOUND
from substrate_node.vmm import Sample


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The mount of a kernel that offers everything."""
    root = tmp_path / "cgroup"
    root.mkdir()
    (root / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    return root


def contents(group: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in group.iterdir()}


def test_a_guest_is_held_in_a_group_of_its_own(root: Path):
    """Bounded in memory and tasks before its first process enters."""
    groups = ControlGroups.ready("ours", root=root)
    assert (root / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"
    assert (root / "ours" / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"
    groups.hold("g1", memory_mib=64, cpus=2)
    assert contents(root / "ours" / "g1") == {"memory.max": str(80 * 2**20), "pids.max": "2048"}
    groups.enter("g1", 4711)
    assert contents(root / "ours" / "g1")["cgroup.procs"] == "4711"


def test_the_most_that_a_guest_had_at_once_is_what_its_group_says(root: Path):
    """Whichever of its processes had it and whether they live; a kernel that keeps no such number tells nothing."""
    groups = ControlGroups.ready("ours", root=root)
    groups.hold("g1", memory_mib=64, cpus=2)
    group = GuestGroup(groups, "g1", memory_mib=64, cpus=2)
    read = Sample(cpu_ms=5.0, peak_mib=7.0)
    assert group.sampled(read) == read
    (root / "ours" / "g1" / "memory.peak").write_text(f"{100 * 2**20}\n")
    assert group.sampled(read) == Sample(cpu_ms=5.0, peak_mib=100.0)
    assert group.sampled(read, cloned=True) == Sample(cpu_ms=5.0, peak_mib=100.0)
    more = Sample(cpu_ms=5.0, peak_mib=117.0)
    assert group.sampled(more, cloned=True) == more, "what it has from its base is not in its group"
    assert GuestGroup(None, "g1", memory_mib=64, cpus=2).sampled(read) == read


def test_bounds_that_a_kernel_has_files_for_are_set(root: Path, monkeypatch: pytest.MonkeyPatch):
    """Swap, the whole group at once when memory is out, processors."""
    groups = ControlGroups.ready("ours", root=root)
    mkdir = Path.mkdir

    def with_files(path: Path, *args: object, **kwargs: object) -> None:
        mkdir(path, *args, **kwargs)  # type: ignore[arg-type]
        for file in ("memory.swap.max", "memory.oom.group", "cpu.max"):
            (path / file).touch()

    monkeypatch.setattr(Path, "mkdir", with_files)
    groups.hold("g1", memory_mib=64, cpus=2)
    found = contents(root / "ours" / "g1")
    assert (found["memory.swap.max"], found["memory.oom.group"], found["cpu.max"]) == ("0", "1", "200000 100000")


async def test_the_group_of_a_base_grows_with_the_clones_that_live_and_seldom(root: Path):
    """What they take before they are held stays with it; twice as many have room as there are."""
    groups = ControlGroups.ready("ours", root=root)
    groups.hold("base", memory_mib=64, cpus=1)
    group = GuestGroup(groups, "base", memory_mib=64, cpus=1)
    bounds_mib = []
    for clones in (1, 16, 17, 34):
        await group.make_room(clones)
        bounds_mib.append(int(contents(root / "ours" / "base")["memory.max"]) >> 20)
    assert bounds_mib == [64 + 16 * 17] * 2 + [64 + 16 * 35] * 2
    await GuestGroup(None, "base", memory_mib=64, cpus=1).make_room(1000)


def test_a_group_is_removed_with_what_runs_in_it_and_so_is_what_was_left(root: Path):
    """Twice is once."""
    groups = ControlGroups.ready("ours", root=root)
    (root / "ours" / "cgroup.subtree_control").unlink()
    for guest_id in ("g1", "g2"):
        (root / "ours" / guest_id).mkdir()
    groups.remove("g1")
    groups.remove("g1")
    assert [path.name for path in (root / "ours").iterdir()] == ["g2"]
    groups.sweep()
    groups.close()
    groups.close()
    assert not (root / "ours").exists()


@pytest.mark.parametrize(
    ("offered", "says"),
    [("cpu io", "does not offer memory and pids"), ("memory", "does not offer pids"), (None, "No such file")],
)
def test_without_what_it_takes_it_says_so(root: Path, offered: str | None, says: str):
    """And has made nothing."""
    if offered is None:
        (root / "cgroup.controllers").unlink()
    else:
        (root / "cgroup.controllers").write_text(offered)
    with pytest.raises(NoControlGroups, match=says):
        ControlGroups.ready("ours", root=root)
    assert not (root / "ours").exists()


@needs("user-namespaces", "pidfd")
async def test_the_report_says_whether_guests_have_groups(tmp_path: Path, root: Path):
    """With a kernel that offers them, every guest enters its own before its command runs."""
    rig = ProcessRig(tmp_path / "run")
    rig.vmm = ProcessVmm(rig.run, guest_argv=isolation.argv(), cgroup_root=tmp_path / "nothing")
    missing = {measure.name: measure for measure in (await rig.vmm.probe()).missing}
    assert "cgroup.controllers" in missing[MEMORY_BOUND].why_not
    assert "a guest may take what memory there is" in missing[MEMORY_BOUND].hint
    assert "systemd.unified_cgroup_hierarchy=1" in missing[MEMORY_BOUND].hint  # root is not all that it takes

    entered: list[tuple[str, int]] = []

    class Kernels(ControlGroups):
        """On a real file system of the kernel's, its files go with their directory."""

        def enter(self, guest_id: str, pid: int) -> None:
            super().enter(guest_id, pid)
            entered.append((guest_id, pid))

        def remove(self, guest_id: str) -> None:
            for file in (self._parent / guest_id).glob("*"):
                file.unlink()
            super().remove(guest_id)

    rig.vmm._groups = Kernels.ready("ours", root=root)
    guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    assert entered == [("g1", guest._launch.pid)]
    assert (root / "ours" / "g1" / "memory.max").exists()
    await rig.vmm.discard("g1")
    assert not (root / "ours" / "g1").exists()
