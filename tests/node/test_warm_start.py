"""Clones of primed process guests: what they take along, what they share with nobody, and that nothing is left."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
import uvloop

from node.procvm_rig import GUESTS, CloneRig, WarmRig, children, clone_rig, warm_rig, warm_workload
from node.vmm_contract import NOBODY, PROMISES, Promise, ask, until_ready
from real_parts import is_full, needs
from substrate_node.clones import FACTS, CannotVerify, verify_clones
from substrate_node.node import LocalNode, NodeIdentity
from substrate_node.procvm import clone as clone_module
from substrate_node.procvm import vmm as vmm_module
from substrate_node.procvm.inputs import Inputs
from substrate_node.procvm.wire import ZygoteWire
from substrate_node.ready import IdentityMint
from substrate_node.vmm import Base, BaseGone, Guest, NotCapturable, VmmError
from substrate_seam.events import BaseBuilt, BaseCondemned, Event, GuestParked, StartFailed, WarningRaised
from substrate_seam.invocation import Demands, GuestRequest, Invocation, Start
from substrate_seam.workload import Workload

HOST_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

pytestmark = needs("user-namespaces", "pidfd")


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[WarmRig]:
    async with warm_rig(tmp_path / "run") as rig:
        yield rig


@asynccontextmanager
async def clones(rig: WarmRig, *guest_ids: str, **members: object) -> AsyncIterator[list[Guest]]:
    """Clones of one base, alive at once; in the end there is neither."""
    base = await rig.captured("base", **members)
    try:
        yield [await rig.vmm.restore(warm_workload(**members), base, guest_id, NOBODY) for guest_id in guest_ids]
    finally:
        for guest_id in guest_ids:
            await rig.vmm.discard(guest_id)
        await rig.vmm.discard_base(base)


async def did(guest: Guest, code: str) -> str:
    """What comes of running an expression in a guest."""
    status, body = await ask(guest, "/eval/" + code.encode().hex())
    assert status == 200, code
    return body.decode()


def children_of(rig: WarmRig, base_id: str) -> list[int]:
    """The process that the clones of a base are made of, if it lives, and the clones."""
    first = rig.vmm._zygotes[base_id]._launch.pid
    try:
        return [int(pid) for pid in Path(f"/proc/{first}/task/{first}/children").read_text().split()]
    except FileNotFoundError:
        return []


def zygote_of(rig: WarmRig, base_id: str) -> int:
    """The process that the clones of a base are made of."""
    return children_of(rig, base_id)[0]


# What a clone is.


async def test_a_clone_is_as_isolated_as_a_guest_that_was_booted(rig: WarmRig):
    """The same view of files, processes, network and privileges, and a name of its own."""
    async with clones(rig, "c1") as (guest,):
        seen = json.loads((await ask(guest, "/see/etc/shadow"))[1])
        boot_id = await did(guest, "open('/proc/sys/kernel/random/boot_id').read()")
        assert await did(guest, "open('/etc/hostname').read()") == "c1\n"
        assert "localhost c1" in await did(guest, "open('/etc/hosts').read()")
    assert (seen["hostname"], seen["pids"], seen["interfaces"]) == ("c1", ["1"], ["lo"])
    assert seen["loopback"] == "True"
    assert set(seen["capabilities"]) == {"0" * 16}
    assert (seen["no_new_privs"], seen["core"]) == ("1", [0, 0])
    assert seen["unshare_user"] != 0
    assert seen["unshare_mount"] != 0
    assert [seen[call] for call in ("netdevices", "keys", "io_uring")] == ["PermissionError"] * 3
    assert [seen[place] for place in ("write_root", "write_usr", "write_here")] == ["Read-only file system"] * 3
    assert not seen["exists"]
    assert boot_id != HOST_BOOT_ID.read_text()  # noqa: ASYNC240  # nothing else goes on here


async def test_a_hundred_clones_have_nothing_in_common(tmp_path: Path):
    """Neither random numbers of any kind, nor names, nor the id of their boot; and all of them know the time."""
    async with warm_rig(tmp_path / "run") as rig, warm_node(rig) as (node, _):
        imports = "import random, uuid, ssl, tempfile; random.seed(1); uuid.uuid1(); tempfile.mktemp()"
        workload = warm_workload(env={"PRIME": imports}, memory_mib=64)
        report = await verify_clones(node, workload, clones=100, wall_ns=time.time_ns)
        assert report.good, str(report)
        assert (report.clones, set(report.shared)) == (100, set(FACTS))
        cold = warm_workload(name="cold", command=("python", "obedient.py"))
        with pytest.raises(CannotVerify, match="no warm start"):
            await verify_clones(node, cold, clones=1, wall_ns=time.time_ns)


async def test_a_clone_has_random_numbers_of_its_own_before_it_is_told_who_it_is(rig: WarmRig):
    """An application's startup runs that early, and generators that know nothing of forks are loaded by then."""
    prime = "import types\nseeds = []\nnumbers = sys.modules['numpy.random'] = types.ModuleType('numbers')\n"
    prime += "numbers.seed = seeds.append\n"
    async with clones(rig, "c1", "c2", env={"PRIME": prime}) as (one, other):
        assert "[[" in await did(one, "seeds")
        assert await did(one, "seeds") != await did(other, "seeds")


