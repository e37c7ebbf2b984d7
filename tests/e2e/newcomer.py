"""Does what a document tells a newcomer to do, block by block, and prints as JSON what each command printed.

Arguments are the document and the titles of the chapters to follow. Runs in a network namespace of its own, whose
loopback it raises, so that the ports are free that the document names. A block that starts a daemon runs, as in a
terminal of its own, until the next such block.
"""

import fcntl
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
STARTS_DAEMON = re.compile(r"uv run fc-invoke( dev .*)?$")
SHELL = ["bash", "-euo", "pipefail", "-c"]
UV = 'uv() { shift; "$@"; }\n'
"""`uv run` within an environment that is up to date already."""
LISTENS_WITHIN_S, STOPS_WITHIN_S = 90.0, 60.0


def raise_loopback() -> None:
    """Have a working 127.0.0.1."""
    with socket.socket() as sock:
        fcntl.ioctl(sock, 0x8914, struct.pack("16sh22x", b"lo", 1 | 64))  # SIOCSIFFLAGS: IFF_UP, IFF_RUNNING


def wait_until_it_listens() -> None:
    """Return when the daemon takes calls."""
    deadline_s = time.monotonic() + LISTENS_WITHIN_S
    while time.monotonic() < deadline_s:
        try:
            socket.create_connection(("127.0.0.1", 8080)).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise TimeoutError("the daemon does not listen")


def main(document: str, *titles: str) -> None:
    """Follow the chapters."""
    raise_loopback()
    chapters = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", Path(document).read_text(), re.MULTILINE | re.DOTALL))
    printed, daemon = [], None
    for block in (block for title in titles for block in BLOCK.findall(chapters[title])):
        if STARTS_DAEMON.search(block.strip()):
            stop(daemon)
            daemon = subprocess.Popen([*SHELL, UV + block], start_new_session=True, stdout=sys.stderr)
            wait_until_it_listens()
        else:
            done = subprocess.run([*SHELL, UV + block], capture_output=True, text=True, check=False)
            printed.append({"block": block, "status": done.returncode, "out": done.stdout, "err": done.stderr})
    stop(daemon)
    print(json.dumps(printed))  # noqa: T201  # its reader is a test


def stop(daemon: "subprocess.Popen[bytes] | None") -> None:
    """Press Ctrl-C."""
    if daemon is not None:
        os.killpg(daemon.pid, signal.SIGINT)
        daemon.wait(STOPS_WITHIN_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
