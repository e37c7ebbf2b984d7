"""A workload that does what its request says, one way of misbehaving per word."""

import os
import subprocess
import sys
import time

from substrate_guest import Request, Response


def app(request: Request) -> object:
    """Do what `do` in the query says."""
    match request.query:
        case "die-before":
            os._exit(3)
        case "die-within":
            return Response(_dying(), headers=[("content-type", "text/plain")])
        case "sleep":
            time.sleep(30)
        case "linger":
            time.sleep(0.5)
        case "stream":
            return Response(_ticking(), headers=[("content-type", "text/plain")])
        case "endless":
            return Response(_endless(), headers=[("content-type", "text/plain")])
        case "print":
            sys.stdout.write("from within\n")
        case "work":
            kept, until_s = b"x" * 80_000_000, time.process_time() + 0.1
            while time.process_time() < until_s:
                pass
            return str(len(kept))
        case "feast":
            subprocess.run([sys.executable, "-S", "-c", "b'x' * 100_000_000"], check=True)
        case "heard":
            headers = dict(request.headers)
            return {name: headers[name] for name in ("traceparent", "tracestate")}
        case "big":
            return b"x" * 20_000_000
    return b"done"


def _dying():
    yield b"some "
    time.sleep(0.2)
    os._exit(4)


def _ticking():
    for number in range(5):
        yield b"%d\n" % number
        time.sleep(0.1)


def _endless():
    while True:
        yield b"x" * 1000
        time.sleep(0.01)
