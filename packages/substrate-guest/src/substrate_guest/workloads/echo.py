"""Answers with what it was sent, or says how it was asked."""

import os
import socket
from typing import Any

from substrate_guest.app import App, Request, Response


async def echo(request: Request) -> Response | dict[str, Any]:
    """The body and its content type; with `inspect` in the query, the request and its guest as JSON."""
    if "inspect" not in request.query:
        content_type = request.header("content-type") or "application/octet-stream"
        return Response(request.body, headers={"content-type": content_type})
    return {
        "method": request.method,
        "target": request.target,
        "headers": request.headers,
        "session": request.session,
        "body_bytes": len(request.body),
        "pid": os.getpid(),
        "hostname": socket.gethostname(),
    }


app = App(echo)
