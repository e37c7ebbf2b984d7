"""A reply that is sent while it is made."""

import time
from collections.abc import Iterator

from substrate_guest import Request, Response

PAUSE_S = 0.2


def app(request: Request) -> Response:
    """Count to what the session says, a line at a time."""
    return Response(ticks(int(request.session or 3)), headers={"content-type": "text/plain"})


def ticks(count: int) -> Iterator[bytes]:
    """Lines with a pause between them."""
    for number in range(count):
        if number:
            time.sleep(PAUSE_S)
        yield f"tick {number}\n".encode()
