"""The audit journal: an entry is kept before the guest may act, and nothing else is ever acknowledged."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.vmm import echo
from node.house import simulated as in_a_house
from node.house import workload
from simulation import virtual_time
from simulation.network import Network
from substrate_node.journal import JournalLine
from substrate_node.node import LocalNode
from substrate_node.vmm import JOURNAL_PORT


def told(pieces: list[bytes], *, full: bool = False) -> tuple[list[tuple[str, int]], bytes]:
    """What was kept and what the guest heard, when it sends these pieces."""
    kept: list[tuple[str, int]] = []

    def record(invocation_id: str, attempt: int) -> None:
        if full:
            raise OSError("no space left on device")
        kept.append((invocation_id, attempt))

    class Guest(asyncio.Protocol):
        def __init__(self) -> None:
            self.heard = b""
            self.lost = asyncio.get_running_loop().create_future()

        def data_received(self, data: bytes) -> None:
            assert kept, "kept before it was acknowledged"
            self.heard += data

        def connection_lost(self, _error: Exception | None) -> None:
            self.lost.set_result(None)

    async def main(dice: Random) -> bytes:
        network = Network(dice)
        listener = network.listen("journal", lambda: JournalLine(record))
        transport, guest = await network.connect("journal", Guest)
        for piece in pieces:
            transport.write(piece)
            await asyncio.sleep(0.01)
        await asyncio.sleep(1.0)
        transport.close()
        await guest.lost
        listener.close()
        return guest.heard

    return kept, virtual_time.run(main, seed=1).value


LINE = b"0123456789abcdef0123456789abcdef 2\n"


@given(cuts=st.sets(st.integers(1, len(LINE) - 1)))
def test_an_entry_is_kept_and_acknowledged_with_one_byte_however_it_is_cut(cuts: set[int]):
    edges = [0, *sorted(cuts), len(LINE)]
    pieces = [LINE[here:there] for here, there in pairwise(edges)]
    assert told(pieces) == ([("0123456789abcdef0123456789abcdef", 2)], b"+")


@pytest.mark.parametrize(
    "pieces",
    [
        [b"no-attempt\n"],
        [b"a b\n"],
        [b"a 1 more\n"],
        [b"\n"],
        [b"\xff\xfe 1\n"],
        [b"a 1\nb 2\n"],
        [b"a 1\nb"],
        [b"a" * 200 + b" 1\n"],
        [b"a" * 200],
        [b"a 1"],
        [],
    ],
)
def test_anything_else_is_neither_kept_nor_acknowledged(pieces: list[bytes]):
    """Whether it comes in one piece or byte by byte."""
    assert told(pieces) == ([], b"")
    if not pieces or b"\n" not in pieces[0] or pieces[0].index(b"\n") == len(pieces[0]) - 1:
        assert told([bytes([byte]) for piece in pieces for byte in piece]) == ([], b"")


def test_what_follows_an_entry_is_not_read():
    assert told([b"a 1\n", b"b 2\n"]) == ([("a", 1)], b"+")


def test_an_entry_that_cannot_be_kept_is_not_acknowledged():
    """The guest must not act then."""
    assert told([b"a 1\n"], full=True) == ([], b"")


def test_every_guest_of_an_auditing_node_can_reach_the_journal():
    """However it was started."""
    kept: list[tuple[str, int]] = []

    async def act(guest, call):
        reader, writer = await guest.dial_out(JOURNAL_PORT)
        writer.write(f"{call.headers['fc-invocation-id']} {call.headers['fc-attempt']}\n".encode())
        assert await reader.read() == b"+"
        writer.close()
        return await echo(guest, call)

    async def story(house) -> None:
        auditing = LocalNode(
            house.node._identity,
            vmms=[house.vmm],
            memory_mib=1000,
            mint=house.node._shop.mint,
            emit=house.events.append,
            record=lambda *entry: kept.append(entry),
        )
        house.node, unused = auditing, house.node
        subjects = [workload("cold"), workload("warm", warm_base=True), workload("pooled", pool=1)]
        async with auditing:
            await house.warmed(*subjects)
            for subject in subjects:
                assert await house.call(subject) == b"ping"
        house.node = unused
        assert kept == house.journal
        assert len(kept) == 3

    in_a_house(story, behaviour=act)
