"""`fc-invoke serve`: from an environment to a daemon that has stopped, with every mistake of the user's in words."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version

from fc_invoke import builtin
from fc_invoke.settings import Settings, read_settings
from fc_invoke.wiring import daemon
from substrate_cluster.auth import TokensRefused
from substrate_cluster.catalog import TableInvalid
from substrate_cluster.plane import CannotServe
from substrate_node.state import StateRootUnusable
from substrate_node.vmm import VmmError
from substrate_seam.events import WarningRaised
from substrate_service.address import ListenFailed
from substrate_service.daemon import exit_status, run_daemon
from substrate_service.observing import Observed, observed
from substrate_service.serving import run
from substrate_service.settings import SettingsInvalid
from substrate_service.signals import Stopping, stop_on_signals

MISTAKES = (SettingsInvalid, TableInvalid, TokensRefused, CannotServe, StateRootUnusable, VmmError, ListenFailed)
"""What an operator can get wrong; the words of each say what to do."""


def serve(environment: Mapping[str, str]) -> int:
    """Serve until asked to stop. 0 after a clean drain, 1 after calls were cut short, 2 if it can't serve at all."""

    def to_the_end() -> int:
        settings = read_settings(environment)
        with observed() as observations:
            return run(_serve(settings, observations))

    return exit_status("fc-invoke", to_the_end, mistakes=MISTAKES)


async def _serve(settings: Settings, observations: Observed) -> int:
    for warning in settings.warnings:
        observations.emit(WarningRaised(message=warning))
    stopping = Stopping()
    with stop_on_signals(stopping):
        async with daemon(
            settings, observations, stopping=stopping.requested.is_set, announce=_announcer(settings)
        ) as built:
            return await run_daemon(
                "fc-invoke",
                version("fc-invoke"),
                built.listeners,
                built.duties,
                drain_within_s=built.drain_within_s,
                stopping=stopping,
                emit=observations.emit,
            )


def _announcer(settings: Settings) -> Callable[[str, str], None]:
    """With nothing configured somebody is trying this out: tell them how to call it."""
    trying_out = settings.front.workloads is None and settings.front.workloads_file is None

    def announce(public: str, admin: str) -> None:
        if trying_out:
            print(builtin.WELCOME.format(url=f"http://{public}", admin_url=f"http://{admin}"), file=sys.stderr)

    return announce
