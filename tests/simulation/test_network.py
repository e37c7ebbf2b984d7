"""The network in memory treats protocols as asyncio's sockets would, and breaks where it is told to."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from simulation.network import WINDOW_BYTES, Connection, End, Network
from simulation.virtual_time import Deadlock, LeftBehind, run

NODE = ("node-1", 8443)
V_SOCK = "/run/guest/v.sock"
STILL = (0.001, 0.001)
A_TRIP_S = 0.01
"""Longer than any trip, whether in memory or over the loopback interface."""
SEEDS = range(30)


class Recorder(asyncio.Protocol):
    """Remembers every call it gets and keeps its transport at hand."""

    def __init__(self, *, keep_open_on_eof: bool = False) -> None:
        self.calls: list[object] = []
        self.received = bytearray()
        self.received_at_s: list[float] = []
        self.loss: Exception | None = None
        self.keep_open_on_eof = keep_open_on_eof
        self.made, self.ended, self.lost = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._news = asyncio.Event()

    async def hears(self, ending: bytes) -> None:
        """Wait until what was received ends so."""
        while not self.received.endswith(ending):
            self._news.clear()
            await self._news.wait()

    def connection_made(self, transport):
        self.transport = transport
        self.calls.append("made")
        self.made.set()

    def data_received(self, data):
        if self.calls[-1] != "data":  # a stream has no pieces
            self.calls.append("data")
        self.received += data
        self.received_at_s.append(asyncio.get_running_loop().time())
        self._news.set()

    def eof_received(self):
        self.calls.append("eof")
        self.ended.set()
        return self.keep_open_on_eof

    def pause_writing(self):
        self.calls.append("pause")

    def resume_writing(self):
        self.calls.append("resume")

    def connection_lost(self, exc):
        self.calls.append("lost")
        self.loss = exc
        self.lost.set()


@contextmanager
def listening(network: Network, address=NODE, **options) -> Iterator[list[Recorder]]:
    """Listen for the length of the block; get the servers of the connections accepted so far."""
    servers: list[Recorder] = []

    def accept() -> Recorder:
        servers.append(Recorder(**options))
        return servers[-1]

    listener = network.listen(address, accept)
    try:
        yield servers
    finally:
        listener.close()


async def joined(network: Network, address=NODE, **server_options) -> tuple[Recorder, Recorder]:
    """Connect a client to a server that listens for just this one; get both."""
    with listening(network, address, **server_options) as servers:
        _, client = await network.connect(address, Recorder)
    return client, servers[0]


# Connecting.


def test_both_ends_are_told_of_the_connection_and_of_each_other():
    async def meet(dice):
        network = Network(dice)
        client, server = await joined(network)
        told = [
            [end.transport.get_extra_info(key) for key in ("sockname", "peername", "sslcontext", "socket", "peercert")]
            for end in (client, server)
        ]
        client.transport.close()
        return told, client.calls, server.calls

    (client_is_told, server_is_told), *calls = run(meet, seed=1).value
    assert client_is_told == [("client", 32768), NODE, None, None, None]
    assert server_is_told == [NODE, ("client", 32768), None, None, None]
    assert [call[0] for call in calls] == ["made", "made"]


def test_each_end_sees_the_certificate_of_the_other():
    async def meet(dice):
        network = Network(dice)
        servers = []
        listener = network.listen(
            NODE, lambda: servers.append(Recorder()) or servers[-1], certificate={"subject": "node-1"}
        )
        transport, _ = await network.connect(NODE, Recorder, certificate={"subject": "agent"})
        listener.close()
        transport.close()
        return transport.get_extra_info("peercert"), servers[0].transport.get_extra_info("peercert")

    assert run(meet, seed=1).value == ({"subject": "node-1"}, {"subject": "agent"})


def test_a_client_of_a_unix_socket_has_no_name():
    async def meet(dice):
        client, server = await joined(Network(dice), V_SOCK)
        client.transport.close()
        return server.transport.get_extra_info("sockname"), server.transport.get_extra_info("peername")

    assert run(meet, seed=1).value == (V_SOCK, "")


def test_connecting_takes_one_round_trip():
    async def connect(dice):
        client, _ = await joined(Network(dice, latency_s=(0.02, 0.02)))
        client.transport.close()

    assert run(connect, seed=1).elapsed_s == pytest.approx(0.04)


def test_a_connection_is_refused_when_nobody_listens_any_more():
    async def knock(dice):
        network = Network(dice)
        with listening(network):
            pass
        with pytest.raises(ConnectionRefusedError, match="nobody listens on"):
            await network.connect(NODE, Recorder)

    run(knock, seed=1)


def test_an_address_has_one_listener():
    async def listen_twice(dice):
        network = Network(dice)
        with listening(network), pytest.raises(OSError, match="somebody listens on"):
            network.listen(NODE, Recorder)

    run(listen_twice, seed=1)


def test_connections_outlive_their_listener():
    async def close_the_listener(dice):
        client, server = await joined(Network(dice))
        client.transport.write(b"still here")
        client.transport.close()
        await server.lost.wait()
        return bytes(server.received)

    assert run(close_the_listener, seed=1).value == b"still here"


def test_a_cancelled_connect_leaves_the_server_a_connection_that_ends():
    async def change_ones_mind(dice):
        network = Network(dice, latency_s=(1.0, 1.0))
        with listening(network) as servers:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.5):
                    await network.connect(NODE, Recorder)
            await servers[0].lost.wait()
        return servers[0].calls

    assert run(change_ones_mind, seed=1).value == ["made", "eof", "lost"]


# Streams.


@pytest.mark.parametrize("seed", SEEDS)
def test_bytes_arrive_complete_and_in_order_both_ways_however_they_are_cut_up(seed):
    async def talk(dice):
        client, server = await joined(Network(dice))
        said = {client: b"", server: b""}
        for _ in range(50):
            end = dice.choice([client, server])
            words = dice.randbytes(dice.randrange(20_000))
            said[end] += words
            end.transport.write(words)
            await asyncio.sleep(dice.choice([0, 0.001]))
        client.transport.write_eof()
        await asyncio.sleep(1.0)
        assert (bytes(server.received), bytes(client.received)) == (said[client], said[server])

    run(talk, seed=seed)


def test_a_byte_takes_its_latency_and_no_byte_overtakes_another():
    async def send_and_time(dice):
        client, server = await joined(Network(dice, latency_s=(0.1, 5.0)))
        sent_at_s = asyncio.get_running_loop().time()
        for number in range(20):
            client.transport.write(bytes([number]))
        await asyncio.sleep(6.0)
        client.transport.close()
        return bytes(server.received), [at_s - sent_at_s for at_s in server.received_at_s]

    received, times_s = run(send_and_time, seed=1).value
    assert received == bytes(range(20))
    assert 0.1 <= min(times_s) <= max(times_s) <= 5.0
    assert len(set(times_s)) > 1


def test_segments_are_sometimes_split():
    async def send(dice):
        client, server = await joined(Network(dice))
        client.transport.write(b"GET / HTTP/1.1\r\n\r\n")
        client.transport.close()
        await server.lost.wait()
        assert server.received == b"GET / HTTP/1.1\r\n\r\n"
        return len(server.received_at_s)

    assert {run(send, seed=seed).value for seed in range(100)} == {1, 2}


def test_asyncio_streams_work_over_it():
    async def echo(dice):
        network = Network(dice)
        loop = asyncio.get_running_loop()

        async def answer(reader, writer):
            writer.write((await reader.readline()).upper())
            writer.close()
            await writer.wait_closed()

        listener = network.listen(NODE, lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader(), answer))
        reader = asyncio.StreamReader()
        transport, protocol = await network.connect(NODE, lambda: asyncio.StreamReaderProtocol(reader))
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        writer.write(b"hello\n")
        await writer.drain()
        answered = await reader.read()
        writer.close()
        await writer.wait_closed()
        listener.close()
        return answered

    assert run(echo, seed=1).value == b"HELLO\n"


# Flow control.


def test_a_writer_is_paused_when_nobody_reads_and_resumed_when_somebody_does():
    async def flood(dice):
        client, server = await joined(Network(dice))
        server.transport.pause_reading()
        client.transport.write(bytes(WINDOW_BYTES + 64 * 1024))
        await asyncio.sleep(1.0)
        assert client.calls == ["made"], "the window and the buffer take this much"
        client.transport.write(b"!")
        assert client.calls == ["made", "pause"]
        await asyncio.sleep(60.0)
        assert client.transport.get_write_buffer_size() == 64 * 1024 + 1
        assert not server.received
        server.transport.resume_reading()
        assert not server.received, "resuming calls nobody back from within"
        await asyncio.sleep(1.0)
        assert client.calls == ["made", "pause", "resume"]
        assert len(server.received) == WINDOW_BYTES + 64 * 1024 + 1
        client.transport.close()

    run(flood, seed=1)


def test_write_buffer_limits_are_honoured():
    async def flood(dice):
        client, server = await joined(Network(dice))
        client.transport.set_write_buffer_limits(high=100, low=10)
        server.transport.pause_reading()
        client.transport.write(bytes(WINDOW_BYTES + 100))
        assert client.calls == ["made"]
        client.transport.write(b"!")
        assert client.calls == ["made", "pause"]
        server.transport.resume_reading()
        await asyncio.sleep(1.0)
        assert client.calls == ["made", "pause", "resume"]
        client.transport.close()

    run(flood, seed=1)


def test_reading_may_be_paused_before_it_begins():
    class Shy(Recorder):
        def connection_made(self, transport):
            super().connection_made(transport)
            transport.pause_reading()

    async def speak_first(dice):
        network = Network(dice)
        with listening(network) as servers:
            transport, client = await network.connect(NODE, Shy)
        servers[0].transport.write(b"welcome")
        await asyncio.sleep(1.0)
        assert not client.received
        transport.resume_reading()
        await asyncio.sleep(0)
        assert client.received == b"welcome"
        transport.close()

    run(speak_first, seed=1)


def test_a_reader_that_paused_does_not_learn_of_the_end():
    async def end_while_paused(dice):
        client, server = await joined(Network(dice))
        server.transport.pause_reading()
        client.transport.write(b"last words")
        client.transport.close()
        await asyncio.sleep(60.0)
        assert server.calls == ["made"]
        server.transport.resume_reading()
        await server.lost.wait()
        return server.calls, bytes(server.received)

    assert run(end_while_paused, seed=1).value == (["made", "data", "eof", "lost"], b"last words")


# Ends.


def test_what_was_written_before_a_close_still_arrives_even_if_it_waits_for_a_slow_reader():
    size = 5 * WINDOW_BYTES

    async def write_and_close(dice):
        client, server = await joined(Network(dice))
        server.transport.pause_reading()
        client.transport.write(bytes(size))
        client.transport.close()
        await asyncio.sleep(60.0)
        assert client.transport.is_closing()
        assert "lost" not in client.calls
        server.transport.resume_reading()
        await server.lost.wait()
        assert client.calls[-1] == "lost"
        return len(server.received), client.loss, server.loss

    assert run(write_and_close, seed=1).value == (size, None, None)


def test_connection_lost_is_called_soon_and_once_but_never_from_within_close():
    async def close_twice(dice):
        client, server = await joined(Network(dice))
        client.transport.close()
        client.transport.close()
        client.transport.abort()
        assert client.calls == ["made"]
        await asyncio.sleep(0)
        assert client.calls == ["made", "lost"]
        client.transport.write(b"into the void")
        await server.lost.wait()
        return client.calls, server.calls

    assert run(close_twice, seed=1).value == (["made", "lost"], ["made", "eof", "lost"])


def test_half_a_connection_can_be_closed():
    async def ask_and_listen(dice):
        client, server = await joined(Network(dice), keep_open_on_eof=True)
        client.transport.write(b"that is all")
        client.transport.write_eof()
        with pytest.raises(RuntimeError, match="after write_eof"):
            client.transport.write(b"or not")
        await asyncio.sleep(1.0)
        assert server.calls == ["made", "data", "eof"]
        server.transport.write(b"understood")
        server.transport.close()
        await client.lost.wait()
        return bytes(client.received), client.calls, server.calls[-1]

    assert run(ask_and_listen, seed=1).value == (b"understood", ["made", "data", "eof", "lost"], "lost")


def test_an_eof_written_behind_a_full_window_comes_after_the_last_byte():
    async def write_and_end(dice):
        client, server = await joined(Network(dice))
        client.transport.write(bytes(3 * WINDOW_BYTES))
        client.transport.write_eof()
        await server.lost.wait()
        return len(server.received)

    assert run(write_and_end, seed=1).value == 3 * WINDOW_BYTES


def test_an_abort_loses_what_has_not_arrived_and_looks_like_a_reset_or_an_eof_from_afar():
    async def write_and_abort(dice):
        client, server = await joined(Network(dice))
        client.transport.write(b"never heard")
        client.transport.abort()
        assert client.calls == ["made"]
        await server.lost.wait()
        assert (client.calls, client.loss) == (["made", "lost"], None)
        return bytes(server.received), type(server.loss)

    assert {run(write_and_abort, seed=seed).value for seed in SEEDS} == {
        (b"", type(None)),
        (b"", ConnectionResetError),
    }


def test_closing_without_reading_to_the_end_resets_the_other_side():
    async def hang_up_on(dice):
        client, server = await joined(Network(dice))
        server.transport.pause_reading()
        client.transport.write(b"a long story")
        await asyncio.sleep(1.0)
        server.transport.write(b"too long")
        server.transport.close()
        await client.lost.wait()
        return bytes(client.received), type(client.loss)

    assert run(hang_up_on, seed=1).value == (b"too long", ConnectionResetError)


def test_bytes_sent_to_one_who_has_closed_are_answered_with_a_reset():
    async def talk_on(dice):
        network = Network(dice, latency_s=STILL)
        with listening(network) as servers:
            _, client = await network.connect(NODE, lambda: Recorder(keep_open_on_eof=True))
        servers[0].transport.close()
        await asyncio.sleep(1.0)
        assert client.calls == ["made", "eof"]
        client.transport.write(b"hello?")
        await asyncio.sleep(1.0)
        client.transport.write(b"hello?")
        await asyncio.sleep(0)
        return type(client.loss)

    assert run(talk_on, seed=1).value is BrokenPipeError


# Faithfulness.


async def one_closes(client, server):
    client.transport.write(b"bye")
    client.transport.close()


async def one_closes_what_the_other_never_reads(client, server):
    server.transport.pause_reading()
    client.transport.write(b"a long story")
    await asyncio.sleep(A_TRIP_S)
    server.transport.write(b"too long")
    server.transport.close()


async def one_closes_behind_more_than_fits(client, server):
    client.transport.set_write_buffer_limits(high=2**30)
    client.transport.write(bytes(2**23))
    client.transport.close()


async def one_ends_and_the_other_answers(client, server):
    server.keep_open_on_eof = True
    client.transport.write(b"question")
    client.transport.write_eof()
    await server.hears(b"question")
    server.transport.write(b"answer")
    await client.hears(b"answer")
    server.transport.close()


async def one_talks_on_to_one_who_left(client, server):
    client.keep_open_on_eof = True
    server.transport.write(b"bye")
    server.transport.close()
    await client.ended.wait()
    while not client.lost.is_set():
        client.transport.write(b"hello?")
        await asyncio.sleep(A_TRIP_S)


async def one_that_paused_writes_to_one_who_broke_off(client, server):
    client.transport.write(b"unread")
    client.transport.pause_reading()
    server.transport.pause_reading()
    await asyncio.sleep(A_TRIP_S)
    server.transport.close()
    while not client.lost.is_set():
        await asyncio.sleep(A_TRIP_S)
        client.transport.write(b"hello?")


async def one_is_left_with_a_full_buffer(client, server):
    for end in (client, server):
        end.transport.pause_reading()
    client.transport.write(bytes(2**23))
    await asyncio.sleep(A_TRIP_S)
    server.transport.close()


STORIES = [
    one_is_left_with_a_full_buffer,
    one_closes,
    one_closes_what_the_other_never_reads,
    one_closes_behind_more_than_fits,
    one_ends_and_the_other_answers,
    one_talks_on_to_one_who_left,
    one_that_paused_writes_to_one_who_broke_off,
]


async def told(story, client, server):
    """Let a story unfold until both ends are lost; tell what each end was told."""
    async with asyncio.timeout(30.0):
        await story(client, server)
        for end in (client, server):
            await end.lost.wait()
    return [(end.calls, len(end.received), type(end.loss)) for end in (client, server)]


async def told_over_sockets(story):
    """Let the story unfold over real TCP and asyncio's real transports."""
    loop, server = asyncio.get_running_loop(), Recorder()
    async with await loop.create_server(lambda: server, "127.0.0.1", 0) as listener:
        _, client = await loop.create_connection(Recorder, *listener.sockets[0].getsockname())
        await server.made.wait()
        return await told(story, client, server)


