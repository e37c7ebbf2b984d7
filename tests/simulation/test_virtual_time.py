"""The test loop keeps its promises: time is free, a seed replays, and nothing is left behind unnoticed."""

import asyncio
import gc
import os
import subprocess
import sys
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from simulation.virtual_time import (
    Deadlock,
    LeftBehind,
    Livelock,
    OutOfTime,
    OutsideVirtualTime,
    VirtualLoop,
    run,
)


def test_a_year_of_sleep_takes_no_time_at_all():
    async def sleep_for_a_year(_dice):
        await asyncio.sleep(365 * 86_400)
        return "rested"

    began_s = time.process_time()
    outcome = run(sleep_for_a_year, seed=1, time_limit_s=float("inf"))
    assert outcome.value == "rested"
    assert outcome.elapsed_s == pytest.approx(365 * 86_400)
    assert time.process_time() - began_s < 1.0


def test_timers_fire_in_the_order_of_their_times_and_see_those_times():
    async def three_timers(_dice):
        loop, fired = asyncio.get_running_loop(), []
        for delay_s in (3.0, 1.0, 2.0):
            loop.call_later(delay_s, lambda: fired.append(loop.time()))
        await asyncio.sleep(4.0)
        return fired

    assert run(three_timers, seed=1).value == pytest.approx([1.0, 2.0, 3.0])


def test_a_timeout_passes_at_its_virtual_time():
    async def wait_in_vain(_dice):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30.0):
                await asyncio.Event().wait()

    assert run(wait_in_vain, seed=1).elapsed_s == pytest.approx(30.0)


def test_tasks_that_wait_for_each_other_are_a_deadlock_that_names_them():
    async def each_waits_for_the_other(_dice):
        left, right = asyncio.Event(), asyncio.Event()

        async def hand_over(first, then):
            await first.wait()
            then.set()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(hand_over(left, right), name="left hand")
            tasks.create_task(hand_over(right, left), name="right hand")

    with pytest.raises(Deadlock, match=r"'left hand' in .*hand_over.* > Event\.wait(.|\n)*'right hand' in"):
        run(each_waits_for_the_other, seed=1)


def test_a_loop_that_never_rests_is_a_livelock_and_not_a_hang():
    async def spin(_dice):
        for _ in count():
            await asyncio.sleep(0)

    with pytest.raises(Livelock, match="after 1000 passes"):
        run(spin, seed=1, passes_max=1000)


def test_a_run_that_outlives_its_time_limit_fails():
    async def tick(_dice):
        for _ in count():
            await asyncio.sleep(1.0)

    with pytest.raises(OutOfTime, match=r"within 60\.0 virtual seconds"):
        run(tick, seed=1, time_limit_s=60.0)


def test_a_failing_run_tells_its_seed_and_its_time():
    async def fail(_dice):
        await asyncio.sleep(2.5)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken") as failure:
        run(fail, seed=4711)
    assert failure.value.__notes__[0].startswith("seed 4711, at 2.500000 s")


def test_a_task_left_behind_fails_the_run():
    async def leave_a_task(_dice):
        asyncio.get_running_loop().create_task(asyncio.sleep(3600), name="forgotten")
        await asyncio.sleep(0)

    with pytest.raises(LeftBehind, match="task 'forgotten' in sleep"):
        run(leave_a_task, seed=1)


def test_a_timer_left_behind_fails_the_run_unless_it_was_cancelled():
    def ring():
        """Do nothing: what matters is that it is scheduled."""

    async def leave_a_timer(_dice):
        asyncio.get_running_loop().call_later(3600, ring)

    async def cancel_a_timer(_dice):
        asyncio.get_running_loop().call_later(3600, ring).cancel()

    with pytest.raises(LeftBehind, match=r"timer .*ring"):
        run(leave_a_timer, seed=1)
    run(cancel_a_timer, seed=1)


def test_an_open_async_generator_left_behind_fails_the_run():
    async def numbers():
        yield 1
        yield 2

    kept = []

    async def leave_a_generator(_dice):
        kept.append(numbers())
        await anext(kept[0])

    with pytest.raises(LeftBehind, match=r"async generator .*numbers"):
        run(leave_a_generator, seed=1)


def test_a_collection_that_must_be_empty_is_looked_at_in_the_end():
    async def open_without_closing(_dice):
        asyncio.get_running_loop().must_be_empty("door", ["the front one"])

    with pytest.raises(LeftBehind, match="door 'the front one'"):
        run(open_without_closing, seed=1)


def test_what_ends_by_itself_soon_after_is_not_left_behind():
    async def end_late(_dice):
        asyncio.get_running_loop().create_task(asyncio.sleep(9.0))

    assert run(end_late, seed=1).elapsed_s == 0.0
    with pytest.raises(LeftBehind):
        run(end_late, seed=1, settle_s=8.0)


def test_an_exception_in_a_callback_fails_the_run_at_once():
    def trip():
        raise ZeroDivisionError("tripped")

    async def sleep_on(_dice):
        asyncio.get_running_loop().call_later(1.0, trip)
        await asyncio.sleep(100.0)

    with pytest.raises(ExceptionGroup) as failure:
        run(sleep_on, seed=1)
    assert isinstance(failure.value.exceptions[0], ZeroDivisionError)
    assert "at 1.000000 s" in failure.value.__notes__[0]


