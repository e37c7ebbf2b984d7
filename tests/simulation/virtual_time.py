"""Virtual time: an asyncio loop that moves a clock where another would have waited.

Hours pass in milliseconds, and a seed replays exactly. Outside the clock remain `time.*`, `os.urandom`, threads, and
every order that hangs on the hash of a string or on an object's address: hand those in, or keep them out.
"""

import asyncio
import gc
import hashlib
import heapq
import selectors
import threading
from collections.abc import Callable, Collection, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Generic, NoReturn, TypeVar
from weakref import WeakSet

Result = TypeVar("Result")

DAY_S = 86_400.0
PASSES_MAX = 1_000_000
SETTLE_S = 10.0
"""Virtual seconds after the end in which connections may still close and harmless timers run out."""

_ALIKE_S = 1e-7
"""Timers that lie no further apart are due in one pass, in the order in which they were set."""
_UNWIND_S = 60.0
_UNWIND_ROUNDS = 5
_UNWIND_PASSES = 10_000

_OUTSIDE = (  # what would leave the process or start a thread: the beginnings of its names
    *("add_", "connect_", "create_", "getaddrinfo", "getnameinfo"),
    *("run_in_executor", "sendfile", "sock_", "start_tls", "subprocess_"),
)
_INSIDE = {"create_future", "create_task"}


class SimulationError(Exception):
    """The run broke a rule of virtual time; a note names the seed that replays it."""


class Deadlock(SimulationError):
    """Tasks wait, but nothing is ready and nothing is scheduled: no time could help them."""


class Livelock(SimulationError):
    """The loop kept turning past its limit of passes."""


class OutOfTime(SimulationError):
    """The next timer lies beyond the run's limit of virtual seconds."""


class LeftBehind(SimulationError):
    """The run ended and something of it is still there."""


