"""The command line of node-daemon, and its life from an environment to an exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from node_daemon.settings import Settings, read_settings
from node_daemon.wiring import daemon
from substrate_node.state import StateRootUnusable
from substrate_node.vmm import VmmError
from substrate_seam.tls import CertificateUnusable
from substrate_service.address import ListenFailed
from substrate_service.daemon import exit_status, run_daemon
from substrate_service.observing import Observed, observed
from substrate_service.serving import run
from substrate_service.settings import SettingsInvalid
from substrate_service.signals import Stopping, stop_on_signals

MISTAKES = (SettingsInvalid, StateRootUnusable, VmmError, CertificateUnusable, ListenFailed)
"""What an operator can get wrong; the words of each say what to do."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until asked to stop; status 0 after a clean drain, 1 if calls were cut short, 2 if it can't serve."""
    parser = argparse.ArgumentParser(
        prog="node-daemon",
        description="Runs guests for cluster-agents. Settings are environment variables NODE_DAEMON_*: see README.md.",
    )
    parser.add_argument("--version", action="version", version=f"node-daemon {version('substrate-node-daemon')}")
    parser.parse_args(arguments)

    def to_the_end() -> int:
        settings = read_settings(os.environ)
        with observed() as observations:
            return run(_serve(settings, observations))

    sys.exit(exit_status("node-daemon", to_the_end, mistakes=MISTAKES))


async def _serve(settings: Settings, observations: Observed) -> int:
    stopping = Stopping()
    with stop_on_signals(stopping):
        async with daemon(settings, observations, stopping=stopping) as built:
            return await run_daemon(
                "node-daemon",
                version("substrate-node-daemon"),
                built.listeners,
                built.duties,
                drain_within_s=settings.drain_within_s,
                stopping=stopping,
                emit=observations.emit,
            )


if __name__ == "__main__":
    main()