@pytest.mark.parametrize("story", STORIES)
def test_protocols_are_told_what_real_sockets_tell_them(story):
    """The same story over TCP ends in the same calls, the same bytes and the same errors."""

    async def told_in_memory(dice):
        return await told(story, *await joined(Network(dice)))

    assert run(told_in_memory, seed=1).value == asyncio.run(told_over_sockets(story))


# Faults.


@pytest.mark.parametrize("count", [0, 1, 4, 9, 10])
@pytest.mark.parametrize(("seen_as", "loss"), [(End.RESET, ConnectionResetError), (End.EOF, type(None))])
@pytest.mark.parametrize("seed", range(5))
def test_a_connection_can_be_cut_at_any_byte(count, seen_as, loss, seed):
    async def send_over_a_bad_wire(dice):
        network = Network(dice)
        network.on_connect(NODE, lambda connection: connection.to_server.cut_after(count, seen_as=seen_as))
        client, server = await joined(network)
        client.transport.write(b"01234")
        client.transport.write(b"56789")
        await server.lost.wait()
        await client.lost.wait()
        assert bytes(server.received) == b"0123456789"[:count]
        assert (type(server.loss), type(client.loss)) == (loss, loss)

    run(send_over_a_bad_wire, seed=seed)


def test_a_fault_befalls_no_further_connection_once_it_is_taken_away():
    async def recover(dice):
        network = Network(dice)
        network.on_connect(NODE, Connection.cut)
        _, first = await joined(network)
        await first.lost.wait()
        network.on_connect(NODE, None)
        client, second = await joined(network)
        client.transport.write(b"well again")
        client.transport.close()
        await second.lost.wait()
        return type(first.loss), bytes(second.received)

    assert run(recover, seed=1).value == (ConnectionResetError, b"well again")


