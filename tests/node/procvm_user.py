"""The contract, kept by process guests of an ordinary user: to be run by root, as a process that gives root up.

Arguments: a directory, an interpreter that everybody can read, and `bare` if there shall be no user namespaces either.
Prints what the probe says and what a guest sees, as JSON.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401  # now, because its files may be root's alone
import encodings.idna  # noqa: F401
import json
import os
import sys
from pathlib import Path
from typing import Any

from node.procvm_rig import ProcessRig, process_rig
from node.vmm_contract import NOBODY, PROMISES, ask
from substrate_guest import confinement

NOBODY_UID = 65_534


async def main(run: Path, python: str) -> None:
    """Keep each promise, then look around in a guest."""
    async with process_rig(run, python=python) as rig:
        for promise in PROMISES:
            await promise(rig)
        applied = sorted((await rig.vmm.probe()).applied)
        print(json.dumps({"applied": applied, **await look(rig)}))  # noqa: T201  # to the test


async def look(rig: ProcessRig) -> dict[str, Any]:
    """What a guest sees."""
    guest = await rig.vmm.boot(rig.workload, "looker", NOBODY)
    _, seen = await ask(guest, "/see/etc/shadow")
    await rig.vmm.discard("looker")
    return json.loads(seen)


def give_up_namespaces() -> None:
    """Be in a user namespace that allows no other, without a capability in it: as on a host that forbids them."""
    confinement.enter_user_namespace()
    confinement.forbid_nested_namespaces()
    confinement.drop_capabilities()


if __name__ == "__main__":
    os.chown(sys.argv[1], NOBODY_UID, NOBODY_UID)
    confinement.become(NOBODY_UID)
    if sys.argv[3:] == ["bare"]:
        give_up_namespaces()
    asyncio.run(main(Path(sys.argv[1]) / "run", sys.argv[2]))
