"""A daemon of ours over the double: `python -m bench.daemon fc-invoke|node-daemon GUEST_SOCKET`, settings as usual.

Its own code and wiring, all but the monitor. `WORKLOAD COUNT` on its standard input lets it park guests until so many
of that workload stand ready; then it parks no more until asked again. Without a count it parks whenever a guest is
taken, as without this program. It answers each line with `done`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from bench.double import SameGuestVmm
from fc_invoke import wiring as one_process
from fc_invoke.settings import read_settings as read_one_process
from node_daemon import wiring as node_only
from node_daemon.settings import read_settings as read_node_only
from substrate_node.host import HostedNode, NodeSettings
from substrate_node.node import LocalNode, NodeIdentity
from substrate_node.procvm.probe import reported
from substrate_node.ready import IdentityMint
from substrate_seam.events import Emit
from substrate_service.daemon import run_from_environment

DAEMONS = {"fc-invoke": (one_process, read_one_process), "node-daemon": (node_only, read_node_only)}
_LOOK_EVERY_S = 0.02


@asynccontextmanager
async def node_over_the_double(settings: NodeSettings, server: Path, emit: Emit) -> AsyncIterator[HostedNode]:
    """What `hosted_node` does, without a state root and without monitors of this machine."""
    vmm = SameGuestVmm(server)
    identity = NodeIdentity(node_id=settings.node_id, boot_id=os.urandom(16).hex(), arch=settings.arch)
    async with (
        LocalNode(
            identity,
            vmms=[vmm],
            memory_mib=settings.memory_mib or 0,
            mint=IdentityMint(wall_ns=time.time_ns, entropy=os.urandom),
            emit=emit,
            clock=time.monotonic,
        ) as node,
        asyncio.TaskGroup() as duties,
    ):
        parking = duties.create_task(park_when_asked(node, vmm.gate))
        yield HostedNode(node=node, vmms=(vmm,), isolation=reported({}), journal=None)
        parking.cancel()


async def park_when_asked(node: LocalNode, gate: asyncio.Event) -> None:
    """Open the gate, and close it again when as many guests are parked as were asked for."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while words := (await lines.readline()).decode().split():
        gate.set()
        name, *count = words
        if count:
            while parked(node, name) < int(count[0]):  # noqa: ASYNC110  # a node tells of no single parked guest
                await asyncio.sleep(_LOOK_EVERY_S)
            gate.clear()
        print("done", flush=True)


def parked(node: LocalNode, name: str) -> int:
    """How many guests of a workload stand ready."""
    return sum(workload.parked for workload in node.report().workloads.values() if workload and workload.name == name)


def main(daemon: str, server: str) -> int:
    """Be that daemon until asked to stop; the exit status."""
    wiring, read = DAEMONS[daemon]

    def hosted_node(settings: NodeSettings, *, emit: Emit, **_: object):
        return node_over_the_double(settings, Path(server), emit)

    wiring.hosted_node = hosted_node
    return run_from_environment(daemon, "0", os.environ, read=read, assemble=wiring.daemon, mistakes=())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
