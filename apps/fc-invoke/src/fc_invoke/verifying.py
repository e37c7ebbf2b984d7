"""`fc-invoke verify-clones`: whether the clones of a workload are guests of their own, on this host."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from fc_invoke.auditing import counting
from fc_invoke.serving import MISTAKES
from fc_invoke.settings import PREFIX, Settings, read_settings
from fc_invoke.wiring import table_source
from substrate_cluster.catalog import Catalog
from substrate_guest import isolation
from substrate_node.clones import CannotVerify, ClonesReport, verify_clones
from substrate_node.host import hosted_node
from substrate_node.state import default_state_root
from substrate_seam.events import Event
from substrate_seam.workload import Workload
from substrate_service.daemon import exit_status
from substrate_service.settings import SettingsInvalid


def run(name: str, *, clones: int, clock_ms_max: float, environment: Mapping[str, str]) -> int:
    """Make clones of a workload and print what comes of comparing them: 0 if they are guests of their own, 1 if not.

    2 when that can't be found out, and words on standard error then. It takes the settings of the daemon, which may run
    meanwhile: the node of this command has a state root of its own beside the daemon's, and removes it.
    """

    def to_the_end() -> int:
        settings = read_settings(environment)
        workload = _named(name, settings)
        place = settings.node.state_root or default_state_root("fc-invoke", environment)
        place.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{place.name}-verify-", dir=place.parent) as root:
            report = asyncio.run(_verified(settings, workload, Path(root), clones, clock_ms_max))
        print(f"{report.clones} clones of {name}")
        print(report)
        return 0 if report.good else 1

    return exit_status("fc-invoke", to_the_end, mistakes=(SettingsInvalid, CannotVerify, OSError, *MISTAKES))


def _named(name: str, settings: Settings) -> Workload:
    """The workload of that name in the table. Raises `TableInvalid` and `CannotVerify`."""
    catalog = Catalog.load(table_source(settings), emit=_unheard)
    entry = catalog.get(name)
    if entry is None:
        known = ", ".join(sorted(workload.spec.name for workload in catalog.workloads()))
        raise CannotVerify(f"there is no workload {name!r}; the table has {known or 'none'}")
    return entry.workload


async def _verified(
    settings: Settings, workload: Workload, root: Path, clones: int, clock_ms_max: float
) -> ClonesReport:
    own = msgspec.structs.replace(settings.node, state_root=root, audit_journal=None)
    async with hosted_node(
        own,
        daemon="fc-invoke",
        prefix=PREFIX,
        guest_argv=isolation.argv(),
        emit=_unheard,
        patient=True,  # slow clones are clones all the same
    ) as host:
        return await verify_clones(
            host.node,
            workload,
            clones=clones,
            wall_ns=time.time_ns,
            clock_ms_max=clock_ms_max,
            progress=counting(clones, "clones"),
        )


def _unheard(_: Event) -> None:
    """What the node does is not the question here; why it can't, errors say."""
