"""The first process of a real machine that does what the monitors' contract asks of a guest, on our own shim."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time

from substrate_guest import init, machine, shim
from substrate_guest.app import App, Request
from substrate_guest.loading import adapted


async def obey(request: Request) -> str:
    """Do what the target says."""
    verb, _, argument = request.path.removeprefix("/").partition("/")
    match verb:
        case "exit":
            os._exit(int(argument))
        case "hang":
            await asyncio.sleep(600)
        case "dial":
            return await asyncio.to_thread(dial, int(argument))
        case "spin":
            deadline = time.process_time() + float(argument) / 1000
            while time.process_time() < deadline:
                pass
        case "see":
            return json.dumps(
                {
                    "urandom": os.urandom(16).hex(),
                    "hostname": socket.gethostname(),
                    "epoch_ns": time.time_ns(),
                    "root": os.statvfs("/").f_flag & os.ST_RDONLY,
                }
            )
    return "hello"


def dial(port: int) -> str:
    """What the port of the host says until it closes."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
        try:
            sock.connect((2, port))
        except OSError:
            return "refused"
        said = b""
        while data := sock.recv(4096):
            said += data
        return said.decode()


def main() -> None:
    """Be the first process."""
    status = 1
    try:
        machine.set_up()
        server = os.fork()
        if server == 0:
            shim.run(lambda: adapted(App(obey)))
        status = os.waitstatus_to_exitcode(os.waitpid(server, 0)[1])
        init.say(f"the server ended with status {status}")
        machine.restart()
    finally:
        os._exit(status)
