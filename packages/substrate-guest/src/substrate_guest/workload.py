"""What the shim asks of a workload, whatever it was written as."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio

    from substrate_guest.app import Request
    from substrate_guest.exchange import Exchange
    from substrate_guest.identity import Identity


class Workload(Protocol):
    """Something that answers requests; the adapters make one of a callable and of an ASGI app."""

    @property
    def rests(self) -> bool:
        """Whether nothing of it runs between two requests, so that its event loop may stand still then."""
        ...

    async def prime(self) -> None:
        """Warm up, once; what it leaves behind must survive the event loop, because a fork may follow."""
        ...

    async def start(self, duties: asyncio.TaskGroup) -> None:
        """Begin, in the loop that will serve; `duties` owns what has to keep running."""
        ...

    async def restored(self, identity: Identity) -> None:
        """Become the guest that `identity` names."""
        ...

    async def respond(self, request: Request, exchange: Exchange) -> None:
        """Answer `request` completely; an exception means that it failed, before or after its first bytes went out."""
        ...
