"""A daemon serves until asked to stop, lets what runs come to its end, and leaves nothing behind."""

import asyncio
import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.loopback import PATIENCE_S, answer, refusal, whole_body
from substrate_service.address import ListenFailed, TcpAddress, UnixAddress
from substrate_service.listener import strict_config
from substrate_service.serving import Listener, serve
from substrate_service.signals import Stopping, stop_on_signals

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
LOOPBACK = TcpAddress("127.0.0.1", 0)


async def hello(scope, receive, send):
    await answer(send, body=b"hello")


def listener(app, address=LOOPBACK, *, events=None, outlasts=False, setting="FC_LISTEN_ADDR"):
    emit = [].append if events is None else events.append
    config = strict_config(app, refusal=refusal, emit=emit)
    return Listener(setting=setting, address=address, config=config, outlasts=outlasts)


class Daemon:
    """`serve` at work: where it listens, and what came of it."""

    def __init__(self):
        self.stopping = Stopping()
        self.addresses = []
        self.listening = asyncio.Event()

    def is_listening(self, addresses):
        self.addresses = addresses
        self.listening.set()

    async def exchange(self, address, data=GET):
        reader, writer = await self.connect(address)
        writer.write(data)
        reply = await asyncio.wait_for(reader.readuntil(b"hello"), PATIENCE_S)
        writer.transport.abort()
        return reply

    async def connect(self, address):
        if isinstance(address, UnixAddress):
            return await asyncio.open_unix_connection(address.path)
        return await asyncio.open_connection("127.0.0.1", address.port)


@contextlib.asynccontextmanager
async def serving(*listeners, drain_s=PATIENCE_S):
    daemon = Daemon()
    async with asyncio.TaskGroup() as group:
        daemon.served = group.create_task(
            serve(listeners, stopping=daemon.stopping, drain_s=drain_s, listening=daemon.is_listening)
        )
        await asyncio.wait_for(daemon.listening.wait(), PATIENCE_S)
        yield daemon
        daemon.stopping.ask("the test")
        await asyncio.wait_for(asyncio.wait({daemon.served}), PATIENCE_S)


def mode_of(path):
    return stat.S_IMODE(Path(path).stat().st_mode)


def names_in(folder):
    return [path.name for path in folder.iterdir()]


async def test_every_listener_is_served_with_its_own_application(tmp_path):
    async def admin(scope, receive, send):
        await answer(send, body=b"admin says hello")

    path = str(tmp_path / "admin.sock")
    async with serving(
        listener(hello), listener(admin, UnixAddress(path)), listener(hello, TcpAddress("", 0))
    ) as daemon:
        public, private, everywhere = daemon.addresses
        assert public.port != 0
        assert mode_of(path) == 0o660
        assert (await daemon.exchange(public)).endswith(b"\r\n\r\nhello")
        assert (await daemon.exchange(private)).endswith(b"\r\n\r\nadmin says hello")
        reply = await daemon.exchange(everywhere)
        assert b"\r\ndate: " in reply
        assert b"server:" not in reply
    assert daemon.served.result() is True
    assert names_in(tmp_path) == []


async def test_a_stop_lets_a_request_come_to_its_end_and_accepts_no_other():
    at_work, finish = asyncio.Event(), asyncio.Event()

    async def app(scope, receive, send):
        at_work.set()
        await finish.wait()
        await answer(send, body=b"hello")

    async with serving(listener(app)) as daemon:
        reader, writer = await daemon.connect(daemon.addresses[0])
        idle_reader, idle_writer = await daemon.connect(daemon.addresses[0])
        writer.write(GET)
        await at_work.wait()
        daemon.stopping.ask("the test")
        assert await asyncio.wait_for(idle_reader.read(), PATIENCE_S) == b""
        with pytest.raises(ConnectionRefusedError):
            await daemon.connect(daemon.addresses[0])
        assert not daemon.served.done()
        finish.set()
        reply = await asyncio.wait_for(reader.read(), PATIENCE_S)
        assert b"connection: close" in reply
        assert reply.endswith(b"hello")
        assert await asyncio.wait_for(daemon.served, PATIENCE_S) is True
        writer.close()
        idle_writer.close()


