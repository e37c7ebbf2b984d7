"""A wire in plain text beyond this machine: only where it was asked for, and never quietly."""

import pytest

import cluster_agent.settings
import cluster_agent.wiring
import node_daemon.settings
import node_daemon.wiring
from substrate_seam.events import WarningRaised
from substrate_service.live import Live
from substrate_service.metrics import Metrics
from substrate_service.observing import Observed
from substrate_service.signals import Stopping
from substrate_service.stories import Stories

AGENT = {
    "CLUSTER_AGENT_WORKLOADS": "{}",
    "CLUSTER_AGENT_NODES": "a=http://255.255.255.255:1",  # where no connect even begins
    "CLUSTER_AGENT_INSECURE_WIRE": "true",
}
NODE = {"NODE_DAEMON_LISTEN_ADDR": "0.0.0.0:0", "NODE_DAEMON_INSECURE_WIRE": "true"}


@pytest.mark.parametrize(("daemon", "environment"), [(cluster_agent, AGENT), (node_daemon, NODE)])
async def test_a_network_that_is_trusted_with_everything_is_named_at_the_start(daemon, environment, tmp_path):
    if daemon is node_daemon:
        environment = environment | {"NODE_DAEMON_STATE_ROOT": str(tmp_path / "state")}
    events = []
    observed = Observed(
        emit=events.append, metrics=Metrics(), stories=Stories(clock=int), live=Live(clock=int, wall_ms=int)
    )
    settings = daemon.settings.read_settings(environment)
    async with daemon.wiring.daemon(settings, observed, Stopping()):
        pass
    (warning,) = [event for event in events if isinstance(event, WarningRaised) and "plain text" in event.message]
    assert "commands the node" in warning.message
