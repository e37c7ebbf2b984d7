"""What the obedient guest does, as a workload of our shim, which can be cloned."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from pathlib import Path

from obedient import attempt, obey, system_call

from substrate_guest import App, Request

VARIABLES = {socket.SOCK_STREAM: "SUBSTRATE_LISTEN_FD", socket.SOCK_SEQPACKET: "SUBSTRATE_DIAL_FD"}


def find_sockets() -> None:
    """Let the obedient guest find the sockets that the shim keeps to itself."""
    for entry in Path("/proc/self/fd").iterdir():
        try:
            with socket.socket(fileno=os.dup(int(entry.name))) as sock:
                if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) or sock.type == socket.SOCK_SEQPACKET:
                    os.environ[VARIABLES[sock.type]] = entry.name
        except OSError:
            continue


async def handler(request: Request) -> bytes:
    """Do what the target says; besides what the obedient guest knows, `/eval/` and an expression in hex.

    `/run/` and a program in hex runs it, and answers with the JSON of what it called `told`.
    """
    find_sockets()
    if request.target.startswith("/eval/"):
        expression = bytes.fromhex(request.target.removeprefix("/eval/")).decode()
        return str(eval(expression, vars(sys.modules[__name__]))).encode()
    if request.target.startswith("/run/"):
        names = {"attempt": attempt, "system_call": system_call, "told": None}
        exec(bytes.fromhex(request.target.removeprefix("/run/")).decode(), names)
        return json.dumps(names["told"]).encode()
    return await asyncio.get_running_loop().run_in_executor(None, obey, request.target)


def prime() -> None:
    """Run what the environment says."""
    exec(os.environ.get("PRIME", ""), vars(sys.modules[__name__]))


app = App(handler)
app.prime(prime)