async def test_a_clone_finds_what_priming_left_in_memory_and_in_files(rig: WarmRig):
    """And what it does with it is its own affair."""
    prime = "import pathlib\nkept = []\nhere = pathlib.Path('/tmp/primed'); here.write_text('kept')\n"
    prime += "deep = pathlib.Path.home() / 'a' / 'b'; deep.mkdir(parents=True); (deep / 'l').symlink_to('/tmp/primed')"
    async with clones(rig, "c1", "c2", env={"PRIME": prime}) as (one, other):
        assert await did(one, "here.write_text('changed')") == "7"
        assert await did(one, "kept.append(1)") == "None"
        assert await did(one, "(deep / 'l').read_text() + str(kept)") == "changed[1]"
        assert await did(other, "(deep / 'l').read_text() + str(kept)") == "kept[]"
        assert await did(other, "oct(pathlib.Path('/tmp').stat().st_mode)") == "0o41777"


async def test_a_workload_that_lies_below_tmp_is_seen_by_its_clones(rig: WarmRig, tmp_path: Path):
    """Although each has a /tmp of its own."""
    place = tmp_path / "place"
    shutil.copytree(GUESTS, place)
    for directory in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        directory.chmod(directory.stat().st_mode | 0o055)
    async with clones(rig, "c1", path=str(place)) as (guest,):
        assert await did(guest, "os.getcwd()") == str(place)
        assert "warm.py" in await did(guest, "os.listdir('.')")
        assert await did(guest, "sorted(os.listdir('/tmp'))") != "[]"


async def test_a_clone_does_not_see_where_its_file_tree_was_put_together(rig: WarmRig):
    """What it may write is found in its usual places alone, and the files that say who it is can't be written to."""
    async with clones(rig, "a") as [guest]:
        assert await did(guest, "__import__('os').listdir('/mnt/stage')") == "[]"
        assert await did(guest, "__import__('os').access('/mnt/stage', __import__('os').W_OK)") == "False"


async def test_each_clone_has_its_own_place_in_a_file_that_priming_opened(rig: WarmRig):
    """A descriptor that is inherited has one position for all; theirs are opened anew."""
    async with clones(rig, "c1", "c2", env={"PRIME": "source = open('warm.py'); source.readline()"}) as (one, other):
        assert await did(one, "os.lseek(source.fileno(), 7, 0)") == "7"
        assert await did(other, "os.lseek(source.fileno(), 0, 1) != 7") == "True"


async def test_the_c_library_of_a_clone_knows_the_id_of_its_thread(rig: WarmRig):
    """Else a second thread could get the id that is noted for the first, and both would own the same locks."""
    noted = "ctypes.c_int.from_address(thread_id_address()).value, ctypes.CDLL(None).gettid(), os.getpid()"
    prime = "import ctypes\nfrom substrate_guest.syscalls import thread_id_address"
    async with clones(rig, "c1", env={"PRIME": prime}) as (guest,):
        assert await did(guest, noted) == "(1, 1, 1)"


# What can't be cloned.


