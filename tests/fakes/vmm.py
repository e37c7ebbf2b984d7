"""A monitor in memory: its guests speak the real protocols, and fail wherever a test asks them to.

No file, thread, socket, clock or die of its own: it lives in virtual time, on the simulated network.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from enum import StrEnum
from random import Random
from typing import TYPE_CHECKING

import h11
from msgspec import Struct

from simulation.network import Listener, Network
from substrate_node.vmm import CONTROL_PORT, DATA_PORT, Base, Exit, Guest, Inbound, P, Sample, Vmm, VmmError
from substrate_seam.invocation import Isolation
from substrate_seam.workload import Workload


class At(StrEnum):
    """A place where something can go wrong: the verbs of the monitor, then the stages of an exchange."""

    BOOT = "boot"
    CAPTURE = "capture"
    ADOPT = "adopt"
    RESTORE = "restore"
    DIAL = "dial"
    KILL = "kill"
    DISCARD = "discard"
    DISCARD_BASE = "discard_base"

    ACCEPTED = "accepted"  # the connection stands, CONNECT has not been read
    CONNECTED = "connected"  # OK was answered, the request has not been read
    HEALTHZ = "healthz"  # a control request was read and not answered
    READY = "ready"
    RESTORED = "restored"
    REQUEST = "request"  # the workload's request was read whole and not journalled
    BEFORE_HEAD = "before_head"  # journalled; nothing of the reply was sent
    WITHIN_HEAD = "within_head"
    AFTER_HEAD = "after_head"
    MID_BODY = "mid_body"
    AFTER_BODY = "after_body"  # the reply was sent whole; the connection still stands


class Fault(Struct, frozen=True, kw_only=True):
    """What happens at a place, in this order: wait `delay_s` seconds, `say` some bytes, `die`, `hang`, `close`, `fail`.

    To fail is a `VmmError` of a verb (at once of a kill, which never waits), an `OSError` of a dial, a 503 of a control
    request, a reset connection elsewhere (what was said may be lost with it); to close is to hang up in good order, at
    any stage of an exchange.
    Only a guest can die, say something or close.
    """

    delay_s: float = 0.0
    say: bytes = b""
    die: bool = False
    hang: bool = False
    close: bool = False
    fail: str | None = None


class _Rule:
    def __init__(self, fault: Fault, *, times: int | None, chance: float, workload: str | None) -> None:
        self.fault, self.times, self.chance, self.workload = fault, times, chance, workload


class Faults:
    """The plan of what goes wrong where. Dice are needed only for rules with a chance."""

    def __init__(self, dice: Random | None = None) -> None:
        self._dice = dice
        self._rules: dict[At, list[_Rule]] = {}
        self._reached: dict[At, asyncio.Event] = {}

    def on(
        self,
        at: At | str,
        *,
        fail: str | None = None,
        hang: bool = False,
        die: bool = False,
        close: bool = False,
        delay_s: float = 0.0,
        say: bytes = b"",
        times: int | None = 1,
        chance: float = 1.0,
        workload: str | None = None,
    ) -> None:
        """Plan a fault at `at`, the next `times` times (None: always) each with a `chance`, for one workload or any."""
        fault = Fault(delay_s=delay_s, say=say, die=die, hang=hang, close=close, fail=fail)
        rule = _Rule(fault, times=times, chance=chance, workload=workload)
        self._rules.setdefault(At(at), []).append(rule)

    def clear(self) -> None:
        """Let everything go well from now on. What hangs already goes on hanging."""
        self._rules.clear()

    async def reached(self, at: At | str) -> None:
        """Return as soon as somebody has been at `at`, since the beginning."""
        await self._event(At(at)).wait()

    def draw(self, at: At, workload: str) -> Fault | None:
        """Somebody is at `at`: the first planned fault that fits, used up by one."""
        self._event(at).set()
        for rule in self._rules.get(at, ()):
            fits = rule.times != 0 and rule.workload in {None, workload}
            if fits and (rule.chance >= 1.0 or self._roll() < rule.chance):
                rule.times = rule.times and rule.times - 1
                return rule.fault
        return None

    def _event(self, at: At) -> asyncio.Event:
        return self._reached.setdefault(at, asyncio.Event())

    def _roll(self) -> float:
        if self._dice is None:
            raise ValueError("a fault with a chance needs dice: Faults(Random(seed))")
        return self._dice.random()


class Latencies(Struct, frozen=True, kw_only=True):
    """How long the verbs take, and after how many seconds a booted guest says that it is ready."""

    boot_s: float = 0.1
    restore_s: float = 0.005
    capture_s: float = 0.2
    kill_s: float = 0.001
    discard_s: float = 0.002
    ready_after_s: float = 0.0


class GuestCall(Struct, frozen=True):
    """What reached the workload of a fake guest: header names are in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


