"""Both ends of the wire over real sockets and real TLS, on both event loops."""

import asyncio
import contextlib
import ssl
from dataclasses import dataclass, field

import pytest
import trustme
import uvloop
from uvicorn.server import ServerState

from substrate_cluster.nodes.connections import over_tcp, over_unix
from substrate_cluster.nodes.remote import RemoteNode
from substrate_node.daemon import NodeDaemon, head_refusal, only
from substrate_seam.errors import GuestUnavailable, Reason
from substrate_seam.invocation import (
    Demands,
    GuestRequest,
    Invocation,
    Isolation,
    Receipt,
    Reply,
    Start,
    Started,
    WorkloadRef,
)
from substrate_seam.report import NodeReport
from substrate_seam.tls import client_context, server_context
from substrate_service.listener import protocol_factory, strict_config

LARGE = bytes(range(256)) * 4096 * 8
STARTED = Started(
    queue_ms=0, claim_ms=1, ready_ms=1, start=Start.POOL, node="node-1", guest="g", isolation=Isolation.PROCESS
)
REPORT = NodeReport(
    node_id="node-1", boot_id="b1", size_mib=1, free_mib=1, isolation=Isolation.PROCESS, arch="amd64", full=True
)
PATIENCE_S = 20.0

both_loops = pytest.mark.parametrize("loop", [asyncio.SelectorEventLoop, uvloop.Loop], ids=["asyncio", "uvloop"])


@dataclass
class EchoNode:
    """A node without a machine: whatever is claimed answers with its request, or (target `/hang`) never."""

    node_id: str = "node-1"
    boot_id: str = "b1"
    claimed: int = 0
    given_back: asyncio.Queue = field(default_factory=asyncio.Queue)

    async def reports(self):
        yield REPORT
        await asyncio.Event().wait()

    def claim(self, _invocation):
        return EchoClaim(self)


class EchoClaim:
    whole = False

    def __init__(self, node):
        self.node = node

    async def __aenter__(self):
        self.node.claimed += 1
        return self

    async def __aexit__(self, *_):
        self.node.given_back.put_nowait(None)

    async def exchange(self, request):
        reply = Reply(started=STARTED, status=200, headers=((b"x", b"y"),), body=pieces(request))
        reply.receipt = Receipt(guest_ms=1, body_bytes=len(request.body))
        return reply


async def pieces(request):
    for at in range(0, len(request.body), 100_000):
        yield request.body[at : at + 100_000]
    if request.target == "/hang":
        await asyncio.Event().wait()


def call(number: int, body: bytes, target: str = "/") -> Invocation:
    return Invocation(
        id=f"{number:032x}",
        attempt=1,
        workload=WorkloadRef("echo", "0" * 64),
        session=None,
        caller="anna",
        demands=Demands(),
        request=GuestRequest("POST", target, (), body),
        start_within_s=PATIENCE_S,
        run_within_s=PATIENCE_S,
    )


@contextlib.asynccontextmanager
async def listening(node, listen, *, tls=None, allow=None):
    """Serve a node where `listen` says; yields the server."""
    daemon = NodeDaemon(node, emit=print, body_bytes_max=len(LARGE), allow=allow)
    config, state = strict_config(daemon, refusal=head_refusal, emit=print, tls=tls), ServerState()
    server = await listen(protocol_factory(config, state), ssl=config.ssl)
    try:
        yield server
    finally:
        server.close()
        daemon.close()
        for connection in list(state.connections):
            connection.abort()
        async with asyncio.timeout(PATIENCE_S):
            for connection in list(state.connections):
                await connection.closed()
            if state.tasks:
                await asyncio.wait(set(state.tasks))


@contextlib.asynccontextmanager
async def heard(connect):
    """An agent's node that has been heard; its reports go on."""
    async with RemoteNode("node-1", connect) as node, contextlib.aclosing(node.reports()) as reports:
        async with asyncio.timeout(PATIENCE_S):
            assert await anext(reports) == REPORT
        yield node


async def exchange_of_everything(node, served):
    """Calls of every size, in a row and side by side, and one that is left while it runs."""

    async def one(number, body):
        async with node.invoke(call(number, body)) as reply:
            assert b"".join([piece async for piece in reply.body]) == body
            assert reply.receipt.body_bytes == len(body)

    async with asyncio.timeout(PATIENCE_S):
        for number, body in enumerate((b"", b"hello", LARGE, b"hello")):
            await one(number, body)
        async with asyncio.TaskGroup() as callers:
            for number in range(10, 30):
                callers.create_task(one(number, b"x" * number * 1000))
        while not served.given_back.empty():
            served.given_back.get_nowait()
        async with node.invoke(call(99, b"hello", "/hang")) as reply:
            assert await anext(aiter(reply.body)) == b"hello"
        await served.given_back.get()
    assert served.claimed == 25