@pytest.mark.parametrize("how", ["the drain takes too long", "it is forced"])
async def test_what_does_not_end_in_time_is_cut_and_the_stop_is_not_clean(how):
    at_work, cancelled, events = asyncio.Event(), asyncio.Event(), []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        at_work.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    late = how == "the drain takes too long"
    async with serving(listener(app, events=events), drain_s=0.1 if late else 1000.0) as daemon:
        reader, writer = await daemon.connect(daemon.addresses[0])
        writer.write(GET)
        await at_work.wait()
        daemon.stopping.ask("the test")
        if not late:
            daemon.stopping.ask("the test, again")
        assert await asyncio.wait_for(daemon.served, PATIENCE_S) is False
        assert cancelled.is_set()
        with contextlib.suppress(ConnectionResetError):
            assert (await asyncio.wait_for(reader.read(), PATIENCE_S)).count(b"0\r\n\r\n") == 0
        assert events == []
        writer.close()


async def test_a_peer_that_reads_nothing_does_not_outlast_the_drain():
    replied = asyncio.Event()

    async def app(scope, receive, send):
        await answer(send, body=b"x" * 30_000_000)
        replied.set()

    async with serving(listener(app), drain_s=0.2) as daemon:
        sock = socket.socket()
        sock.connect(("127.0.0.1", daemon.addresses[0].port))
        sock.sendall(GET)
        await asyncio.wait_for(replied.wait(), PATIENCE_S)
        daemon.stopping.ask("the test")
        assert await asyncio.wait_for(daemon.served, PATIENCE_S) is False
        sock.close()


async def test_the_listener_that_outlasts_the_others_answers_while_they_drain():
    at_work, finish = asyncio.Event(), asyncio.Event()

    async def app(scope, receive, send):
        at_work.set()
        await finish.wait()
        await answer(send, body=b"hello")

    async with serving(listener(app), listener(hello, outlasts=True)) as daemon:
        public, admin = daemon.addresses
        async with asyncio.TaskGroup() as group:
            call = group.create_task(daemon.exchange(public))
            await at_work.wait()
            daemon.stopping.ask("the test")
            assert (await daemon.exchange(admin)).endswith(b"hello")
            with pytest.raises(ConnectionRefusedError):
                await daemon.connect(public)
            finish.set()
            assert (await call).endswith(b"hello")
        assert await asyncio.wait_for(daemon.served, PATIENCE_S) is True


async def test_an_endless_reply_of_the_listener_that_outlasts_is_cut_and_no_fault():
    begun = asyncio.Event()

    async def watch(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        begun.set()
        await whole_body(receive)
        await receive()

    async with serving(listener(hello), listener(watch, outlasts=True)) as daemon:
        reader, writer = await daemon.connect(daemon.addresses[1])
        writer.write(GET)
        await begun.wait()
        daemon.stopping.ask("the test")
        assert await asyncio.wait_for(daemon.served, PATIENCE_S) is True
        assert b"0\r\n\r\n" not in await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()


async def test_a_cancelled_daemon_leaves_no_connection_and_no_task():
    at_work = asyncio.Event()

    async def app(scope, receive, send):
        at_work.set()
        await whole_body(receive)
        await receive()

    config = listener(app)
    async with serving(config) as daemon:
        reader, writer = await daemon.connect(daemon.addresses[0])
        writer.write(GET)
        await at_work.wait()
        daemon.served.cancel()
        assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
        writer.close()


# Addresses that cannot be had.


@contextlib.contextmanager
def occupied(kind, folder):
    if kind == "tcp":
        with socket.create_server(("127.0.0.1", 0)) as sock:
            yield TcpAddress("127.0.0.1", sock.getsockname()[1])
    elif kind == "unix":
        path = str(folder / "s")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path)
            sock.listen()
            yield UnixAddress(path)
    else:
        path = folder / "s"
        path.write_text("precious")
        yield UnixAddress(str(path))
        assert path.read_text() == "precious"


