"""The contract, kept by process guests of an ordinary user: to be run by root, as a process that gives root up.

Arguments: a new directory, and an interpreter that everybody can read. Prints what a guest sees, as JSON.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401  # now, because its files may be root's alone
import encodings.idna  # noqa: F401
import os
import sys
from pathlib import Path

from node.procvm_rig import ProcessRig, process_rig
from node.vmm_contract import NOBODY, PROMISES, ask

NOBODY_UID = 65_534


async def main(run: Path, python: str) -> None:
    """Keep each promise, then look around in a guest."""
    async with process_rig(run, python=python) as rig:
        for promise in PROMISES:
            await promise(rig)
        print((await look(rig)).decode())  # noqa: T201  # to the test


async def look(rig: ProcessRig) -> bytes:
    """What a guest sees."""
    guest = await rig.vmm.boot(rig.workload, "looker", NOBODY)
    _, seen = await ask(guest, "/see/etc/shadow")
    await rig.vmm.discard("looker")
    return seen


if __name__ == "__main__":
    os.chown(sys.argv[1], NOBODY_UID, NOBODY_UID)
    os.setgroups([])
    os.setresgid(NOBODY_UID, NOBODY_UID, NOBODY_UID)
    os.setresuid(NOBODY_UID, NOBODY_UID, NOBODY_UID)
    asyncio.run(main(Path(sys.argv[1]) / "run", sys.argv[2]))
