"""A daemon starts, reloads, drains and ends; an operator's mistake is words, not a traceback."""

import os
import signal

import pytest

from substrate_seam.events import DaemonStarted, DaemonStopped, DaemonStopping
from substrate_service.address import TcpAddress
from substrate_service.daemon import Assembled, Duties, exit_status, run_daemon, two_listeners
from substrate_service.signals import Stopping


class OperatorsMistake(Exception):
    """Something an operator can mend."""


async def hello(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def listeners():
    anywhere = TcpAddress("127.0.0.1", 0)
    return two_listeners("X_", (anywhere, anywhere), (hello, hello), refusal=lambda *_: ([], b""), emit=lambda _: None)


async def test_a_daemon_tells_its_life_and_drains_with_what_time_it_has():
    """Started with its addresses, stopping by whom, stopped clean; the drain is told its seconds."""
    events, drained, stopping = [], [], Stopping()

    async def drain(within_s):
        drained.append(within_s)

    async def reload():
        stopping.ask("SIGTERM")

    def announce(_):
        os.kill(os.getpid(), signal.SIGHUP)

    status = await run_daemon(
        "d",
        "1",
        Assembled(
            listeners=listeners(),
            duties=Duties(reload=reload, drain=drain, announce=announce),
            drain_within_s=7.0,
        ),
        stopping=stopping,
        emit=events.append,
    )
    assert status == 0
    assert drained == [7.0]
    started, asked, stopped = events
    assert isinstance(started, DaemonStarted)
    assert started.listen.startswith("127.0.0.1:")
    assert asked == DaemonStopping(daemon="d", signal="SIGTERM", within_s=7.0)
    assert stopped == DaemonStopped(daemon="d", clean=True)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_mistake_becomes_its_words_and_status_2(wrapped, capsys):
    """Also when a task group has wrapped it; there is never a traceback for it."""

    def broken():
        mistake = OperatorsMistake("X_LISTEN_ADDR: change it")
        raise ExceptionGroup("tasks", [mistake]) if wrapped else mistake

    assert exit_status("d", broken, mistakes=(OperatorsMistake,)) == 2
    assert capsys.readouterr().err == "d: X_LISTEN_ADDR: change it\n"


def test_a_defect_keeps_its_traceback():
    """What is no mistake of the operator's is ours to see whole."""
    with pytest.raises(ZeroDivisionError):
        exit_status("d", lambda: 1 // 0, mistakes=(OperatorsMistake,))
