"""The front behind its listener: what the listener ends itself is told once, and under the id that the caller got."""

import asyncio

import pytest
from uvicorn.server import ServerState

from cluster.fronts import Bench
from simulation.network import Network
from simulation.virtual_time import run
from substrate_cluster.ingress import head_refusals
from substrate_seam.errors import Reason
from substrate_seam.events import CallRefused
from substrate_service.listener import ListenerLimits, protocol_factory, strict_config

FRONT = ("front", 80)
HEAD = b"POST /invoke/thumb HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


class Caller(asyncio.Protocol):
    """Notes what it is told until the connection ends."""

    def __init__(self):
        self.got = b""
        self.ended = asyncio.get_running_loop().create_future()

    def data_received(self, data):
        self.got += data

    def connection_lost(self, _):
        self.ended.set_result(None)


@pytest.mark.parametrize(
    ("sent", "reason", "status"),
    [
        (HEAD + b"one\r\n", Reason.BAD_REQUEST, 400),
        (HEAD + b"1\r\nx\r\n", Reason.BODY_TIMEOUT, 408),
        (b"POST / HTTP/1.1\r\n\r\n", Reason.BAD_REQUEST, 400),
    ],
    ids=["malformed body", "body that stalls", "no host"],
)
def test_a_request_that_the_listener_ends_is_told_once(sent, reason, status):
    async def main(dice):
        with Bench() as bench:
            told = []
            config = strict_config(
                bench.app,
                limits=ListenerLimits(body_stall_s=1.0),
                refusal=head_refusals(mint_id=lambda: "f" * 32, emit=bench.events.append),
                emit=told.append,
            )
            network = Network(dice)
            listener = network.listen(FRONT, protocol_factory(config, ServerState()))
            transport, caller = await network.connect(FRONT, Caller)
            transport.write(sent)
            await caller.ended
            listener.close()
            await asyncio.sleep(1.0)
            assert b"fc-invocation-id: " + b"f" * 32 in caller.got
            (event,) = bench.events
            assert isinstance(event, CallRefused)
            assert (event.invocation_id, event.reason, event.status) == ("f" * 32, reason, status)
            assert told == []

    run(main, seed=1)
