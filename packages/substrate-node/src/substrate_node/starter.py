"""Starting a guest, warm or cold, up to the point where it may get a request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from substrate_node.base import Bases
from substrate_node.ready import Contact, IdentityMint, NotReady
from substrate_node.vmm import Base, BaseGone, Guest, Inbound, Vmm, VmmError
from substrate_seam.workload import Workload


class Hosted:
    """A workload on this node, the monitor that runs it, and the key of its warm base (None: no warm start).

    `serving` counts the calls that have their guest.
    """

    __slots__ = ("base_key", "serving", "vmm", "workload")

    def __init__(self, workload: Workload, vmm: Vmm) -> None:
        self.workload = workload
        self.vmm = vmm
        self.base_key: str | None = None
        self.serving = 0


class StartFailure(Exception):
    """A guest did not start. No request has reached it; the message says what happened."""


class Starter:
    """Starts guests and keeps count of what restores from a base come to."""

    def __init__(
        self,
        *,
        bases: Bases,
        mint: IdentityMint,
        inbound: Callable[[Workload, str], Inbound],
        boot_within_s: float,
        restore_within_s: float,
    ) -> None:
        self._bases = bases
        self._mint = mint
        self._inbound = inbound
        self._boot_within_s = boot_within_s
        self._restore_within_s = restore_within_s

    async def start(
        self, hosted: Hosted, base: Base | None, guest_id: str, *, running: Callable[[], None] = lambda: None
    ) -> Guest:
        """Start a guest from `base`, or cold without one, and make it ready. Raises `StartFailure`.

        `running` is called in between. The caller discards `guest_id` whatever comes of it.
        """
        if base is None:
            return await self._start(hosted, None, guest_id, self._boot_within_s, running)
        self._bases.hold(base)
        try:
            guest = await self._start(hosted, base, guest_id, self._restore_within_s, running)
        except StartFailure as failure:
            self._bases.failed(base, str(failure), for_good=isinstance(failure.__cause__, BaseGone))
            raise
        finally:
            self._bases.release(base)
        self._bases.succeeded(base)
        return guest

    async def _start(
        self, hosted: Hosted, base: Base | None, guest_id: str, within_s: float, running: Callable[[], None]
    ) -> Guest:
        vmm, workload = hosted.vmm, hosted.workload
        inbound = self._inbound(workload, guest_id)
        contact: Contact | None = None
        try:
            async with asyncio.timeout(within_s):
                if base is None:
                    guest = await vmm.boot(workload, guest_id, inbound)
                else:
                    guest = await vmm.restore(workload, base, guest_id, inbound)
                running()
                contact = Contact(guest)
                await contact.make_ready(
                    workload, self._mint, contact_cap_s=vmm.contact_cap_s, restored=base is not None
                )
                return guest
        except TimeoutError as error:
            why = f"it was not ready within {within_s:.1f} s"
            raise StartFailure(why + (contact.words if contact else "")) from error
        except (VmmError, NotReady, OSError) as error:
            raise StartFailure(str(error) + (await contact.last_words() if contact else "")) from error
