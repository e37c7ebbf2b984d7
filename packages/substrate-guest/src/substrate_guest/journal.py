"""Audit mode: a line outside the guest before the guest acts, so that nobody can claim that nothing ran."""

from __future__ import annotations

from typing import TYPE_CHECKING

from substrate_guest.calls import Calls
from substrate_guest.exchange import Refused
from substrate_guest.vsock import JOURNAL_PORT

if TYPE_CHECKING:
    from substrate_guest.app import Request
    from substrate_guest.vsock import Vsock

AUDIT_VARIABLE = "SUBSTRATE_AUDIT"
JOURNAL_S = 5.0


async def journal(request: Request, vsock: Vsock) -> None:
    """Have the host write down that `request` is about to be acted on.

    Raises `Refused` with 503 when it cannot be: the request must then not be acted on.
    """
    invocation_id, attempt = request.header("fc-invocation-id"), request.header("fc-attempt")
    if not invocation_id or not attempt:
        raise Refused(503, "audit mode: a request without fc-invocation-id and fc-attempt cannot be journalled")
    try:
        async with Calls() as calls:
            await calls.in_thread(_write, vsock, f"{invocation_id} {attempt}\n".encode("latin-1"))
    except OSError as error:
        raise Refused(503, f"audit mode: the journal cannot be reached: {error}") from error


def _write(vsock: Vsock, line: bytes) -> None:
    with vsock.dial(JOURNAL_PORT, timeout_s=JOURNAL_S) as sock:
        sock.settimeout(JOURNAL_S)
        sock.sendall(line)
        if not sock.recv(1):
            raise ConnectionResetError("it closed before it confirmed the entry")
