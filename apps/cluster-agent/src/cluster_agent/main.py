"""The command line of cluster-agent."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from cluster_agent.settings import read_settings
from cluster_agent.wiring import daemon
from substrate_cluster.auth import TokensRefused
from substrate_cluster.catalog import TableInvalid
from substrate_cluster.plane import CannotServe
from substrate_seam.tls import CertificateUnusable
from substrate_service.daemon import run_from_environment

MISTAKES = (TableInvalid, TokensRefused, CannotServe, CertificateUnusable)
"""What an operator can get wrong besides settings and addresses; the words of each say what to do."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until asked to stop, and exit with the daemon's status."""
    release = version("substrate-cluster-agent")
    parser = argparse.ArgumentParser(
        prog="cluster-agent",
        description="Places calls on node-daemons. Settings are environment variables CLUSTER_AGENT_*: see README.md.",
    )
    parser.add_argument("--version", action="version", version=f"cluster-agent {release}")
    parser.parse_args(arguments)
    sys.exit(
        run_from_environment(
            "cluster-agent", release, os.environ, read=read_settings, assemble=daemon, mistakes=MISTAKES
        )
    )


if __name__ == "__main__":
    main()
