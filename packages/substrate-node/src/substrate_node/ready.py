"""From a running guest to a ready one: reach it, tell it who it is, and take its word that it can serve."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from contextlib import suppress

import msgspec

from substrate_node.vmm import CONTROL_PORT, DATA_PORT, Exit, Guest, boot_id_of
from substrate_node.vsockhttp import Exchange, request_head
from substrate_seam.errors import GuestFailed, SubstrateError
from substrate_seam.workload import Workload

ATTEMPT_CAP_S = 0.150
"""How long one question about readiness may hang. The first connection after a restore may hang for ever (P-01)."""
_ATTEMPT_CAP_S_MAX = 5.0
CAUSE_WITHIN_S = 1.0
"""A broken connection is known before the death that broke it; so long its cause is waited for."""
PAUSE_S = 0.020
_CLOCK_CAP_S = 0.5
_ANSWER_BYTES_MAX = 65_536


class NotReady(Exception):
    """The guest did not become ready; the message says why. No request has reached it."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a guest itself: the body of `POST /shim/restored`."""

    epoch_ns: int
    entropy_b64: str
    guest_id: str
    hostname: str
    boot_id: str
    ca_pem: str | None = None
    restored: bool


class IdentityMint:
    """Makes identities from a wall clock (nanoseconds) and a source of entropy, which tests may script."""

    def __init__(self, *, wall_ns: Callable[[], int], entropy: Callable[[int], bytes]) -> None:
        self._wall_ns = wall_ns
        self._entropy = entropy

    def guest_id(self) -> str:
        """A name that no other guest has or had."""
        return "inv-" + self._entropy(8).hex()

    def wall_ms(self) -> int:
        """The clock as it is now, in milliseconds since 1970."""
        return self._wall_ns() // 1_000_000

    def identity(self, guest_id: str, *, restored: bool) -> Identity:
        """A fresh identity, with the clock as it is now."""
        return Identity(
            epoch_ns=self._wall_ns(),
            entropy_b64=base64.b64encode(self._entropy(64)).decode(),
            guest_id=guest_id,
            hostname=guest_id,
            boot_id=boot_id_of(guest_id),
            restored=restored,
        )


class Contact:
    """A conversation with a guest until it may get a request; `words` tells whoever gives up how far it came."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._said = ""

    @property
    def words(self) -> str:
        """How the guest ended, or what it last answered, if anything; and last, what its console said last."""
        if self._guest.exited.done():
            return f"; it ended with {self._guest.exited.result().told}"
        so_far = Exit(self._said or "it runs", self._guest.console)
        return f"; {so_far.told}" if self._said or so_far.console.strip() else ""

    async def last_words(self) -> str:
        """`words`, after a moment in which the cause of a death may still be told."""
        if not self._guest.exited.done():
            await asyncio.wait({self._guest.exited}, timeout=CAUSE_WITHIN_S)
        return self.words

    async def make_ready(
        self, workload: Workload, mint: IdentityMint, *, contact_cap_s: float | None, restored: bool
    ) -> None:
        """Bring the guest to the point where it may get a request. Raises `NotReady`; waits as long as it is let.

        A guest of ours is told its identity on the control port, and answers when it is primed. A guest on the Go shim
        is asked on its one port until it says 200, then given the clock.
        """
        spec = workload.spec
        if spec.guest == "go-shim":
            await self._until_ok(DATA_PORT, spec.ready_path)
            await self._set_clock(mint)
            return
        if contact_cap_s is not None:
            await self._until_ok(CONTROL_PORT, "/shim/healthz", cap_s=contact_cap_s)
        identity = msgspec.json.encode(mint.identity(self._guest.guest_id, restored=restored))
        status, answer = await self._ask(CONTROL_PORT, "POST", "/shim/restored", identity)
        if status != 200:
            raise NotReady(f"/shim/restored answered {status}: {answer[:512].decode('utf-8', 'replace')}")
        if spec.ready_path != "/shim/ready":
            await self._until_ok(DATA_PORT, spec.ready_path)

    async def wait_primed(self, workload: Workload) -> None:
        """Wait until a guest that is to be captured is warm: the first 200 of its ready path. Raises `NotReady`."""
        foreign = workload.spec.guest == "go-shim" or workload.spec.ready_path != "/shim/ready"
        await self._until_ok(DATA_PORT if foreign else CONTROL_PORT, workload.spec.ready_path)

    async def told(self, path: str) -> bytes:
        """What the guest answers on its control port. Raises `NotReady` if it is not a 200, and `OSError`."""
        status, answer = await self._ask(CONTROL_PORT, "GET", path)
        if status != 200:
            raise NotReady(f"{path} answered {status}: {answer[:512].decode('utf-8', 'replace')}")
        return answer

    async def _until_ok(self, port: int, path: str, *, cap_s: float = ATTEMPT_CAP_S) -> None:
        """Ask until the answer is 200: short attempts, short pauses, and an end as soon as the guest dies.

        An attempt that hung makes the next one more patient, for a guest that is slow to answer rather than stuck.
        """
        while True:
            if self._guest.exited.done():
                raise NotReady("the guest ended before it was ready")
            try:
                async with asyncio.timeout(cap_s):
                    status, _ = await self._ask(port, "GET", path)
            except TimeoutError:
                self._said = f"{path} did not answer within {cap_s:.2f} s"
                cap_s = min(cap_s * 2, _ATTEMPT_CAP_S_MAX)
            except (NotReady, OSError) as error:
                self._said = str(error)
            else:
                if status == 200:
                    self._said = ""
                    return
                self._said = f"{path} answered {status}"
            await asyncio.wait({self._guest.exited}, timeout=PAUSE_S)

    async def _set_clock(self, mint: IdentityMint) -> None:
        """Give a Go-shim guest the time. One that has no such endpoint (404) is fine."""
        body = msgspec.json.encode({"epoch_ms": mint.wall_ms()})
        with suppress(NotReady, OSError):  # best effort, as that shim's contract has it
            async with asyncio.timeout(_CLOCK_CAP_S):
                await self._ask(DATA_PORT, "POST", "/shim/clock", body)

    async def _ask(self, port: int, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """One small exchange. Raises `NotReady` when it breaks or the guest ends, `OSError` when nobody listens."""
        exited = self._guest.exited
        exchange = Exchange(port, request_head(method, path, ((b"host", b"vsock"),), len(body)), body)

        def died(_: object) -> None:
            exchange.fail(GuestFailed("the guest ended"))

        exited.add_done_callback(died)
        try:
            await self._guest.dial(lambda: exchange)
            await exchange.head()
            answer = b""
            async for piece in exchange:
                answer += piece
                if len(answer) > _ANSWER_BYTES_MAX:
                    raise NotReady(f"{path} answered with over {_ANSWER_BYTES_MAX} bytes")
        except SubstrateError as error:
            raise NotReady(f"{path}: {error.message}") from error
        finally:
            exited.remove_done_callback(died)
            exchange.close()
        return exchange.status, answer
