"""The command line: `python -m substrate_guest serve module:attribute [--chdir DIR]`."""

import sys

USAGE = """\
usage: python -m substrate_guest serve MODULE:ATTRIBUTE [--chdir DIR]

Serves a workload to the host of this guest, one HTTP exchange per connection.

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
        case _:
            sys.exit(_misused(arguments))
    from substrate_guest import shim

    shim.main(target, directory=directory)


def _misused(arguments: list[str]) -> int:
    print(  # noqa: T201  # the console is where this is read
        f"substrate-guest: found {' '.join(arguments)!r}, accepted is serve MODULE:ATTRIBUTE [--chdir DIR]; see --help",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    main(sys.argv[1:])