class OutsideVirtualTime(SimulationError):
    """Something asked the loop for a thread, a socket or a process."""


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What a run came to; two runs of one seed are equal."""

    value: Result
    trace: str
    """Digest of every callback the loop was given, in order and with its time."""
    elapsed_s: float
    """Virtual seconds until `main` returned."""


def run(
    main: Callable[[Random], Coroutine[Any, Any, Result]],
    *,
    seed: int,
    time_limit_s: float = DAY_S,
    passes_max: int = PASSES_MAX,
    settle_s: float = SETTLE_S,
) -> Outcome[Result]:
    """Run `main(dice)` to its end on a fresh loop, and insist that nothing is left `settle_s` virtual seconds later.

    Raises what `main` raises; `Deadlock`, `Livelock`, `OutOfTime`, `LeftBehind`; and an `ExceptionGroup` of whatever
    reached the loop's exception handler. Each carries a note with the seed. Whatever was left is cancelled first.
    """
    with _collector_held_off():
        loop = VirtualLoop(time_limit_s=time_limit_s, passes_max=passes_max)
        try:
            value = loop.run_until_complete(main(Random(seed)))
            elapsed_s = loop.time()
            loop.settle(settle_s)
            return Outcome(value, loop.trace(), elapsed_s)
        except BaseException as failure:
            failure.add_note(f"seed {seed}, at {loop.time():.6f} s of virtual time, in pass {loop.passes} of the loop")
            raise
        finally:
            loop.unwind()
            loop.close()


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer as soon as nothing is ready.

    It schedules and turns by itself: a simulation does little else, and asyncio compares its timers in Python.
    """

    def __init__(self, *, time_limit_s: float, passes_max: int) -> None:
        self.passes = 0
        self._now_s = 0.0
        self._time_limit_s = time_limit_s
        self._passes_max = passes_max
        self._trace: list[str | float] = []
        self._at_pass: dict[int, list[Callable[[], object]]] = {}
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._timers_set = 0
        self._tasks_born = 0
        self._tasks: WeakSet[_Task] = WeakSet()  # asyncio's own holds those of each loop whose garbage waits
        self._reported: list[Exception] = []
        self._must_be_empty: list[tuple[str, Collection[object]]] = []
        self._home_thread = threading.get_ident()
        selector = _NoWaiting()
        super().__init__(selector)
        selector.instead = self._advance
        self.set_exception_handler(self._report)

    def time(self) -> float:
        """Tell the virtual seconds since the loop was made."""
        return self._now_s

    def at_pass(self, number: int, act: Callable[[], object]) -> None:
        """Do something between two passes of the loop, the `number`-th from now and the next.

        It is done when the clock has moved and before anything that is due then; nothing else is disturbed.
        """
        self._at_pass.setdefault(self.passes + number, []).append(act)

    def must_be_empty(self, what: str, things: Collection[object]) -> None:
        """Fail the run if `things`, named `what` in the error, is not empty at its end."""
        self._must_be_empty.append((what, things))

    def trace(self) -> str:
        """Digest every callback given to the loop so far, with its time."""
        return hashlib.sha256("\n".join(map(str, self._trace)).encode()).hexdigest()[:16]

    def settle(self, within_s: float) -> None:
        """Let what is ending end, for `within_s` virtual seconds; raise `LeftBehind` if anything remains."""
        # The collector was off, so all our garbage is young: what it finalises first still has time to end, and
        # what it finalises then are failures that nobody will read.
        gc.collect(1)
        self.run_until_complete(asyncio.sleep(within_s))
        gc.collect(1)
        self._raise_reported()
        if left := self._leftovers():
            raise LeftBehind("\n  ".join(["the run ended, but these did not:", *left]))

    def unwind(self) -> None:
        """Cancel what is left and see it off, so that no coroutine is finalised in the middle of another test."""
        self._time_limit_s = float("inf")
        for _ in range(_UNWIND_ROUNDS):
            if not (left := self._pending()):
                break
            for task in left:
                task.cancel()
            self._passes_max = self.passes + _UNWIND_PASSES
            with suppress(Exception):  # the run has failed already, with a better story than this
                self.run_until_complete(asyncio.sleep(_UNWIND_S))
        for task in self._pending():  # it refuses to be cancelled
            with suppress(Exception):
                task.get_coro().close()

    def create_task(self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, **options: Any) -> "_Task":
        """Start a task whose name and hash depend on this run alone."""
        self._tasks_born += 1
        task = _Task(coro, born=self._tasks_born, loop=self, name=name or f"task-{self._tasks_born}", **options)
        self._tasks.add(task)
        return task

    def timers(self) -> list[asyncio.TimerHandle]:
        """List the timers that will fire, the first one first."""
        return [timer for _, _, timer in sorted(self._timers) if not timer.cancelled()]

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:
        """Schedule a callback for the next pass, and note it in the trace."""
        self._check_closed()
        self._trace.append(_name_of(callback))
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        """Schedule a callback for a virtual time, and note it in the trace."""
        self._check_closed()
        self._trace += (when, _name_of(callback))
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._timers_set += 1
        heapq.heappush(self._timers, (when, self._timers_set, timer))
        return timer

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:
        """Schedule a callback from the loop's own thread; any other is refused, for it keeps its own time."""
        if threading.get_ident() != self._home_thread:
            raise OutsideVirtualTime("a thread called into virtual time: do its work on the loop, or pass in a fake")
        return self.call_soon(callback, *args, context=context)

    def _run_once(self) -> None:
        """Turn once: move the clock if nothing is ready, then run what is ready or due."""
        timers, ready = self._timers, self._ready
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        wait_s = max(0.0, timers[0][0] - self._now_s) if timers else None
        self._selector.select(0.0 if ready or self._stopping else wait_s)
        due_s = self._now_s + _ALIKE_S
        while timers and timers[0][0] < due_s:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle.cancelled():
                handle._run()

    def _advance(self, timeout_s: float | None) -> None:
        """Stand in for waiting: jump over `timeout_s`, or say why the run cannot go on."""
        self.passes += 1
        self._raise_reported()
        if self.passes > self._passes_max:
            raise Livelock(f"still busy after {self._passes_max} passes of the loop:{self._story()}")
        if timeout_s is None:
            raise Deadlock(f"nothing is ready and nothing is scheduled, yet these wait:{self._story()}")
        if self._now_s + timeout_s > self._time_limit_s:
            raise OutOfTime(f"not done within {self._time_limit_s} virtual seconds:{self._story()}")
        if timeout_s > 0:
            self._now_s += timeout_s
            self._trace.append(self._now_s)
        for act in self._at_pass.pop(self.passes, ()):
            act()

    def _report(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Keep what asyncio would have logged; the next pass raises it."""
        failure = context.get("exception") or RuntimeError(context["message"])
        failure.add_note(", ".join(f"{key}: {value}" for key, value in context.items() if key != "exception"))
        self._reported.append(failure)

    def _raise_reported(self) -> None:
        if self._reported:
            reported, self._reported = self._reported, []
            raise BaseExceptionGroup("nobody handled these", reported)

    def _pending(self) -> list["_Task"]:
        """List the unfinished tasks in the order of their birth."""
        return sorted((task for task in self._tasks if not task.done()), key=hash)

    def _story(self) -> str:
        return "".join(f"\n  task {_whereabouts(task)}" for task in self._pending())

    def _leftovers(self) -> list[str]:
        """Describe all that outlived the run: tasks, timers, open generators, and what must be empty."""
        generators = (generator for generator in self._asyncgens if generator.ag_frame is not None)
        return [
            *(f"task {_whereabouts(task)}" for task in self._pending()),
            *(f"timer {timer!r}" for timer in self.timers()),
            *(f"async generator {generator.__qualname__}" for generator in generators),
            *(f"{what} {thing!r}" for what, things in self._must_be_empty for thing in things),
        ]


def _refusal(verb: str) -> Callable[..., NoReturn]:
    def refuse(_loop: VirtualLoop, *_args: object, **_kwargs: object) -> NoReturn:
        raise OutsideVirtualTime(
            f"loop.{verb} leaves virtual time: take the connection from `network.Network`, or pass in a fake"
        )

    return refuse


for _verb in dir(asyncio.AbstractEventLoop):
    if _verb.startswith(_OUTSIDE) and _verb not in _INSIDE:
        setattr(VirtualLoop, _verb, _refusal(_verb))


class _NoWaiting(selectors.SelectSelector):
    """Calls `instead(timeout_s)` where asyncio would wait; no descriptor ever becomes ready."""

    instead: Callable[[float | None], None]

    def select(self, timeout: float | None = None) -> list[Any]:
        self.instead(timeout)
        return []


class _Task(asyncio.Task[Any]):
    """A task hashed by its birth, so that a set of tasks (a `TaskGroup` has one) has the same order in every run."""

    def __init__(self, coro: Coroutine[Any, Any, Any], *, born: int, **options: Any) -> None:
        self._born = born  # first, since the base class puts us into a set
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self._born


def _name_of(callback: Callable[..., object]) -> str:
    """Name a callback for the trace: a task by its own name, anything else by its function's."""
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, _Task):
        return owner.get_name()
    return getattr(callback, "__qualname__", type(callback).__name__)


def _whereabouts(task: asyncio.Task[Any]) -> str:
    """Say which task this is and where it waits, following its awaits inwards."""
    stops = []
    awaiting = task.get_coro()
    while (frame := getattr(awaiting, "cr_frame", None)) is not None:
        stops.append(f"{frame.f_code.co_qualname} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})")
        awaiting = awaiting.cr_await
    return f"{task.get_name()!r} in {' > '.join(stops)}"


@contextmanager
def _collector_held_off() -> Iterator[None]:
    """Hold off the cyclic collector: what it finalises, and when, would differ from run to run."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
