"""A daemon to be killed: boots one guest in the directory it is told, says `up`, and waits for its end.

Arguments: the directory, and a word for the command line of the launcher by which its processes are found.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from node.procvm_rig import workload
from substrate_guest import isolation
from substrate_node.procvm import ProcessVmm


async def main(run: Path, mark: str) -> None:
    """Boot, tell, wait."""
    vmm = ProcessVmm(run, guest_argv=(*isolation.argv(sys.executable), mark))
    guest = await vmm.boot(workload(command=("python", "obedient.py", mark)), "g1", {})
    print("up", flush=True)  # noqa: T201  # to the test
    await guest.exited


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
