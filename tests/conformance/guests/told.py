"""A guest that does what the query of its request says, as the guests in memory do (see `worlds.obedient`)."""

import asyncio
import os
import sys
from urllib.parse import parse_qs

from substrate_guest import App, Request, Response


async def obey(request: Request) -> Response:
    """Answer with the request's body, unless it is asked for something else."""
    asked = {name: values[0] for name, values in parse_qs(request.query).items()}
    await asyncio.sleep(float(asked.get("after_s", 0)))
    if "die" in asked:
        sys.stderr.write("last words\n")
        sys.stderr.flush()
        os._exit(3)
    if "head" in asked:
        return Response(headers=[(f"heard-{name}", value) for name, value in request.headers])
    pieces = [request.body]
    if "pieces" in asked:
        pieces = [b"x" * int(asked.get("bytes", 1000))] * int(asked["pieces"])

    async def paced():
        for piece in pieces:
            yield piece
            await asyncio.sleep(float(asked.get("pace_s", 0)))

    body = paced() if "chunked" in asked else b"".join(pieces)
    headers = [("content-type", "text/plain"), ("x-twice", "1"), ("x-twice", "2")]
    return Response(body, status=int(asked.get("status", 200)), headers=headers)


app = App(obey)
