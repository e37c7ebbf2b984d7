"""The command line: `python -m substrate_guest serve module:attribute`, or `exec` or `http` and a program."""

import sys
from typing import NoReturn

PORT_MAX = 65535
USAGE = """\
usage: python -m substrate_guest serve MODULE:ATTRIBUTE [--chdir DIR]
       python -m substrate_guest exec PROGRAM [ARGUMENT...]
       python -m substrate_guest http PORT PROGRAM [ARGUMENT...]

Serves a workload to the host of this guest, one HTTP exchange per connection: a Python object; a program that is run
for each request, with the body as its standard input; or an HTTP server that the program starts on PORT of 127.0.0.1.

  MODULE:ATTRIBUTE  where the workload is: a substrate_guest.App, a callable that takes a
                    substrate_guest.Request, or an ASGI application
  --chdir DIR       change to DIR first, and import from it

built in:
  substrate_guest.workloads.echo:app     answers with what it was sent
  substrate_guest.workloads.python:app   runs {"code": "...", "files": [...]} and answers with its results

environment:
  SUBSTRATE_LISTEN_FD  descriptor of a listening Unix stream socket (hybrid vsock)
  SUBSTRATE_DIAL_FD    descriptor of a Unix SEQPACKET socket that hands out connections to the host
                       (without both: AF_VSOCK, as in a VM)
  SUBSTRATE_AUDIT=1    write each request to the host's journal before acting on it
"""


def main(arguments: list[str]) -> None:
    """Do what `arguments` say; exits with status 2 when they make no sense."""
    # By hand, because every cold guest would wait for argparse to be imported.
    if not arguments or arguments[0] in ("-h", "--help") or arguments[1:2] in (["-h"], ["--help"]):
        print(USAGE, end="")  # noqa: T201  # it was asked for
        sys.exit(0 if arguments else 2)
    match arguments:
        case ["serve", target]:
            directory = None
        case ["serve", target, "--chdir", directory] | ["serve", "--chdir", directory, target]:
            pass
        case ["exec", *argv] if argv:
            _serve_exec(argv)
        case ["http", port, *argv] if argv and port.isdigit() and 0 < int(port) <= PORT_MAX:
            _serve_http(int(port), argv)
        case _:
            sys.exit(_misused(arguments))
    from substrate_guest import shim

    shim.main(target, directory=directory)


def _serve_exec(argv: list[str]) -> NoReturn:
    from substrate_guest import shim
    from substrate_guest.command import Command
    from substrate_guest.execution import ExecWorkload

    shim.run(lambda: ExecWorkload(Command(tuple(argv))))


def _serve_http(port: int, argv: list[str]) -> NoReturn:
    from substrate_guest import shim
    from substrate_guest.command import Command
    from substrate_guest.proxy import HttpWorkload

    shim.run(lambda: HttpWorkload(Command(tuple(argv)), port))


def _misused(arguments: list[str]) -> int:
    print(  # noqa: T201  # the console is where this is read
        f"substrate-guest: found {' '.join(arguments)!r}, accepted are serve MODULE:ATTRIBUTE [--chdir DIR], "
        "exec PROGRAM and http PORT PROGRAM; see --help",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    main(sys.argv[1:])