def test_whoever_writes_on_after_a_cut_that_looked_like_an_eof_is_reset():
    async def write_on(dice):
        network = Network(dice)
        client, server = await joined(network, keep_open_on_eof=True)
        client.keep_open_on_eof = True
        for end in (client, server):
            end.transport.write(bytes(WINDOW_BYTES))  # all lost, but no longer in the way of what follows
        network.cut(NODE, seen_as=End.EOF)
        assert (client.calls, server.calls) == (["made", "eof"], ["made", "eof"])
        for end in (client, server):
            end.transport.write(b"are you there?")
            await asyncio.sleep(1.0)
            end.transport.write(b"are you there?")
            await end.lost.wait()
        return type(client.loss), type(server.loss)

    assert run(write_on, seed=1).value == (BrokenPipeError, BrokenPipeError)


@pytest.mark.parametrize("seen_as", list(End))
def test_all_connections_of_an_address_can_be_cut_at_a_time(seen_as):
    async def cut_one_node(dice):
        network = Network(dice)
        doomed = [await joined(network) for _ in range(3)]
        spared = await joined(network, ("node-2", 8443))
        for client, _ in doomed:  # a full window, whose sender must learn of the cut too
            client.transport.write(bytes(3 * WINDOW_BYTES))
        network.loop.call_later(0.001, lambda: network.cut(NODE, seen_as=seen_as))
        for end in sum(doomed, ()):
            await end.lost.wait()
        assert len(network.connections) == 1
        assert "lost" not in spared[0].calls
        spared[0].transport.close()

    run(cut_one_node, seed=1)


