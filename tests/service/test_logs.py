"""Every event is one line of JSON, or one readable line; a slow reader loses lines and never costs time."""

import asyncio
import contextlib
import json
import logging
import os
import threading

import pytest
from msgspec import structs

from service.every_event import KINDS, made_up
from substrate_seam.events import (
    DefectFound,
    GuestGone,
    GuestParked,
    InvocationAccepted,
    InvocationEnded,
    WarningRaised,
)
from substrate_service.logs import STEPS, EventLog, event_log, library_logs_to
from substrate_service.sinks import fan_out

NOON_S = 1_700_000_000.1239


@contextlib.contextmanager
def pipe():
    reading, writing = os.pipe()
    try:
        yield reading, writing
    finally:
        os.close(reading)
        with contextlib.suppress(OSError):
            os.close(writing)


def written(events, *, readable=False, quiet=frozenset(), key=b"k"):
    """What a log that is closed at once has written."""
    with pipe() as (reading, writing):
        with event_log(writing, readable=readable, quiet=quiet, key=key, clock=lambda: NOON_S) as log:
            emit = fan_out(log.sink)
            for event in events:
                emit(event)
        os.close(writing)
        with open(reading, "rb", closefd=False) as lines:
            return lines.read().decode()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_event_is_one_line_of_json(kind):
    event = made_up(kind)
    [line] = written([event]).splitlines()
    fields = json.loads(line)
    assert fields["time"] == "2023-11-14T22:13:20.123Z"
    assert fields["level"] in {"info", "warning", "error"}
    assert fields["event"] == kind.__struct_config__.tag
    for name in set(kind.__struct_fields__) & set(fields) - {"session"}:
        assert fields[name] == getattr(event, name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_event_can_be_read_on_a_terminal(kind):
    assert kind.__struct_config__.tag in written([made_up(kind)], readable=True).splitlines()[0]


def test_a_readable_line_has_the_time_the_name_and_the_fields():
    lines = written(
        [
            GuestParked(guest="vm-1", workload="thumb nail", parked=2),
            WarningRaised(message="a\x1b[31mb", hint=""),
            DefectFound(message="broke", traceback="one\n  two\x07"),
        ],
        readable=True,
    )
    assert lines == (
        '22:13:20.123 guest.parked guest=vm-1 workload="thumb nail" parked=2\n'
        '22:13:20.123 WARNING warning.raised message="a\\u001b[31mb"\n'
        "22:13:20.123 ERROR defect.found message=broke\n"
        "    one\n"
        "      two?\n"
    )


def test_a_call_that_goes_well_is_one_line():
    """Its steps are in the story that `explain` tells, and in the metrics."""
    lines = written(map(made_up, KINDS), quiet=STEPS - {InvocationEnded}).splitlines()
    told = {json.loads(line)["event"] for line in lines}
    assert {kind.__struct_config__.tag for kind in STEPS} & told == {"invocation.ended", "guest.gone"}
    assert len(told) == len(KINDS) - len(STEPS) + 2  # this guest ended by itself
    assert written([GuestGone(guest="g", workload="w")], quiet=STEPS) == ""


def accepted(session):
    return InvocationAccepted(invocation_id="i", workload="w", caller="c", body_bytes=1, session=session)


def test_what_a_guest_wrote_is_logged_only_if_it_ended_by_itself():
    """The output of somebody's workload is no business of the log; the story of the call has it."""
    gone = GuestGone(guest="g", workload="w", console="printed")
    assert "console" not in json.loads(written([gone]))
    assert json.loads(written([structs.replace(gone, exit="exit status 1")]))["console"] == "printed"


def test_session_ids_are_hashed_with_a_key_and_can_still_be_compared():
    first, again, other = (json.loads(line) for line in written(map(accepted, ["s1", "s1", "s2"])).splitlines())
    assert "s1" not in first["session"]
    assert first["session"] == again["session"] != other["session"]
    assert json.loads(written([accepted("s1")], key=b"another"))["session"] != first["session"]
    assert "session" not in json.loads(written([accepted(None)]))


def test_an_event_that_cannot_be_written_is_told_instead():
    [line] = written([WarningRaised(message="\ud800")]).splitlines()
    fields = json.loads(line)
    assert (fields["event"], fields["message"]) == ("defect.found", "an event cannot be written")


async def test_lines_are_written_together_a_moment_later():
    with pipe() as (reading, writing):
        os.set_blocking(reading, False)
        log = EventLog(writing, readable=False)
        log(GuestParked(guest="a", workload="w", parked=1))
        log(GuestParked(guest="b", workload="w", parked=1))
        with pytest.raises(BlockingIOError):
            os.read(reading, 1)
        arrived = asyncio.Event()
        asyncio.get_running_loop().add_reader(reading, arrived.set)
        await arrived.wait()
        asyncio.get_running_loop().remove_reader(reading)
        assert os.read(reading, 65536).count(b"\n") == 2


async def test_a_reader_that_does_not_read_costs_lines_and_never_time():
    with pipe() as (reading, writing):
        log = EventLog(writing, readable=False)
        for number in range(30_000):
            log(GuestParked(guest=f"g{number}", workload="w", parked=1))
            if number % 1000 == 0:
                await asyncio.sleep(0)  # would hang here if writing waited for the reader
        read = b""
        while b"log.dropped" not in read:
            await asyncio.sleep(0)
            log.flush()
            read += os.read(reading, 65536)
        *kept, dropped = map(json.loads, read.decode().splitlines())
        assert [line["guest"] for line in kept] == [f"g{number}" for number in range(len(kept))]
        assert dropped["lines"] == 30_000 - len(kept) > 0
        log(GuestParked(guest="again", workload="w", parked=1))
        log.flush()
        assert json.loads(os.read(reading, 65536))["guest"] == "again"


async def test_what_a_slow_reader_left_is_written_later_without_a_new_event():
    with pipe() as (reading, writing):
        log = EventLog(writing, readable=False)
        for number in range(2000):
            log(GuestParked(guest=f"g{number}", workload="w", parked=1))
        await asyncio.sleep(0)
        read, readable, loop = b"", asyncio.Event(), asyncio.get_running_loop()
        os.set_blocking(reading, False)
        loop.add_reader(reading, readable.set)
        while b"g1999" not in read:
            await asyncio.wait_for(readable.wait(), 10.0)
            readable.clear()
            with contextlib.suppress(BlockingIOError):
                read += os.read(reading, 65536)
        loop.remove_reader(reading)
        assert read.count(b"\n") == 2000


def test_a_reader_that_is_gone_harms_nobody():
    reading, writing = os.pipe()
    os.close(reading)
    with event_log(writing) as log:
        log(GuestParked(guest="a", workload="w", parked=1))
    os.close(writing)


def test_lines_to_a_file_are_complete(tmp_path):
    with (tmp_path / "log").open("wb") as file, event_log(file.fileno()) as log:
        for number in range(5000):
            log(GuestParked(guest=f"g{number}", workload="w", parked=1))
    assert len((tmp_path / "log").read_text().splitlines()) == 5000


def test_what_libraries_log_becomes_events():
    events = []
    with library_logs_to(events.append):
        logging.getLogger("asyncio").warning("took %.1f s", 2.0)
        logging.getLogger("asyncio").info("chatter")
        try:
            raise LookupError("x")
        except LookupError:
            logging.getLogger("uvicorn.error").exception("broke")
        logging.getLogger("careless").error("%d", "not a number")
    logging.getLogger("asyncio").warning("afterwards")
    assert [(event.logger, event.severity, event.message) for event in events] == [
        ("asyncio", "warning", "took 2.0 s"),
        ("uvicorn.error", "error", "broke"),
        ("careless", "error", "%d ('not a number',)"),
    ]
    assert "LookupError: x" in events[1].traceback


async def test_threads_may_log_too():
    with pipe() as (reading, writing):
        log = EventLog(writing, readable=False)
        threads = [
            threading.Thread(target=lambda: [log(GuestParked(guest="t", workload="w", parked=1)) for _ in range(50)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        log.flush()
        assert os.read(reading, 2**20).count(b"\n") == 200