@both_loops
def test_the_wire_works_over_tcp(loop):
    async def story():
        node, here = EchoNode(), asyncio.get_running_loop()
        async with listening(node, lambda factory, **tls: here.create_server(factory, "127.0.0.1", 0, **tls)) as server:
            port = server.sockets[0].getsockname()[1]
            async with heard(over_tcp("127.0.0.1", port, node_id="node-1", tls=None)) as remote:
                await exchange_of_everything(remote, node)

    run(loop, story)


@both_loops
def test_the_wire_works_over_a_socket_of_this_machine(loop, tmp_path):
    async def story():
        node, here, path = EchoNode(), asyncio.get_running_loop(), str(tmp_path / "wire.sock")
        async with (
            listening(node, lambda factory, **tls: here.create_unix_server(factory, path, **tls)),
            heard(over_unix(path)) as remote,
        ):
            await exchange_of_everything(remote, node)

    run(loop, story)


class Identity:
    """Certificates of one authority, as files."""

    def __init__(self, authority, directory, name):
        issued = authority.issue_cert(name)
        self.files = {part: directory / f"{name}-{part}.pem" for part in ("cert", "key", "ca")}
        issued.cert_chain_pems[0].write_to_path(self.files["cert"])
        issued.private_key_pem.write_to_path(self.files["key"])
        authority.cert_pem.write_to_path(self.files["ca"])

    def client(self):
        return client_context(**self.files)

    def server(self):
        return server_context(**self.files)


def over_tls(loop, story, *, server, client, allow=None, name="node-1"):
    """Tell a story to a node over TLS."""

    async def main():
        node, here = EchoNode(), asyncio.get_running_loop()
        async with listening(
            node,
            lambda factory, **tls: here.create_server(factory, "127.0.0.1", 0, **tls),
            tls=server,
            allow=allow,
        ) as listener:
            port = listener.sockets[0].getsockname()[1]
            await story(node, over_tcp("127.0.0.1", port, node_id=name, tls=client))

    run(loop, main)


@both_loops
def test_the_wire_works_over_tls_that_proves_both_ends(loop, tmp_path):
    authority = trustme.CA()
    server, client = Identity(authority, tmp_path, "node-1").server(), Identity(authority, tmp_path, "agent").client()

    async def story(node, connect):
        async with heard(connect) as remote:
            await exchange_of_everything(remote, node)

    over_tls(loop, story, server=server, client=client, allow=only(["agent"]))


REFUSED = ["node of another name", "node of another authority", "agent of another authority", "no certificate", "name"]


@both_loops
@pytest.mark.parametrize("who", REFUSED)
def test_whoever_cannot_prove_who_it_is_is_not_spoken_to(loop, who, tmp_path):
    """Neither end: nothing ran, and the reason is told."""
    ours, foreign = trustme.CA(), trustme.CA()
    (tmp_path / "foreign").mkdir()
    server = Identity(ours, tmp_path, "node-2" if who == "node of another name" else "node-1").server()
    client = Identity(ours, tmp_path, "agent").client()
    if who == "node of another authority":
        server = Identity(foreign, tmp_path / "foreign", "node-1").server()
    elif who == "agent of another authority":
        client = Identity(foreign, tmp_path / "foreign", "agent").client()
        client.load_verify_locations(cadata=ours.cert_pem.bytes().decode())
    elif who == "no certificate":
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        ours.configure_trust(client)

    async def story(node, connect):
        async with RemoteNode("node-1", connect) as remote, contextlib.aclosing(remote.reports()) as reports:
            async with asyncio.timeout(PATIENCE_S):
                with pytest.raises(GuestUnavailable) as refused:
                    await anext(reports)
        assert refused.value.reason is Reason.NODE_UNREACHABLE
        assert refused.value.message
        assert not node.claimed

    over_tls(loop, story, server=server, client=client, allow=only(["somebody else"]) if who == "name" else None)


def run(loop, story):
    """On that event loop; what reaches its exception handler fails the test."""
    strays = []
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.get_loop().set_exception_handler(lambda _loop, context: strays.append(context))
        runner.run(story())
    assert not strays