@pytest.mark.parametrize(
    ("prime", "says"),
    [
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(600,), name='poller').start()", "poller"),
        ("import subprocess; kept = subprocess.Popen(['sleep', '600'])", "1 child processes (sleep)"),
        ("kept = open('/tmp/log', 'w')", "/tmp/log"),
        ("import socket; kept = socket.socketpair()", "2 open descriptors"),
        ("import mmap; kept = mmap.mmap(-1, 4096)", "shared memory"),
    ],
)
async def test_what_clones_would_share_is_refused_by_name(rig: WarmRig, prime: str, says: str):
    """And nothing is left of the attempt."""
    with pytest.raises(NotCapturable) as refusal:
        await rig.captured("base", env={"PRIME": prime})
    assert says in str(refusal.value)
    assert "'warm' can't be captured and starts cold" in str(refusal.value)
    await rig.vmm.discard_base(Base(base_id="base", input_key="k"))


async def test_a_workload_that_fails_to_prime_is_no_base(rig: WarmRig):
    """Whoever asks whether it is ready hears why, and its end is told."""
    failing = warm_workload(env={"PRIME": "1 / 0"})
    source = await rig.vmm.boot(failing, "s", NOBODY, to_capture=True)
    async with asyncio.timeout(20):
        assert (await asyncio.shield(source.exited)).words == "exit status 1"
    with pytest.raises(VmmError, match="is gone"):
        await rig.vmm.capture(failing, source, "base")
    await rig.vmm.discard("s")


async def test_what_has_a_warm_start_is_served_by_our_shim_and_asked_in_our_way(rig: WarmRig):
    """Other commands, and ready paths that only answer once requests are served, start cold."""
    assert await rig.vmm.input_key(warm_workload())
    for members in ({"command": ("python", "obedient.py")}, {"ready_path": "/health"}):
        assert await rig.vmm.input_key(warm_workload(**members)) is None
    guest = await rig.vmm.boot(warm_workload(), "g", NOBODY)
    with pytest.raises(VmmError, match="none that could become a base"):
        await rig.vmm.capture(warm_workload(name="other", command=("true",)), guest, "b")
    await rig.vmm.discard("g")


async def test_a_kernel_that_tells_of_no_children_has_no_warm_start_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Guests start cold there, instead of failing at every capture."""
    monkeypatch.setattr(vmm_module, "_CHILDREN_TOLD", tmp_path / "children")
    rig = WarmRig(tmp_path / "run")
    missing = {measure.name: measure.why_not for measure in (await rig.vmm.probe()).missing}
    assert "CONFIG_PROC_CHILDREN" in missing["warm-start"]
    assert await rig.vmm.input_key(warm_workload()) is None
    await rig.vmm.aclose()


# What a base is made of.


def test_an_input_key_tells_contents_and_nothing_else(tmp_path: Path):
    """Names, contents, links and what may be run; not when it was written, nor what Python compiled of it."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.py").write_text("1")

    def key(**changed: Any) -> str:
        members = {"interpreter": sys.executable, "argv": ["x"], "env": {"A": "1"}, "memory_mib": 64}
        return inputs.key(str(tmp_path), **{**members, **changed})

    inputs = Inputs()
    first = key()
    os.utime(tmp_path / "sub" / "a.py", (1, 1))
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_text("x")
    assert (
        key()
        == first
        == Inputs().key(str(tmp_path), interpreter=sys.executable, argv=["x"], env={"A": "1"}, memory_mib=64)
    )
    seen = {first, key(argv=["y"]), key(env={"A": "2"}), key(memory_mib=65), key(interpreter="/bin/sh")}
    (tmp_path / "sub" / "a.py").write_text("2")
    seen.add(key())
    (tmp_path / "sub" / "a.py").chmod(0o755)
    seen.add(key())
    (tmp_path / "sub" / "b").symlink_to("a.py")
    seen.add(key())
    (tmp_path / "empty").mkdir()
    seen.add(key())
    assert len(seen) == 9


