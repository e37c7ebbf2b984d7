"""The command line of node-daemon."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from node_daemon.settings import read_settings
from node_daemon.wiring import daemon
from substrate_node.state import StateRootUnusable
from substrate_node.vmm import VmmError
from substrate_seam.tls import CertificateUnusable
from substrate_service.daemon import run_from_environment

MISTAKES = (StateRootUnusable, VmmError, CertificateUnusable)
"""What an operator can get wrong besides settings and addresses; the words of each say what to do."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until asked to stop, and exit with the daemon's status."""
    release = version("substrate-node-daemon")
    parser = argparse.ArgumentParser(
        prog="node-daemon",
        description="Runs guests for cluster-agents. Settings are environment variables NODE_DAEMON_*: see README.md.",
    )
    parser.add_argument("--version", action="version", version=f"node-daemon {release}")
    parser.parse_args(arguments)
    sys.exit(
        run_from_environment("node-daemon", release, os.environ, read=read_settings, assemble=daemon, mistakes=MISTAKES)
    )


if __name__ == "__main__":
    main()
