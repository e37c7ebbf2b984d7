"""What the node asks of a guest, on a port that no caller reaches."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from substrate_guest.failure import describe, log
from substrate_guest.identity import Identities, parse_identity
from substrate_guest.problems import BadInput

if TYPE_CHECKING:
    from substrate_guest.app import Request
    from substrate_guest.exchange import Exchange
    from substrate_guest.workload import Workload


ACCEPTED = "accepted are GET /shim/healthz, /shim/ready and /shim/fingerprint, and POST /shim/restored\n"


class Readiness:
    """Whether the workload is warm: not yet, ready, or failed for a reason that somebody may want to read."""

    def __init__(self) -> None:
        self._settled = asyncio.Event()
        self.failure: str | None = None
        self.told = asyncio.Event()
        """Set once a reply has carried the failure."""

    @property
    def ready(self) -> bool:
        """Whether requests may be served."""
        return self._settled.is_set() and self.failure is None

    def settle(self, failure: str | None = None) -> None:
        """Become ready, or failed with a reason, for good."""
        self.failure = failure
        self._settled.set()

    async def settled(self) -> None:
        """Return when it is known whether the workload is ready or failed."""
        await self._settled.wait()


class Control:
    """Answers `/shim/healthz`, `/shim/ready`, `/shim/restored` and `/shim/fingerprint`."""

    def __init__(self, workload: Workload, identities: Identities, readiness: Readiness) -> None:
        self._workload = workload
        self._identities = identities
        self._readiness = readiness

    async def respond(self, request: Request, exchange: Exchange) -> None:
        """Answer one request of the node; see `Workload.respond`."""
        try:
            await self._answer(request, exchange)
        except ConnectionError:
            # It has given up on this answer and asks again. Telling of it on the console of a machine that is slow
            # would make the next answer late, too, and so for ever.
            if not exchange.started:
                raise

    async def _answer(self, request: Request, exchange: Exchange) -> None:
        match request.method, request.path:
            case "GET", "/shim/healthz":
                await exchange.reply(200, "ok\n")
            case "GET", "/shim/ready":
                await self._say_ready(exchange)
            case "POST", "/shim/restored":
                await self._become(request, exchange)
            case "GET", "/shim/fingerprint":
                from substrate_guest.fingerprint import fingerprint

                await exchange.reply(200, json.dumps(fingerprint()), "application/json")
            case _:
                await exchange.reply(404, ACCEPTED)

    async def _say_ready(self, exchange: Exchange) -> None:
        if self._readiness.ready:
            await exchange.reply(200, "ready\n")
        elif self._readiness.failure is None:
            await exchange.reply(503, "not ready yet\n")
        else:
            await exchange.reply(503, f"{self._readiness.failure}\n")
            self._readiness.told.set()

    async def _become(self, request: Request, exchange: Exchange) -> None:
        try:
            identity = parse_identity(request.body)
        except BadInput as error:
            await exchange.reply(400, json.dumps(error.as_json()), "application/json")
            return
        await self._readiness.settled()
        if not self._readiness.ready:
            await self._say_ready(exchange)
            return
        waited_ns = time.monotonic_ns() - exchange.began_ns  # a workload may take long to get ready
        identity = replace(identity, epoch_ns=identity.epoch_ns + waited_ns)
        try:
            adopted = self._identities.adopt(identity)
            await self._workload.restored(identity)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever a hook raises, the node is told
            log(error)
            await exchange.reply(500, f"not restored: {describe(error)}\n")
        else:
            await exchange.reply(200, json.dumps(adopted), "application/json")
