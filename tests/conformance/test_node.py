"""Every node keeps the promises of `node_contract`: in this process, and at the other end of the wire."""

from random import Random

import pytest

from conformance.node_contract import PROMISES, Promise
from conformance.worlds import World, local_node, remote_node
from simulation import virtual_time


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("world", [local_node, remote_node], ids=lambda world: world.__name__)
@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_a_node_keeps_its_promises(promise: Promise, world: World, seed: int):
    async def main(dice: Random) -> None:
        async with world(dice) as bench:
            await promise(bench)
            await bench.settled()

    virtual_time.run(main, seed=seed)