async def test_what_changed_while_it_was_primed_becomes_no_base(rig: WarmRig, tmp_path: Path):
    """The key would belong to files that the process has not seen."""
    place = tmp_path / "place"
    shutil.copytree(GUESTS, place)
    for directory in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        directory.chmod(directory.stat().st_mode | 0o055)
    workload = warm_workload(path=str(place))
    source = await rig.vmm.boot(workload, "s", NOBODY, to_capture=True)
    await until_ready(source)
    (place / "more.py").write_text("")
    with pytest.raises(VmmError, match="changed while"):
        await rig.vmm.capture(workload, source, "b")
    await rig.vmm.discard("s")


# How it ends.


async def test_clones_outlive_their_zygote_and_a_dead_one_is_told_at_once(rig: WarmRig):
    """SIGKILL takes the process that is cloned, and nothing that was."""
    base = await rig.captured("base")
    clone = await rig.vmm.restore(rig.workload, base, "c1", NOBODY)
    assert await ask(clone, "/") == (200, b"hello")
    os.kill(zygote_of(rig, "base"), signal.SIGKILL)
    async with asyncio.timeout(20):
        while not rig.vmm._zygotes["base"].wire.lost:  # noqa: ASYNC110  # of which nobody else is told
            await asyncio.sleep(0.001)
    with pytest.raises(BaseGone):
        await rig.vmm.restore(rig.workload, base, "c3", NOBODY)
    assert await ask(clone, "/") == (200, b"hello")
    assert await ask(clone, "/exit/3") == (0, b"")
    assert (await asyncio.wait_for(asyncio.shield(clone.exited), 10)).words == "exit status 3"
    await rig.vmm.discard("c1")
    await rig.vmm.discard_base(base)


async def test_the_end_of_its_first_process_is_the_end_of_every_clone(rig: WarmRig):
    """Which the kernel sees to; each of them is told."""
    base = await rig.captured("base")
    guests = [await rig.vmm.restore(rig.workload, base, f"c{number}", NOBODY) for number in range(3)]
    os.kill(rig.vmm._zygotes["base"]._launch.pid or 0, signal.SIGKILL)
    for guest in guests:
        assert (await asyncio.wait_for(asyncio.shield(guest.exited), 10)).words == "an end that nobody was left to see"
        await rig.vmm.discard(guest.guest_id)
    await rig.vmm.discard_base(base)