def test_a_partition_is_silence_and_healing_it_delivers_what_was_sent():
    async def part_and_talk(dice):
        network = Network(dice)
        client, server = await joined(network)
        client.transport.write(b"one ")
        network.partition(NODE)
        for word in (b"two ", b"three"):
            client.transport.write(word)
            await asyncio.sleep(3600.0)
        assert server.calls == ["made"]
        network.heal(NODE)
        client.transport.close()
        await server.lost.wait()
        return bytes(server.received)

    assert run(part_and_talk, seed=1).value == b"one two three"


def test_a_close_across_a_partition_is_heard_of_only_after_it_is_healed():
    async def part_and_close(dice):
        network = Network(dice)
        client, server = await joined(network)
        network.partition(NODE)
        server.transport.close()
        await server.lost.wait()
        await asyncio.sleep(3600.0)
        assert client.calls == ["made"]
        network.heal(NODE)
        await client.lost.wait()
        return client.calls

    assert run(part_and_close, seed=1).value == ["made", "eof", "lost"]


def test_connecting_across_a_partition_hangs_until_it_is_healed():
    async def connect_and_heal(dice):
        network = Network(dice)
        network.partition(NODE)
        asyncio.get_running_loop().call_later(100.0, network.heal, NODE)
        client, _ = await joined(network)
        client.transport.close()

    assert run(connect_and_heal, seed=1).elapsed_s == pytest.approx(100.0, abs=0.1)