class GuestAnswer(Struct, frozen=True, kw_only=True):
    """What the workload answers: `chunks` as one body of known length, or `chunked`, `pace_s` seconds apart."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    chunks: tuple[bytes, ...] = ()
    chunked: bool = False
    pace_s: float = 0.0


Behaviour = Callable[["FakeGuest", GuestCall], Awaitable[GuestAnswer]]


async def echo(_guest: FakeGuest, call: GuestCall) -> GuestAnswer:
    """Answer with the request's body."""
    return GuestAnswer(headers=(("content-type", "application/octet-stream"),), chunks=(call.body,))


class FakeVmm:
    """A `Vmm` in memory.

    `alive` holds every guest that was begun and not discarded, running or dead, and `bases` every base: a fixture
    asserts that both are empty in the end. `journal` gets (invocation id, attempt) before a workload acts, and
    outlives its guests. Guests listen on `<root>/<guest id>/v.sock` of the network, so that a test can also cut or
    partition what leads to them; two monitors on one network need two roots.
    """

    def __init__(
        self,
        *,
        network: Network,
        root: str = "/run",
        behaviour: Behaviour = echo,
        faults: Faults | None = None,
        latencies: Latencies | None = None,
        journal: list[tuple[str, int]] | None = None,
        isolation: Isolation = Isolation.MICROVM,
        contact_cap_s: float | None = None,
        warm: bool = True,
        refuses: Mapping[str, str] | None = None,
        left_bases: Iterable[Base] = (),
    ) -> None:
        self.network = network
        self.root = root
        self.behaviour = behaviour
        self.faults = faults or Faults()
        self.latencies = latencies or Latencies()
        self.journal = journal if journal is not None else []
        self.alive: dict[str, FakeGuest] = {}
        self.bases: dict[str, Base] = {base.base_id: base for base in left_bases}
        self.isolation = isolation
        self.contact_cap_s = contact_cap_s
        self._warm = warm
        self._refuses = dict(refuses or {})

    def refusal(self, workload: Workload) -> str | None:
        """What the test said of this workload, or that its isolation is out of reach."""
        if not self.isolation.satisfies(workload.spec.isolation):
            return f"workload {workload.name!r} wants isolation {workload.spec.isolation}; this is {self.isolation}"
        return self._refuses.get(workload.name)

    async def input_key(self, workload: Workload) -> str | None:
        """The workload's digest, unless made without warm starts."""
        return workload.digest if self._warm else None

    async def boot(self, workload: Workload, guest_id: str, inbound: Inbound, *, to_capture: bool = False) -> Guest:
        """Start a guest; it is in `alive` from the first moment on, as half a VM would be on a host."""
        return await self._start(At.BOOT, workload, guest_id, inbound, self.latencies.boot_s)

    async def restore(self, workload: Workload, base: Base, guest_id: str, inbound: Inbound) -> Guest:
        """Start a guest from a base of ours."""
        if base.base_id not in self.bases:
            raise VmmError(f"restore: there is no base {base.base_id}")
        return await self._start(At.RESTORE, workload, guest_id, inbound, self.latencies.restore_s)

    async def _start(self, at: At, workload: Workload, guest_id: str, inbound: Inbound, latency_s: float) -> FakeGuest:
        if guest_id in self.alive:
            raise VmmError(f"{at}: there is a guest {guest_id} already")
        guest = self.alive[guest_id] = FakeGuest(self, workload, guest_id, inbound)
        await self._suffer(at, workload.name, guest)
        await asyncio.sleep(latency_s)
        guest.serve(ready_after_s=self.latencies.ready_after_s if at is At.BOOT else 0.0)
        return guest

    async def capture(self, workload: Workload, guest: Guest, base_id: str) -> Base:
        """Use the guest up and keep a base of it."""
        source = self.alive.get(guest.guest_id)
        if source is None or source.exited.done():
            raise VmmError(f"capture: guest {guest.guest_id} is gone")
        await self._suffer(At.CAPTURE, workload.name, source)
        await asyncio.sleep(self.latencies.capture_s)
        if source.exited.done():
            raise VmmError(f"capture: guest {guest.guest_id} died: {source.exited.result().words}")
        source.die("killed by SIGKILL")
        base = self.bases[base_id] = Base(base_id=base_id, input_key=workload.digest)
        return base

    async def adopt(self, workload: Workload) -> Base | None:
        """A base that was there already and matches."""
        await self._suffer(At.ADOPT, workload.name)
        key = await self.input_key(workload)
        return next((base for base in self.bases.values() if base.input_key == key), None)

    async def discard(self, guest_id: str) -> None:
        """Kill and forget."""
        guest = self.alive.get(guest_id)
        await self._suffer(At.DISCARD, guest.workload.name if guest else "")
        if guest is not None:
            guest.die("killed by SIGKILL")
            await asyncio.sleep(self.latencies.discard_s)
            self.alive.pop(guest_id, None)

    async def discard_base(self, base: Base) -> None:
        """Forget a base."""
        await self._suffer(At.DISCARD_BASE, "")
        self.bases.pop(base.base_id, None)

    async def _suffer(self, at: At, workload: str, guest: FakeGuest | None = None) -> None:
        fault = self.faults.draw(at, workload)
        if fault is None:
            return
        await asyncio.sleep(fault.delay_s)
        if fault.die and guest is not None:
            guest.die("exit status 1")
        if fault.hang:
            await asyncio.Future()
        if fault.fail is not None:
            raise VmmError(f"{at}: {fault.fail}")


