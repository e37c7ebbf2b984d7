"""The command line of fc-invoke: `serve` unless told otherwise."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

DEFAULT_URL = "http://127.0.0.1:8080"
DEFAULT_ADMIN_URL = "http://127.0.0.1:8081"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says; exits with 0 when it went well, 1 when it did not, 2 when it made no sense."""
    try:
        chosen = parser().parse_args(_with_default(sys.argv[1:] if arguments is None else list(arguments)))
        status = chosen.run(chosen)
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # whoever reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)


def _with_default(arguments: list[str]) -> list[str]:
    about_itself = {"-h", "--help", "--version"}
    return (
        arguments if arguments and (arguments[0] in about_itself or arguments[0][0] != "-") else ["serve", *arguments]
    )


def parser() -> argparse.ArgumentParser:
    """What the command line may say. It loads none of what the commands need: a daemon keeps what it loads."""
    line = argparse.ArgumentParser(
        prog="fc-invoke",
        description="Runs each request in a guest of its own. Settings are environment variables: see README.md.",
    )
    line.add_argument("--version", action="version", version=f"fc-invoke {version('fc-invoke')}")
    verbs = line.add_subparsers(title="commands", metavar="COMMAND", required=True)

    serve = verbs.add_parser("serve", help="serve workloads (the default); built-in ones if no table is configured")
    serve.add_argument("--workers", type=int, default=1, help="must be 1: there is one node, and it has one queue")
    serve.set_defaults(run=_serve)

    _add_dev(verbs)

    check = verbs.add_parser("check", help="check a workload table and list everything that is wrong with it")
    check.add_argument("file", help="a table in JSON or YAML; `-` is standard input")
    check.add_argument("--host", action="store_true", help="also check what the table names on this machine")
    check.set_defaults(run=_check)

    doctor = verbs.add_parser(
        "doctor",
        help="look at this machine: which guests it can run with the settings there are, and what to do otherwise",
        description="Exit status: 0 for all guests, 3 for process guests only, 4 for microVMs only, 1 for none.",
    )
    doctor.add_argument("--json", action="store_true", help="for a program to read")
    doctor.set_defaults(run=_doctor)

    invoke = verbs.add_parser("invoke", help="call a workload and show where the time went")
    invoke.add_argument("workload")
    invoke.add_argument("session", nargs="?")
    body = invoke.add_mutually_exclusive_group()
    body.add_argument("-d", "--data", help="the body, as text; `@FILE` is what a file holds, `@-` standard input")
    body.add_argument("-f", "--file", help="a file with the body; `-` is standard input")
    _add_addresses(invoke)
    invoke.set_defaults(run=_invoke)

    explain = verbs.add_parser("explain", help="tell the whole story of one invocation")
    explain.add_argument("id", help="what `fc-invocation-id` said")
    _add_addresses(explain)
    explain.set_defaults(run=_explain)

    top = verbs.add_parser("top", help="watch queue, guests, starts, latencies and failures of a running daemon")
    top.add_argument("--once", action="store_true", help="print one snapshot and leave")
    top.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="between looks (default: %(default)g)")
    _add_admin(top, "--admin")
    top.set_defaults(run=_top)

    audit = verbs.add_parser("audit", help="misbehave towards a running system and check that it told the truth")
    audit.add_argument("workload", nargs="?", default="echo")
    audit.add_argument("--calls", type=int, default=200)
    audit.add_argument("--at-once", type=int, default=16)
    audit.add_argument("--seed", type=int, default=0)
    audit.add_argument(
        "--journal",
        action="append",
        metavar="URL",
        help="admin listener of a daemon that keeps the journal (each node's, if there are several)",
    )
    _add_addresses(audit)
    audit.set_defaults(run=_audit)

    verify = verbs.add_parser("verify-clones", help="check that the clones of a workload are guests of their own")
    verify.add_argument("workload")
    verify.add_argument("--clones", type=_several, default=100, help="how many to compare (default: %(default)s)")
    verify.add_argument(
        "--clock-ms",
        type=float,
        default=10.0,
        help="how far their clocks may be from the host's (default: %(default)s; take 50 in an emulated machine)",
    )
    verify.set_defaults(run=_verify_clones)

    _add_image(verbs)
    return line


def _several(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"found {text!r}; accepted are numbers from 2 on: there is nothing to compare")
    return int(text)


def _add_dev(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    dev = verbs.add_parser("dev", help="serve your own callable or ASGI app, and take up every change of its files")
    dev.add_argument("target", metavar="MODULE:ATTRIBUTE", help="what to serve, for example app:app")
    dev.add_argument(
        "--path", default=".", help="the directory to import from, all that guests see (default: this one)"
    )
    dev.add_argument("--name", help="what to call it by (default: the last part of MODULE)")
    dev.add_argument("--port", type=int, default=8080, help="0 is any that is free (default: %(default)s)")
    dev.add_argument("--admin-port", type=int, default=8081, help="for explain and metrics (default: %(default)s)")
    dev.add_argument("--memory", type=int, default=256, metavar="MIB", help="of each guest (default: %(default)s)")
    dev.add_argument("--timeout", default="30s", help="how long one call may take (default: %(default)s)")
    dev.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="a variable of the guests")
    dev.add_argument("--json", action="store_true", help="events as lines of JSON on standard error, for programs")
    dev.add_argument("--lifeline", action="store_true", help=argparse.SUPPRESS)  # of the fixture `substrate`
    dev.set_defaults(run=_dev)