def test_connecting_across_a_partition_for_ever_is_a_deadlock():
    async def connect_in_vain(dice):
        network = Network(dice)
        network.partition(NODE)
        await joined(network)

    with pytest.raises(Deadlock, match=r"Network\.connect"):
        run(connect_in_vain, seed=1)


def test_a_partition_may_refuse_instead():
    async def knock(dice):
        network = Network(dice)
        network.partition(NODE, refuse=True)
        with listening(network), pytest.raises(ConnectionRefusedError, match="cannot be reached"):
            await network.connect(NODE, Recorder)

    run(knock, seed=1)


# Accounts.


def test_an_open_connection_fails_the_run_and_says_how_far_it_is_with_ending():
    async def leave_it_open(dice):
        client, server = await joined(Network(dice), keep_open_on_eof=True)
        client.transport.close()
        await asyncio.sleep(1.0)
        assert not server.transport.is_closing()

    with pytest.raises(LeftBehind, match=r"connection #0 to \('node-1', 8443\) \(client gone, server open\)"):
        run(leave_it_open, seed=1)


def test_an_open_listener_fails_the_run():
    async def leave_it_listening(dice):
        Network(dice).listen(NODE, Recorder)

    with pytest.raises(LeftBehind, match=r"listener \('node-1', 8443\)"):
        run(leave_it_listening, seed=1)


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_each_end_is_lost_once_and_a_seed_replays_exactly(seed):
    """Random verbs on random ends of random connections: every story is told in the same order again."""

    async def havoc(dice):
        network = Network(dice)
        pairs = [await joined(network, keep_open_on_eof=dice.random() < 0.5) for _ in range(4)]
        ends = sum(pairs, ())
        for _ in range(60):
            transport = dice.choice(ends).transport
            deed = dice.randrange(12)
            if deed < 6 and not transport._eof_written:
                transport.write(dice.randbytes(dice.randrange(1, 60_000)))
            elif deed == 6:
                transport.pause_reading()
            elif deed in (7, 8):
                transport.resume_reading()
            elif deed == 9:
                transport.write_eof()
            elif deed == 10:
                dice.choice([transport.close, transport.abort, transport.connection.cut])()
            else:
                dice.choice([network.partition, network.heal])(NODE)
            await asyncio.sleep(dice.choice([0, 0.0005, 0.01]))
        network.heal(NODE)
        for end in ends:
            end.transport.resume_reading()
        await asyncio.sleep(1.0)
        for end in ends:
            end.transport.abort()
        for end in ends:
            await end.lost.wait()
        assert [end.calls.count("lost") for end in ends] == [1] * len(ends)
        assert all(end.calls[-1] == "lost" for end in ends)
        return [end.calls for end in ends]

    assert run(havoc, seed=seed) == run(havoc, seed=seed)


