"""Agent and node across a real wire: each proves who it is, or nothing runs."""

import json
from contextlib import AsyncExitStack

import httpx
import pytest
import trustme

from e2e.system import process, started, until, workload
from real_parts import needs

pytestmark = needs("user-namespaces", "pidfd")


class Authority:
    """Issues the wire's certificates as files."""

    def __init__(self, directory):
        self.directory = directory
        self.ca = trustme.CA()
        self.ca.cert_pem.write_to_path(directory / "ca.pem")

    def settings(self, prefix, name):
        """The settings of a daemon that is called `name`."""
        certificate = self.ca.issue_cert(name)
        cert, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        certificate.private_key_pem.write_to_path(key)
        cert.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
        files = {"CERT": cert, "KEY": key, "CA": self.directory / "ca.pem"}
        return {f"{prefix}TLS_{kind}_FILE": str(path) for kind, path in files.items()}


async def call(tmp_path, *, node_name="node-1", agent_name="agent", agents="agent", agent_authority=None):
    """The status and `fc-error` of one call through an agent and a node with these certificates."""
    authority = Authority(tmp_path)
    node_env = {
        "NODE_DAEMON_LISTEN_ADDR": "127.0.0.1:0",
        "NODE_DAEMON_ADMIN_LISTEN_ADDR": "127.0.0.1:0",
        "NODE_DAEMON_STATE_ROOT": str(tmp_path / "state"),
        "NODE_DAEMON_NODE": "node-1",
        "NODE_DAEMON_AGENTS": agents,
        **authority.settings("NODE_DAEMON_", node_name),
    }
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(process("node-daemon", env=node_env, cwd=tmp_path))
        await started(node)
        agent_env = {
            "CLUSTER_AGENT_LISTEN_ADDR": "127.0.0.1:0",
            "CLUSTER_AGENT_ADMIN_LISTEN_ADDR": "127.0.0.1:0",
            "CLUSTER_AGENT_WORKLOADS": json.dumps({"echo": workload("substrate_guest.workloads.echo:app")}),
            "CLUSTER_AGENT_NODES": f"node-1={node.url.replace('http', 'https')}",
            **(agent_authority or authority).settings("CLUSTER_AGENT_", agent_name),
        }
        agent = await stack.enter_async_context(process("cluster-agent", env=agent_env, cwd=tmp_path))
        await started(agent)
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
            await until(lambda: agent.seen("node.connected") or agent.seen("node.lost") or agent.seen("warning.raised"))
            if not agent.seen("node.connected"):
                why = (await client.get(f"{agent.admin_url}/readyz")).text
                reply = await client.post(f"{agent.url}/invoke/echo", content=b"x")
                return reply.status_code, reply.headers.get("fc-error"), why
            reply = await client.post(f"{agent.url}/invoke/echo", content=b"x")
            return reply.status_code, reply.headers.get("fc-error"), ""


async def test_a_call_crosses_a_wire_that_is_authenticated_both_ways(tmp_path):
    """The node's certificate is in the name of its id, the agent's among those that may command it."""
    assert await call(tmp_path) == (200, None, "")


@pytest.mark.parametrize(
    "names",
    [{"node_name": "node-2"}, {"agent_name": "stranger"}],
    ids=["another node's certificate", "an agent that is not allowed"],
)
async def test_whoever_is_not_whom_it_should_be_runs_nothing(tmp_path, names):
    """The caller hears 503 with `ran: no`, the operator hears why."""
    status, reason, why = await call(tmp_path, **names)
    assert (status, reason) == (503, "node-unreachable")
    assert "node-1" in why


async def test_a_certificate_of_another_authority_is_nobodys(tmp_path):
    """Anybody can issue a certificate; only one authority's counts."""
    (tmp_path / "other").mkdir()
    status, reason, _ = await call(tmp_path, agent_authority=Authority(tmp_path / "other"))
    assert (status, reason) == (503, "node-unreachable")
