"""A daemon to be killed: it tells its steps as it goes about guests, and ends only when they do.

Arguments: a directory for its guests, a word by which all its processes are found, and `cold` (one guest, then `up`) or
`warm` (`booted`, `captured`, `cloned`, and clone after clone).
"""

from __future__ import annotations

import asyncio
import sys
from itertools import count
from pathlib import Path

from node.procvm_rig import warm_workload, workload
from node.vmm_contract import until_ready
from substrate_guest import isolation
from substrate_node.procvm import ProcessVmm


async def main(run: Path, mark: str, how: str) -> None:
    """Boot, tell, wait."""
    vmm = ProcessVmm(run, guest_argv=(*isolation.argv(sys.executable), mark))
    if how == "warm":
        await keep_cloning(vmm, mark)
    guest = await vmm.boot(workload(command=("python", "obedient.py", mark)), "g1", {})
    print("up", flush=True)  # noqa: T201  # to the test
    await guest.exited


async def keep_cloning(vmm: ProcessVmm, mark: str) -> None:
    """Capture a base, and make clone after clone."""
    marked = warm_workload(env={"MARK": mark})
    source = await vmm.boot(marked, "source", {}, to_capture=True)
    print("booted", flush=True)  # noqa: T201  # to the test
    await until_ready(source)
    base = await vmm.capture(marked, source, "base")
    print("captured", flush=True)  # noqa: T201  # to the test
    for number in count():
        guest = await vmm.restore(marked, base, f"c{number}", {})
        if number == 0:
            print("cloned", flush=True)  # noqa: T201  # to the test
        if number % 3:
            await vmm.discard(guest.guest_id)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
