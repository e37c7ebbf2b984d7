"""A daemon to be killed: boots guests, captures bases and restores clones for ever, and says what it has just done.

Arguments: the directory of the state, that of the doubles, and `on` or `off` for the jail.
"""

from __future__ import annotations

import asyncio
import sys
from itertools import count
from pathlib import Path

from node.fcvm.rig import Double, MicroVmRig
from substrate_node.fcvm import outfitted


def say(word: str) -> None:
    """Tell the test."""
    print(word, flush=True)  # noqa: T201  # that is how


async def main(root: Path, double: Double, jail: str) -> None:
    """Go on until killed."""
    async with outfitted(double.rules(jail=jail)) as outfit:
        rig = MicroVmRig(root, outfit, double)
        for n in count():
            source = await rig.vmm.boot(rig.workload, f"s{n}", {1025: asyncio.Protocol})
            say("booted")
            base = await rig.vmm.capture(rig.workload, source, f"b{n}")
            say("captured")
            await rig.vmm.discard(f"s{n}")
            await rig.vmm.restore(rig.workload, base, f"c{n}", {})
            say("restored")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Double(Path(sys.argv[2])), sys.argv[3]))