@pytest.mark.parametrize("kind", ["tcp", "unix", "a file in the way"])
async def test_an_address_in_use_names_the_setting_and_nothing_is_served(kind, tmp_path):
    with occupied(kind, tmp_path) as address:
        with pytest.raises(ListenFailed, match=f"FC_ADMIN_ADDR: cannot listen on {address}: ") as failed:
            await serve(
                [listener(hello), listener(hello, address, setting="FC_ADMIN_ADDR")],
                stopping=Stopping(),
                drain_s=1.0,
            )
        if kind != "a file in the way":
            assert "Stop it, or choose another address" in str(failed.value)


async def test_a_socket_that_a_dead_daemon_left_is_replaced(tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    async with serving(listener(hello, UnixAddress(path))) as daemon:
        assert (await daemon.exchange(UnixAddress(path))).endswith(b"hello")


async def test_an_address_of_another_machine_says_so():
    with pytest.raises(ListenFailed, match="this machine has no such address"):
        await serve([listener(hello, TcpAddress("203.0.113.1", 80))], stopping=Stopping(), drain_s=1.0)


# Signals.


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
async def test_the_first_signal_asks_and_the_second_forces(first):
    stopping = Stopping()
    with stop_on_signals(stopping):
        os.kill(os.getpid(), first)
        await asyncio.wait_for(stopping.requested.wait(), PATIENCE_S)
        assert (stopping.by, stopping.forced.is_set()) == (first.name, False)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(stopping.forced.wait(), PATIENCE_S)
        assert stopping.by == first.name
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


DAEMON = """
import asyncio, sys
from substrate_service.address import TcpAddress
from substrate_service.listener import strict_config
from substrate_service.serving import Listener, run, serve
from substrate_service.signals import Stopping, stop_on_signals

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": b"begun", "more_body": True})
    if scope["path"] == "/forever":
        await asyncio.Event().wait()
    await send({"type": "http.response.body"})

class Told(Stopping):
    def ask(self, by):
        super().ask(by)
        print(by, flush=True)

async def main():
    stopping = Told()
    config = strict_config(app, refusal=lambda *_: ([], b""), emit=print)
    place = Listener(setting="LISTEN", address=TcpAddress("127.0.0.1", 0), config=config)
    with stop_on_signals(stopping):
        clean = await serve([place], stopping=stopping, drain_s=float(sys.argv[1]),
                            listening=lambda addresses: print(addresses[0].port, flush=True))
    return 0 if clean else 1

sys.exit(run(main()))
"""


@pytest.mark.parametrize(
    ("path", "drain_s", "signals", "status"),
    [(b"/", 60.0, 1, 0), (b"/forever", 0.2, 1, 1), (b"/forever", 60.0, 2, 1)],
    ids=["clean", "drain timed out", "forced"],
)
def test_the_exit_status_says_whether_the_stop_was_clean(path, drain_s, signals, status):
    argv = [sys.executable, "-c", DAEMON, str(drain_s)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as daemon:
        port = int(daemon.stdout.readline())
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as sock:
            sock.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: a\r\n\r\n")
            while b"begun" not in sock.recv(4096):
                pass
            for _ in range(signals):
                daemon.send_signal(signal.SIGTERM)
                assert daemon.stdout.readline() == b"SIGTERM\n"
            _, errors = daemon.communicate(timeout=PATIENCE_S)
    assert (daemon.returncode, errors) == (status, b"")


README = Path(__file__).parents[2] / "packages" / "substrate-service" / "README.md"


def test_the_example_of_the_readme_runs(tmp_path):
    code = README.read_text().split("```python\n")[1].split("```")[0]
    place = tmp_path / "s"
    environment = {**os.environ, "HELLO_LISTEN_ADDR": f"unix:{place}"}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE) as daemon:
        with socket.socket(socket.AF_UNIX) as sock:
            for _ in range(200):
                with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                    sock.connect(str(place))
                    break
                assert daemon.poll() is None
                time.sleep(0.05)  # another process starts; there is nothing to wait on
            sock.sendall(GET)
            assert sock.recv(4096).startswith(b"HTTP/1.1 200 OK\r\n")
        daemon.send_signal(signal.SIGTERM)
        _, errors = daemon.communicate(timeout=PATIENCE_S)
    assert (daemon.returncode, errors) == (0, b"")