@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_a_task_whose_failure_nobody_reads_fails_the_run(in_a_cycle):
    async def fail():
        raise ZeroDivisionError("unread")

    async def drop_a_task(_dice):
        task = asyncio.get_running_loop().create_task(fail())
        if in_a_cycle:
            cycle = [task]
            cycle.append(cycle)
        await asyncio.sleep(1.0)

    with pytest.raises(ExceptionGroup) as failure:
        run(drop_a_task, seed=1)
    assert isinstance(failure.value.exceptions[0], ZeroDivisionError)


def test_after_a_failure_every_task_is_cancelled_and_may_clean_up():
    cleaned = []

    async def clean_up_slowly():
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(5.0)
            cleaned.append("swept")

    async def fail_beside_it(_dice):
        asyncio.get_running_loop().create_task(clean_up_slowly())
        await asyncio.sleep(1.0)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        run(fail_beside_it, seed=1)
    assert cleaned == ["swept"]


def test_even_a_task_that_refuses_to_be_cancelled_is_seen_off():
    async def refuse():
        while True:
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                continue

    async def leave_it(_dice):
        asyncio.get_running_loop().create_task(refuse(), name="stubborn")

    with pytest.raises(Livelock, match="stubborn"):
        run(leave_it, seed=1, passes_max=1000)


@pytest.mark.parametrize(
    "reach_outside",
    [
        lambda loop: loop.run_in_executor(None, time.time),
        lambda loop: loop.getaddrinfo("localhost", 80),
        lambda loop: loop.create_connection(asyncio.Protocol, "localhost", 80),
        lambda loop: loop.create_server(asyncio.Protocol, "localhost", 80),
        lambda loop: loop.create_unix_connection(asyncio.Protocol, "/run/v.sock"),
        lambda loop: loop.create_unix_server(asyncio.Protocol, "/run/v.sock"),
        lambda loop: loop.sock_connect(None, "/run/v.sock"),
        lambda loop: loop.sock_recv(None, 1),
        lambda loop: loop.subprocess_exec(asyncio.SubprocessProtocol, "true"),
        lambda loop: loop.add_reader(0, print),
        lambda loop: loop.add_signal_handler(15, print),
        lambda _loop: asyncio.to_thread(time.time),
    ],
)
def test_threads_sockets_and_processes_are_refused_by_name(reach_outside):
    async def reach(_dice):
        await reach_outside(asyncio.get_running_loop())

    with pytest.raises(OutsideVirtualTime, match=r"leaves virtual time: take the connection from `network\.Network`"):
        run(reach, seed=1)


def test_another_thread_cannot_call_into_virtual_time():
    async def let_a_thread_call(_dice):
        loop = asyncio.get_running_loop()
        loop._home_thread -= 1  # this thread is now a stranger
        loop.call_soon_threadsafe(print)

    with pytest.raises(OutsideVirtualTime, match="a thread called into virtual time"):
        run(let_a_thread_call, seed=1)


async def race(dice):
    """Cancel a set of tasks, some of them at once: the order in which they end must be the seed's alone."""
    ended = []

    async def runner(number):
        try:
            await asyncio.sleep(dice.choice([1.0, 2.0, 3.0, 10.0]))
        finally:
            ended.append(number)

    with suppress(TimeoutError):
        async with asyncio.timeout(2.0), asyncio.TaskGroup() as runners:
            for number in range(20):
                runners.create_task(runner(number))
    return ended


def test_a_seed_replays_exactly_and_another_seed_differs():
    first = run(race, seed=1)
    assert run(race, seed=1) == first
    assert run(race, seed=2).trace != first.trace
    assert len(set(first.value)) == 20


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_a_seed_replays_exactly_in_another_process(hash_seed):
    """A seed that failed on one machine fails on another, whatever addresses and string hashes it has there."""
    script = "from simulation.test_virtual_time import *; print(run(race, seed=1).trace)"
    replay = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    assert replay.stdout.decode().strip() == run(race, seed=1).trace


def test_the_garbage_collector_has_no_say_in_a_run():
    """An abandoned generator is closed by a task of its own as soon as it is found: let nobody look by chance."""
    closed = []

    async def numbers():
        try:
            yield 1
        finally:
            await asyncio.sleep(1.0)
            closed.append("closed")

    async def abandon_generators(_dice):
        for _ in range(100):
            cycle = [numbers()]
            await anext(cycle[0])
            cycle.append(cycle)
            await asyncio.sleep(0.01)

    thresholds = gc.get_threshold()
    lazy = run(abandon_generators, seed=1)
    gc.set_threshold(1, 1, 1)
    try:
        assert run(abandon_generators, seed=1) == lazy
    finally:
        gc.set_threshold(*thresholds)
    assert len(closed) == 200, "each run closes its own before it ends"


def test_the_trace_tells_times_and_order_apart():
    def sleeping(*naps_s):
        async def nap(_dice):
            for nap_s in naps_s:
                await asyncio.sleep(nap_s)

        return nap

    assert len({run(sleeping(*naps_s), seed=1).trace for naps_s in [(1.0, 2.0), (2.0, 1.0), (3.0,), ()]}) == 4


def test_a_thousand_runs_take_less_than_a_second():
    async def barely_anything(dice):
        await asyncio.sleep(dice.random())

    began_s = time.process_time()
    for seed in range(1000):
        run(barely_anything, seed=seed)
    assert time.process_time() - began_s < 1.0


def test_a_coroutine_finds_the_virtual_loop_running():
    async def which(_dice):
        return asyncio.get_running_loop()

    loop = run(which, seed=1).value
    assert isinstance(loop, VirtualLoop)
    assert loop.is_closed()
