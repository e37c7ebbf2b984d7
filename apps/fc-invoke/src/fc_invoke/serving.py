"""`fc-invoke serve`: from an environment to a daemon that has stopped."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from fc_invoke.settings import read_settings
from fc_invoke.wiring import daemon
from substrate_cluster.auth import TokensRefused
from substrate_cluster.catalog import TableInvalid
from substrate_cluster.plane import CannotServe
from substrate_node.state import StateRootUnusable
from substrate_node.vmm import VmmError
from substrate_service.daemon import run_from_environment

MISTAKES = (TableInvalid, TokensRefused, CannotServe, StateRootUnusable, VmmError)
"""What an operator can get wrong besides settings and addresses; the words of each say what to do."""


def serve(environment: Mapping[str, str]) -> int:
    """Serve until asked to stop; the exit status."""
    return run_from_environment(
        "fc-invoke", version("fc-invoke"), environment, read=read_settings, assemble=daemon, mistakes=MISTAKES
    )
