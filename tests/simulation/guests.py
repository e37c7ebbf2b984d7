"""What simulated guests are asked to do, and what they mean to say: a caller can work out every byte beforehand."""

import asyncio
import zlib
from urllib.parse import parse_qsl, urlsplit

from msgspec import Struct

from fakes.vmm import FakeGuest, GuestAnswer, GuestCall

BODILESS = frozenset({204, 304})
FORGED = (
    ("fc-error", "internal"),
    ("fc-ran", "no"),
    ("fc-invocation-id", "0" * 32),
    ("x-fc-queue-wait-ms", "-1"),
    ("server-timing", "queue;dur=0"),
)
"""Fields by which a guest might pass for the substrate; none may reach a caller."""


class Wish(Struct, frozen=True, omit_defaults=True):
    """What a call asks of its guest; travels in the query of its target.

    The answer begins `after_ms` after the request is there: one line that names the request, then `pieces` of
    `size` bytes, `pace_ms` apart. A guest may also `die` instead, `hang` for ever, or try to `forge` our fields.
    """

    status: int = 200
    pieces: int = 0
    size: int = 100
    chunked: int = 0
    pace_ms: int = 0
    after_ms: int = 0
    die: int = 0
    hang: int = 0
    forge: int = 0

    @property
    def query(self) -> str:
        """The wish as a query, without what is usual."""
        said = {field: getattr(self, field) for field in self.__struct_fields__}
        return "&".join(f"{field}={value}" for field, value in said.items() if value != getattr(_USUAL, field))


_USUAL = Wish()


def wish_of(target: str) -> Wish:
    """The wish that a target carries."""
    return Wish(**{name: int(value) for name, value in parse_qsl(urlsplit(target).query)})


def meant(call_id: str, method: str, target: str, body: bytes) -> tuple[bytes, ...]:
    """What a guest means to say to this request, piece by piece; nothing if its status has no body."""
    wish = wish_of(target)
    if wish.status in BODILESS:
        return ()
    first = f"{call_id} {method} {target} {len(body)} {zlib.crc32(body):08x}\n".encode()
    piece = (first * (wish.size // len(first) + 1))[: wish.size]
    return (first, *(piece for _ in range(wish.pieces)))


async def obedient(guest: FakeGuest, call: GuestCall) -> GuestAnswer:
    """Do as the target says."""
    wish = wish_of(call.target)
    if wish.after_ms:
        await asyncio.sleep(wish.after_ms / 1e3)
    if wish.die:
        guest.die("exit status 7", console="out of luck")
    if wish.hang:
        await asyncio.Future()
    return GuestAnswer(
        status=wish.status,
        headers=(("x-meant-for", call.headers["fc-invocation-id"]), *(FORGED if wish.forge else ())),
        chunks=meant(call.headers["fc-invocation-id"], call.method, call.target, call.body),
        chunked=bool(wish.chunked) and wish.status not in BODILESS,
        pace_s=wish.pace_ms / 1e3,
    )