# A real server.


async def hello(_scope, receive, send):
    """Take the body, then greet; uvicorn's 100 Continue goes out with the first `receive`."""
    await asyncio.sleep(0.1)
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


def served(network: Network, app, address=NODE):
    """Let uvicorn's own httptools protocol serve `app` on `address`."""
    config = uvicorn.Config(app, lifespan="off", log_config=None)
    config.load()
    state = ServerState()
    return network.listen(
        address, lambda: HttpToolsProtocol(config=config, server_state=state, app_state={}, _loop=network.loop)
    )


async def commit_and_idle(dice):
    """Call once with Expect: 100-continue, then keep still until the server closes; tell when each thing came."""
    network = Network(dice, latency_s=STILL)
    server = served(network, hello)
    transport, client = await network.connect(NODE, Recorder)
    asked_s = network.loop.time()
    transport.write(b"POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ntransfer-encoding: chunked\r\n\r\n")
    await client.hears(b"100 Continue\r\n\r\n")
    told_s = network.loop.time() - asked_s
    transport.write(b"3\r\nabc\r\n0\r\n\r\n")
    await client.lost.wait()
    answered_s = client.received_at_s[-1]
    server.close()
    return told_s, network.loop.time() - answered_s, bytes(client.received)


def test_uvicorn_runs_unchanged_and_its_timers_fire_at_their_virtual_times():
    told_s, idle_s, received = run(commit_and_idle, seed=1).value
    assert told_s == pytest.approx(0.1, abs=0.01), "the commit point is the application's first receive"
    assert idle_s == pytest.approx(5.0, abs=0.01), "uvicorn's keep-alive timer"
    assert received.endswith(b"\r\n\r\nhello")


def test_a_seed_of_uvicorn_replays_exactly():
    assert run(commit_and_idle, seed=7) == run(commit_and_idle, seed=7)


def test_uvicorn_is_held_back_by_a_client_that_does_not_read():
    sent_bytes = []

    async def stream(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(64):
            await send({"type": "http.response.body", "body": bytes(64 * 1024), "more_body": True})
            sent_bytes.append(64 * 1024)
        await send({"type": "http.response.body", "body": b""})

    async def read_slowly(dice):
        network = Network(dice)
        server = served(network, stream)
        transport, client = await network.connect(NODE, Recorder)
        transport.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await asyncio.sleep(0.1)
        transport.pause_reading()
        sent_before = sum(sent_bytes)
        await asyncio.sleep(60.0)
        sent_while_paused = sum(sent_bytes) - sent_before
        transport.resume_reading()
        await client.lost.wait()
        server.close()
        assert client.received.endswith(b"\r\n0\r\n\r\n")
        return sent_while_paused

    assert run(read_slowly, seed=1).value <= 256 * 1024