def _add_image(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    image = verbs.add_parser("image", help="make root file systems for microVMs of container images")
    actions = image.add_subparsers(title="commands", metavar="COMMAND", required=True)
    made = actions.add_parser("build", help="build the root file system of one image, unless it is there")
    made.add_argument(
        "image", metavar="REF|PATH", help="a registry's image, an OCI layout, or an archive of either kind"
    )
    made.add_argument("--name", help="which of several images at PATH")
    made.add_argument("--init", type=Path, metavar="DIR", help="what to add below /.substrate (default: our init)")
    made.add_argument("--size", type=_size, metavar="SIZE", help="as 512M or 4G (default: as large as it must be)")
    made.add_argument("--limit", type=_size, metavar="SIZE", help="the most that all layers may unpack to (32G)")
    made.add_argument("--state-root", type=Path, help="default: FC_INVOKE_STATE_ROOT, or the daemon's own default")
    made.add_argument("--plain-http", action="store_true", help="ask the registry without TLS")
    made.add_argument("--quiet", action="store_true", help="no progress, even on a terminal")
    made.set_defaults(run=_image)


def _size(text: str) -> int:
    """A size as people write it: a number, and K, M, G or T for powers of 1024."""
    found = re.fullmatch(r"([1-9]\d{0,14})([KMGT]?)(?:i?B)?", text, re.ASCII)
    if found is None:
        raise argparse.ArgumentTypeError(f"found {text!r}; accepted are sizes such as 512M and 4G")
    return int(found[1]) * _UNITS[found[2]]


def _add_addresses(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--url", default=DEFAULT_URL, help="the public listener (default: %(default)s)")
    verb.add_argument("--token-file", help="a file that holds the caller's token")
    _add_admin(verb)


def _add_admin(verb: argparse.ArgumentParser, *short: str) -> None:
    verb.add_argument(
        "--admin-url",
        *short,
        default=DEFAULT_ADMIN_URL,
        metavar="URL",
        help="the admin listener (default: %(default)s)",
    )
    verb.add_argument("--admin-token-file", help="a file that holds the operator's token")


def _serve(chosen: argparse.Namespace) -> int:
    from fc_invoke.serving import serve

    if chosen.workers != 1:
        print(f"--workers: found {chosen.workers}; accepted is 1: a node has one queue and one ledger", file=sys.stderr)
        return 2
    return serve(os.environ)


def _dev(chosen: argparse.Namespace) -> int:
    from fc_invoke.dev import Work, dev

    work = Work(
        target=chosen.target,
        path=Path(chosen.path).absolute(),
        name=chosen.target.partition(":")[0].rpartition(".")[2] if chosen.name is None else chosen.name,
        port=chosen.port,
        admin_port=chosen.admin_port,
        memory_mib=chosen.memory,
        timeout=chosen.timeout,
        env=tuple(chosen.env),
        as_json=chosen.json,
        lifeline=chosen.lifeline,
    )
    return dev(work, os.environ)


def _check(chosen: argparse.Namespace) -> int:
    from fc_invoke.checking import check

    return check(chosen.file, host=chosen.host)


def _doctor(chosen: argparse.Namespace) -> int:
    from fc_invoke.doctor import doctor

    return doctor(os.environ, as_json=chosen.json)


def _invoke(chosen: argparse.Namespace) -> int:
    from fc_invoke import client

    return client.told_errors(
        lambda: client.invoke(
            chosen.url,
            chosen.admin_url,
            client.Call(chosen.workload, chosen.session, client.read_body(chosen.data, chosen.file)),
            token=client.read_token(chosen.token_file),
            admin_token=client.read_token(chosen.admin_token_file),
        )
    )


def _explain(chosen: argparse.Namespace) -> int:
    from fc_invoke import client

    return client.told_errors(
        lambda: client.explain(chosen.admin_url, chosen.id, admin_token=client.read_token(chosen.admin_token_file))
    )


def _top(chosen: argparse.Namespace) -> int:
    from fc_invoke import client, top

    return client.told_errors(
        lambda: top.watch(
            chosen.admin_url,
            token=client.read_token(chosen.admin_token_file),
            once=chosen.once,
            every_s=max(0.1, chosen.every),
        )
    )


def _audit(chosen: argparse.Namespace) -> int:
    from fc_invoke import auditing, client

    return client.told_errors(
        lambda: auditing.run(
            [chosen.url],
            chosen.journal or [chosen.admin_url],
            workload=chosen.workload,
            calls=chosen.calls,
            at_once=chosen.at_once,
            seed=chosen.seed,
            token=client.read_token(chosen.token_file),
            admin_token=client.read_token(chosen.admin_token_file),
        )
    )


def _verify_clones(chosen: argparse.Namespace) -> int:
    from fc_invoke import verifying

    return verifying.run(chosen.workload, clones=chosen.clones, clock_ms_max=chosen.clock_ms, environment=os.environ)


def _image(chosen: argparse.Namespace) -> int:
    from fc_invoke import imaging

    return imaging.run(chosen, os.environ)


if __name__ == "__main__":
    main()