async def test_a_zygote_that_answers_no_more_is_given_up(rig: WarmRig, monkeypatch: pytest.MonkeyPatch):
    """It may hang in what its workload made of it; what was ordered of it is undone."""
    monkeypatch.setattr(clone_module, "_ANSWERS_WITHIN_S", 0.2)
    base = await rig.captured("base")
    os.kill(zygote_of(rig, "base"), signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await rig.vmm.restore(rig.workload, base, "c1", NOBODY)
    await rig.vmm.discard("c1")
    with pytest.raises(BaseGone):
        await rig.vmm.restore(rig.workload, base, "c2", NOBODY)
    await rig.vmm.discard_base(base)


@pytest.mark.parametrize(
    "says",
    [b"nonsense", b"{}", b'{"captured": true}', b'{"cloned": "c9", "pid": 1}', b'{"cloned": "c1", "pid": 1}'],
)
async def test_a_zygote_that_says_what_nobody_asked_is_given_up(says: bytes):
    """It may be anything by now: an answer names an order and shows the clone. What else comes along is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    wire, born, descriptor = ZygoteWire(ours), [], os.open(os.devnull, os.O_RDONLY)
    theirs.send(b'{"captured": true}')
    await wire.capture()
    answer = await wire.order("c1", "boot id", [descriptor], on_born=born.append)
    socket.send_fds(theirs, [says], [descriptor])
    with pytest.raises(BaseGone, match="made no sense"):
        await asyncio.wait_for(answer, 10)
    assert wire.lost
    assert not born
    wire.close()
    theirs.close()
    os.close(descriptor)


async def test_a_zygote_whose_end_is_not_heard_yet_is_gone_all_the_same():
    """An order can find that out first; taken for a failed restore, it would leave the dead base in place."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    wire = ZygoteWire(ours)
    theirs.close()
    with pytest.raises(BaseGone):
        await wire.order("c1", "boot id", [], on_born=lambda _: None)
    wire.close()


@pytest.mark.parametrize("seed", range(20 if is_full() else 4))
async def test_a_zygote_killed_while_it_is_cloned_leaves_no_clone_behind(rig: WarmRig, seed: int):
    """Even one that was forked and not told of."""
    dice = Random(seed)
    base = await rig.captured("base")
    victim = zygote_of(rig, "base")
    loop = asyncio.get_running_loop()
    loop.call_later(dice.random() * 0.03, os.kill, victim, signal.SIGKILL)
    restored = [loop.create_task(rig.vmm.restore(rig.workload, base, f"c{n}", NOBODY)) for n in range(12)]
    outcomes = [await asyncio.wait({task}) and task.exception() for task in restored]
    assert all(error is None or isinstance(error, VmmError) for error in outcomes)
    for number in range(12):
        await rig.vmm.discard(f"c{number}")
    await rig.vmm.discard_base(base)


@pytest.mark.parametrize("passes", [0, 1, 2, 3, 5, 8, 30])
async def test_a_capture_given_up_leaves_nothing(rig: WarmRig, passes: int):
    """Discarding the guest and the base that it was to become undoes it, at whatever point."""
    source = await rig.vmm.boot(rig.workload, "s", NOBODY, to_capture=True)
    await until_ready(source)
    capture = asyncio.get_running_loop().create_task(rig.vmm.capture(rig.workload, source, "b"))
    for _ in range(passes):
        await asyncio.sleep(0)
    capture.cancel()
    with suppress(asyncio.CancelledError):
        await capture
    await rig.vmm.discard("s")
    await rig.vmm.discard_base(Base(base_id="b", input_key=await rig.vmm.input_key(rig.workload) or ""))
    assert not rig.left()


@pytest.mark.parametrize("promise", PROMISES[:12], ids=lambda promise: promise.__name__)
def test_clones_keep_the_contract_on_uvloop(tmp_path: Path, promise: Promise):
    """The loop of production watches descriptors and makes transports in its own way."""

    async def main() -> None:
        async with clone_rig(tmp_path / "run") as rig:
            await asyncio.wait_for(promise(rig), 60)

    before = children()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    assert not children() - before


# In a node.


@asynccontextmanager
async def warm_node(rig: WarmRig) -> AsyncIterator[tuple[LocalNode, list[Event]]]:
    """A node over the rig's monitor, and what it says."""
    events: list[Event] = []
    mint = IdentityMint(wall_ns=time.time_ns, entropy=os.urandom)
    identity = NodeIdentity(node_id="n1", boot_id="b1", arch="amd64")
    async with LocalNode(identity, vmms=[rig.vmm], memory_mib=2048, mint=mint, emit=events.append) as node:
        yield node, events
    await rig.vmm.aclose()


async def called(
    node: LocalNode, workload: Workload, target: str = "/", *, least: Start = Start.COLD
) -> tuple[Start, str]:
    """One call: how it started, and its reply."""
    invocation = Invocation(
        id=os.urandom(16).hex(),
        attempt=1,
        workload=workload.ref,
        session=None,
        caller="alice",
        demands=Demands(start=least),
        request=GuestRequest(method="GET", target=target, headers=(), body=b""),
        start_within_s=30.0,
        run_within_s=30.0,
    )
    async with node.invoke(invocation) as reply:
        return reply.started.start, b"".join([piece async for piece in reply.body]).decode()


async def until(condition: Callable[[], object]) -> None:
    """Wait until something else has come about; a node can be asked, and tells of every change."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  # several sources, of which none is worth an event for a test
            await asyncio.sleep(0.01)


def based(node: LocalNode, workload: Workload) -> str | None:
    """The base of a workload that the node reports."""
    return node.report().workloads[workload.digest].base


async def test_calls_start_from_the_base_and_when_its_process_dies_from_another(rig: WarmRig):
    """The first call after the death starts cold; what comes later does not, once there is a new base."""
    async with warm_node(rig) as (node, events):
        workload = warm_workload()
        await node.ensure(workload)
        assert (await called(node, workload))[1] == "hello"
        await until(lambda: based(node, workload))
        first = based(node, workload)
        assert await called(node, workload) == (Start.WARM, "hello")
        os.kill(zygote_of(rig, first or ""), signal.SIGKILL)
        assert (await called(node, workload))[1] == "hello"
        await until(lambda: based(node, workload) != first)
        assert await called(node, workload, least=Start.WARM) == (Start.WARM, "hello")
    assert len([event for event in events if isinstance(event, BaseBuilt)]) == 2
    assert len([event for event in events if isinstance(event, BaseCondemned)]) <= 1


async def test_a_workload_that_cannot_be_captured_starts_cold_and_is_parked_all_the_same(rig: WarmRig):
    """An operator hears why, by the name of the thread, once."""
    prime = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), name='poller').start()"
    async with warm_node(rig) as (node, events):
        workload = warm_workload(env={"PRIME": prime}, pool=1)
        await node.ensure(workload)
        await until(lambda: any(isinstance(event, GuestParked) for event in events))
        assert (await called(node, workload))[0] is Start.POOL
        warnings = [event.message for event in events if isinstance(event, WarningRaised)]
        assert [message for message in warnings if "poller" in message] == warnings
        assert len(warnings) == 1
        assert based(node, workload) is None


async def test_ensuring_a_workload_again_takes_up_what_changed_in_its_files(rig: WarmRig, tmp_path: Path):
    """The next call runs the new code, and soon from a base of it."""
    place = tmp_path / "place"
    place.mkdir()
    for directory in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        directory.chmod(directory.stat().st_mode | 0o055)
    source = "from substrate_guest import App\napp = App(lambda request: '{}')\n"
    (place / "said.py").write_text(source.format("before"))
    command = ("python", "-m", "substrate_guest", "serve", "said:app")
    workload = warm_workload(path=str(place), command=command, pool=1)
    async with warm_node(rig) as (node, _):
        await node.ensure(workload)
        await until(lambda: node.report().workloads[workload.digest].parked)
        first = based(node, workload)
        await node.ensure(workload)
        assert based(node, workload) == first, "nothing has changed"
        (place / "said.py").write_text(source.format("after"))
        await node.ensure(workload)
        assert (await called(node, workload))[1] == "after"
        await until(lambda: node.report().workloads[workload.digest].parked)
        assert await called(node, workload) == (Start.POOL, "after")
        assert based(node, workload) != first


@pytest.mark.parametrize("seed", range(20 if is_full() else 2))
async def test_killing_zygotes_and_clones_never_tells_a_caller_a_lie(rig: WarmRig, seed: int):
    """Every call is answered or fails as a death would have it; nothing is left, and calls work afterwards."""
    dice = Random(seed)
    async with warm_node(rig) as (node, events):
        workload = warm_workload(memory_mib=64)
        await node.ensure(workload)
        await until(lambda: based(node, workload))
        stop = asyncio.Event()

        async def kill() -> None:
            while not stop.is_set():
                await asyncio.sleep(dice.random() * 0.15)
                if victims := [pid for base_id in rig.vmm._zygotes for pid in children_of(rig, base_id)]:
                    with suppress(ProcessLookupError):
                        os.kill(dice.choice(victims), signal.SIGKILL)

        answers: list[object] = []

        async def keep_calling() -> None:
            for _ in range(8):
                try:
                    answers.append((await called(node, workload))[1])
                except Exception as error:  # noqa: BLE001  # told below
                    answers.append(error)

        async with asyncio.TaskGroup() as tasks:
            killer = tasks.create_task(kill())
            callers = [tasks.create_task(keep_calling()) for _ in range(3)]
            await asyncio.wait(callers)
            stop.set()
            await killer
        assert len(answers) == 24
        assert all(answer == "hello" or getattr(answer, "reason", None) == "guest-failed" for answer in answers), (
            answers
        )
        assert (await called(node, workload))[1] == "hello"
    assert not [event for event in events if isinstance(event, StartFailed) and "Traceback" in event.message]


def test_the_rig_of_clones_has_a_base(tmp_path: Path):
    """It must not look as if there was nothing to leave."""

    async def main() -> None:
        async with clone_rig(tmp_path / "run") as rig:
            assert isinstance(rig, CloneRig)
            assert WarmRig.left(rig)

    asyncio.run(main())
