"""The promises of a node once more, on real monitors: those that hold whatever the clock of a real machine does.

The others stay with the monitor in memory, whose time is virtual, and that for four reasons:

- They measure: that a piece comes within a tenth of a second, that a call is refused, cut, cancelled, drained or given
  back within a moment, that a base is there after five seconds. In virtual time that is exact; here it would be chance.
- They wait for minutes, as for what is forgotten or remembered.
- They plan an accident at a stage of an exchange where no guest of ours can be stopped: between CONNECT and its answer,
  within a head, with bytes that it would never say. Accidents of the real monitors themselves, of Firecracker's calls,
  of its vsock, of a guest that dies, are planned in `node/fcvm/test_node.py`, `node/fcvm/test_microvm.py` and
  `e2e/test_killed_microvms.py`.
- They speak of reports, limits and sessions, which the node decides alone.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from os import urandom
from pathlib import Path
from typing import Any, Literal

import pytest

from conformance import node_contract
from conformance.node_contract import PROMISES, Promise
from conformance.worlds import MEMORY_MIB, NODE_ID, Bench
from fakes.vmm import At, Faults
from node.fcvm.rig import Double, microvm_rig
from real_parts import needs
from substrate_guest import isolation
from substrate_node.node import LocalNode, NodeIdentity, NodeTimes
from substrate_node.procvm import ProcessVmm
from substrate_node.ready import IdentityMint
from substrate_node.vmm import Vmm
from substrate_seam.events import Event
from substrate_seam.invocation import Isolation
from substrate_seam.workload import Workload, WorkloadSpec

GUESTS = Path(__file__).parent / "guests"
SERVE = ("-m", "substrate_guest", "serve", "told:app")
AUDITED = {"SUBSTRATE_AUDIT": "1"}
WITHIN_S = 60.0
LONG_S = 1.0
"""Here it is time that passes."""
MIB = 128
STORIES = (
    node_contract.a_guest_gets_the_request_and_its_answer_comes_back,
    node_contract.a_guest_hears_who_asks_and_no_more_than_it_should,
    node_contract.an_answer_to_head_is_whole_without_its_body,
    node_contract.an_unknown_digest_is_refused,
    node_contract.another_attempt_is_no_second_delivery,
    node_contract.a_cancelled_id_never_starts,
    node_contract.cancelling_what_has_ended_says_whether_it_may_have_run,
    node_contract.ensuring_twice_is_ensuring_once,
    node_contract.a_guest_larger_than_the_node_is_refused,
    node_contract.a_call_waits_for_memory_and_is_told_when_there_was_none_in_time,
    node_contract.a_full_queue_refuses_at_once,
    node_contract.a_second_delivery_is_told_apart_and_does_not_run,
    node_contract.a_call_that_is_cancelled_while_it_waits_never_starts,
    node_contract.a_guest_that_dies_is_told_with_its_last_words,
    node_contract.no_readers_pace_owns_a_guest,
)
CASES = {
    "a_status_of_the_guest_is_an_answer[418]",
    "a_status_without_a_body_is_whole[204]",
    "any_method_reaches_the_guest[PATCH]",
    "a_body_of_any_size_goes_there_and_back[0]",
    "a_body_of_any_size_goes_there_and_back[999999]",
    "an_answer_is_streamed_whole[chunked=1]",
    "an_answer_is_streamed_whole[pieces=40&bytes=100000&c]",
}
KEPT = [*STORIES, *(promise for promise in PROMISES if promise.__name__ in CASES)]


@asynccontextmanager
async def on_processes(root: Path) -> AsyncIterator[tuple[Vmm, Callable[..., Workload]]]:
    """Process guests."""
    (root / "run").mkdir(mode=0o700)
    vmm = ProcessVmm(root / "run", guest_argv=isolation.argv(), env=AUDITED)

    def workload(name: str = "echo", **fields: object) -> Workload:
        usual = {"command": ("python", *SERVE), "path": str(GUESTS), "memory_mib": MIB, "concurrency": 2}
        return Workload.of(WorkloadSpec(name=name, **(usual | fields)))

    yield vmm, workload
    await vmm.aclose()


@asynccontextmanager
async def on_microvms(
    root: Path, *, jail: Literal["on", "off"] = "off"
) -> AsyncIterator[tuple[Vmm, Callable[..., Workload]]]:
    """MicroVMs over the double of Firecracker."""
    double = Double(root / "bin")
    rootfs = double.told()
    async with microvm_rig(root, jail=jail, double=double) as rig:

        def workload(name: str = "echo", **fields: object) -> Workload:
            return rig.of(rootfs, **({"name": name, "concurrency": 2, "warm_base": False} | fields))

        yield rig.vmm, workload


MONITORS = [
    pytest.param(on_processes, id="processes", marks=needs("user-namespaces")),
    pytest.param(on_microvms, id="microvms"),
    pytest.param(partial(on_microvms, jail="on"), id="jailed", marks=needs("root")),
]


@pytest.mark.parametrize("monitor", MONITORS)
@pytest.mark.parametrize("promise", KEPT, ids=lambda promise: promise.__name__)
async def test_a_node_keeps_its_promises_on_every_monitor(promise: Promise, monitor, tmp_path: Path):
    """With guests that are processes, and journal before they act."""
    events: list[Event] = []
    journal: list[tuple[str, int]] = []
    stages = Faults()  # nothing is planned, but they are told what was reached

    def record(*entry: Any) -> None:
        journal.append(entry)
        stages.draw(At.REQUEST, "")

    async with AsyncExitStack() as held, asyncio.timeout(WITHIN_S):
        vmm, workload = await held.enter_async_context(monitor(tmp_path))
        node = await held.enter_async_context(
            LocalNode(
                NodeIdentity(node_id=NODE_ID, boot_id="boot1", arch="amd64"),
                vmms=[vmm],
                memory_mib=MEMORY_MIB,
                mint=IdentityMint(wall_ns=time.time_ns, entropy=urandom),
                emit=events.append,
                times=NodeTimes(boot_within_s=WITHIN_S),
                record=record,
            )
        )
        background = await held.enter_async_context(asyncio.TaskGroup())

        def left() -> list[str]:
            return [path.name for path in (tmp_path / "run").iterdir()]

        bench = Bench(
            *(node, stages, journal, left, background.create_task),
            workload=workload,
            isolation=vmm.isolation,
            long_s=LONG_S,
            going_s=WITHIN_S,
        )
        if vmm.isolation is not Isolation.PROCESS:
            bench.end_of_exit_3 = "the guest rebooted or shut down"
        await promise(bench)
        await bench.gone(within_s=WITHIN_S)
        await bench.settled(within_s=0)