class FakeGuest:
    """A guest in memory: a hybrid vsock server with control on 1028 and the workload on 1027."""

    def __init__(self, vmm: FakeVmm, workload: Workload, guest_id: str, inbound: Inbound) -> None:
        self.guest_id = guest_id
        self.address = f"{vmm.root}/{guest_id}/v.sock"
        self.workload = workload
        self.exited: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self.console = ""
        self.told: dict[str, object] | None = None
        """What the last `POST /shim/restored` said."""
        self._vmm = vmm
        self._inbound = inbound
        self._ready_at_s = 0.0
        self._listeners: list[Listener] = []
        self._killings: list[asyncio.TimerHandle] = []
        self._tasks: dict[asyncio.Task[None], None] = {}  # in order, which a set would not keep
        self._writers: dict[asyncio.StreamWriter, None] = {}

    def serve(self, *, ready_after_s: float) -> None:
        """Answer from now on, and be ready after so many seconds."""
        if self.exited.done():
            return
        self._ready_at_s = asyncio.get_running_loop().time() + ready_after_s
        self._listeners.append(self._vmm.network.listen(self.address, self._conversation))
        for port, factory in self._inbound.items():
            self._listeners.append(self._vmm.network.listen(f"{self.address}_{port}", factory))

    def die(self, words: str = "exit status 1", console: str = "") -> None:
        """End at once: connections reset, `exited` done. Dying twice is dying once."""
        if self.exited.done():
            return
        self.exited.set_result(Exit(words, console))
        for killing in self._killings:
            killing.cancel()
        for listener in self._listeners:
            listener.close()
        for writer in self._writers:
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()

    # What the node calls.

    async def dial(self, protocol: Callable[[], P]) -> P:
        """Connect to the guest; refused once it is dead."""
        fault = self._vmm.faults.draw(At.DIAL, self.workload.name)
        if fault is not None:
            await asyncio.sleep(fault.delay_s)
            if fault.die:
                self.die()
            if fault.hang:
                await asyncio.Future()
            if fault.fail is not None:
                raise ConnectionRefusedError(fault.fail)
        return (await self._vmm.network.connect(self.address, protocol))[1]

    def sample(self) -> Sample:
        """Some plausible numbers."""
        return Sample(cpu_ms=1.0, peak_mib=16.0)

    @property
    def gone(self) -> asyncio.Future[Exit]:
        """Nothing of it outlives its end."""
        return self.exited

    def kill(self) -> None:
        """End the guest a little later, or fail to at once."""
        fault = self.draw(At.KILL) or Fault()
        if fault.fail is not None:
            raise VmmError(f"{At.KILL}: {fault.fail}")
        if fault.die:
            self.die()
        if not self.exited.done() and not fault.hang:
            delay_s = fault.delay_s + self._vmm.latencies.kill_s
            self._killings.append(asyncio.get_running_loop().call_later(delay_s, self.die, "killed by SIGKILL"))

    # What the guest does.

    async def dial_out(self, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to a vsock port of the host; raises `ConnectionRefusedError` for one that nobody answers."""
        reader = asyncio.StreamReader()
        transport, protocol = await self._vmm.network.connect(
            f"{self.address}_{port}", lambda: asyncio.StreamReaderProtocol(reader)
        )
        writer = asyncio.StreamWriter(transport, protocol, reader, asyncio.get_running_loop())
        self._writers[writer] = None
        return reader, writer

    def _conversation(self) -> asyncio.Protocol:
        return asyncio.StreamReaderProtocol(asyncio.StreamReader(), self._accept)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(_Exchange(self, reader, writer).run())
        self._writers[writer] = self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)
        task.add_done_callback(lambda _task: self._writers.pop(writer))

    def ready(self) -> bool:
        """Whether the warm-up is over."""
        return asyncio.get_running_loop().time() >= self._ready_at_s

    def draw(self, at: At) -> Fault | None:
        """What goes wrong with this guest at `at`."""
        return self._vmm.faults.draw(at, self.workload.name)

    async def act(self, call: GuestCall) -> GuestAnswer:
        """Run the workload."""
        return await self._vmm.behaviour(self, call)

    def journal(self, call: GuestCall) -> None:
        """Note outside the guest that this call is about to be acted on."""
        headers = call.headers
        self._vmm.journal.append((headers.get("fc-invocation-id", ""), int(headers.get("fc-attempt", "0"))))


class _ClosedError(Exception):
    """The exchange ends early, in good order."""


class _ResetError(Exception):
    """The exchange ends with a reset."""


class _Exchange:
    """One connection to a guest, from CONNECT to the end of the reply."""

    def __init__(self, guest: FakeGuest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._guest = guest
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.SERVER)
        self._unsent = b""

    async def run(self) -> None:
        """Serve the connection; whatever the peer does ends only this exchange."""
        try:
            with suppress(_ClosedError):
                await self._serve()
            self._flush()
            self._writer.close()
        except (_ResetError, h11.RemoteProtocolError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            self._writer.transport.abort()

    async def _serve(self) -> None:
        await self._at(At.ACCEPTED)
        verb, _, port = (await self._reader.readuntil(b"\n")).decode().strip().partition(" ")
        if verb != "CONNECT" or port not in {str(DATA_PORT), str(CONTROL_PORT)}:
            return
        self._unsent += b"OK 1073741824\n"
        await self._at(At.CONNECTED)
        self._flush()
        call = await self._read()
        if self._is_control(int(port), call):
            await self._answer_control(call)
        else:
            await self._at(At.REQUEST)
            self._guest.journal(call)
            await self._at(At.BEFORE_HEAD)
            await self._reply(await self._guest.act(call), bodiless=call.method == "HEAD")

    def _is_control(self, port: int, call: GuestCall) -> bool:
        spec = self._guest.workload.spec
        if spec.guest == "go-shim":
            return not call.target.startswith("/invoke")
        return port == CONTROL_PORT or call.target == spec.ready_path

    async def _read(self) -> GuestCall:
        request: h11.Request | None = None
        body = b""
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(await self._reader.read(65_536))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif request is None:
                raise _ResetError
            else:
                headers = {name.decode(): value.decode("latin-1") for name, value in request.headers}
                return GuestCall(request.method.decode(), request.target.decode(), headers, body)

    async def _answer_control(self, call: GuestCall) -> None:
        spec = self._guest.workload.spec
        status = 404
        if call.target == "/shim/healthz":
            status = 200 if await self._control_goes_well(At.HEALTHZ) else 503
        elif call.target == spec.ready_path:
            status = 200 if await self._control_goes_well(At.READY) and self._guest.ready() else 503
        elif (call.method, call.target, spec.guest) == ("POST", "/shim/restored", "substrate"):
            status = 200 if await self._control_goes_well(At.RESTORED) else 503
            self._guest.told = json.loads(call.body)
        await self._send(GuestAnswer(status=status), bodiless=False)

    async def _control_goes_well(self, at: At) -> bool:
        fault = self._guest.draw(at)
        if fault is not None:
            await self._suffer(fault, fail_resets=False)
        return fault is None or fault.fail is None

    async def _reply(self, answer: GuestAnswer, *, bodiless: bool) -> None:
        await self._send(answer, bodiless=bodiless, stages=True)
        await self._at(At.AFTER_BODY)

    async def _send(self, answer: GuestAnswer, *, bodiless: bool, stages: bool = False) -> None:
        framing = (
            ("transfer-encoding", "chunked")
            if answer.chunked
            else ("content-length", str(sum(map(len, answer.chunks))))
        )
        headers = [*answer.headers, framing, ("connection", "close")]
        head = self._http.send(h11.Response(status_code=answer.status, headers=headers)) or b""
        await self._say(head, At.WITHIN_HEAD if stages else None)
        await self._at(At.AFTER_HEAD if stages else None)
        for number, chunk in enumerate(() if bodiless else answer.chunks):
            if number and answer.pace_s:
                self._flush()
                await self._writer.drain()
                await asyncio.sleep(answer.pace_s)
            await self._say(self._http.send(h11.Data(chunk)) or b"", At.MID_BODY if stages and not number else None)
        self._unsent += self._http.send(h11.EndOfMessage()) or b""

    async def _say(self, data: bytes, at: At | None) -> None:
        """Send some bytes, with a place for a fault right in the middle of them."""
        self._unsent += data[: len(data) // 2]
        await self._at(at)
        self._unsent += data[len(data) // 2 :]

    async def _at(self, at: At | None) -> None:
        fault = at and self._guest.draw(at)
        if fault:
            await self._suffer(fault, fail_resets=True)

    async def _suffer(self, fault: Fault, *, fail_resets: bool) -> None:
        self._flush()
        await asyncio.sleep(fault.delay_s)
        self._unsent += fault.say
        self._flush()
        if fault.die:
            self._guest.die()  # cancels this task too, at its next await
        if fault.hang or fault.die:
            await asyncio.Future()
        if fault.close:
            raise _ClosedError
        if fault.fail is not None and fail_resets:
            raise _ResetError

    def _flush(self) -> None:
        """Write what there is in one piece, so that a small reply arrives in one read."""
        if self._unsent:
            self._writer.write(self._unsent)
            self._unsent = b""


if TYPE_CHECKING:
    _fits_vmm: type[Vmm] = FakeVmm
    _fits_guest: type[Guest] = FakeGuest
