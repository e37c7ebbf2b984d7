"""What an image says about the program in it, and what that makes of it as a workload."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from substrate_guest.command import Account, Command
from substrate_guest.loading import NotAWorkload

if TYPE_CHECKING:
    from substrate_guest.workload import Workload

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SERVE_VARIABLE = "SUBSTRATE_SERVE"
SERVE = "`exec`, `http:PORT` or `python:MODULE:ATTRIBUTE`"
PORT_MAX = 65535

ReadText = Callable[[str], str]
"""Reads a file of the image; raises `FileNotFoundError`."""


@dataclass(frozen=True, slots=True)
class Image:
    """The process of an image, as its configuration has it."""

    env: Mapping[str, str]
    argv: tuple[str, ...]
    """Entrypoint and command."""
    directory: str
    user: str

    @classmethod
    def parse(cls, text: str) -> Image:
        """Read the `image.json` that its builder wrote."""
        members = json.loads(text)
        pairs = (item.partition("=") for item in members.get("Env") or [])
        return cls(
            env={name: value for name, _, value in pairs if name},
            argv=(*(members.get("Entrypoint") or []), *(members.get("Cmd") or [])),
            directory=members.get("WorkingDir") or "/",
            user=members.get("User") or "",
        )

    def environ(self, account: Account, overrides: Mapping[str, str]) -> dict[str, str]:
        """The environment of everything that runs in the guest; `overrides` are the kernel's command line's."""
        ours = {name: value for name, value in overrides.items() if name.startswith("SUBSTRATE_")}
        return {"PATH": PATH, "HOME": account.home, "TMPDIR": "/tmp", **self.env, **ours}  # noqa: S108  # the guest's own


def account(user: str, read: ReadText) -> Account:
    """Whom `user` (`name`, `uid`, `name:group`, `uid:gid`; nobody named means root) stands for in this image.

    Raises `NotAWorkload`.
    """
    wanted, _, wanted_group = (user or "0").partition(":")
    known = next((row for row in _rows(read, "/etc/passwd", 6) if wanted in (row[0], row[2])), None)
    if known is None and not wanted.isdigit():
        raise NotAWorkload(f"the image runs as user {wanted!r}, whom its /etc/passwd does not know; give a number")
    groups = _rows(read, "/etc/group", 4)
    gid = known[3] if known else "0"
    if wanted_group:
        gid = next((row[2] for row in groups if wanted_group in (row[0], row[2])), wanted_group)
        if not gid.isdigit():
            raise NotAWorkload(f"the image runs as group {gid!r}, which its /etc/group does not know; give a number")
    more = [] if wanted_group or known is None else [row[2] for row in groups if known[0] in row[3].split(",")]
    uid, home = (known[2], known[5] or "/") if known else (wanted, "/")
    return Account(int(uid), int(gid), tuple(map(int, more)), home)


def served(serve: str, image: Image, who: Account | None, site: str) -> Workload:
    """How to serve an image: its program for each request, its HTTP server, or a module for its own Python.

    `site` is where the Python of an image finds this package. Raises `NotAWorkload`.
    """
    kind, _, rest = serve.partition(":")
    if kind == "python" and rest.count(":") == 1:
        from substrate_guest.foreign import ForeignWorkload

        # Not by PYTHONPATH: what the workload starts would inherit it.
        program = f"import sys; sys.path.append({site!r}); from substrate_guest import shim; shim.main({rest!r})"
        argv = ("python3", "-c", program)
        return ForeignWorkload(Command(argv, image.directory, who))
    if not image.argv and kind in ("exec", "http"):
        raise NotAWorkload("the image names no program: it needs an ENTRYPOINT or a CMD")
    command = Command(image.argv, image.directory, who)
    if serve == "exec":
        from substrate_guest.execution import ExecWorkload

        return ExecWorkload(command)
    if kind == "http" and rest.isdigit() and 0 < int(rest) <= PORT_MAX:
        from substrate_guest.proxy import HttpWorkload

        return HttpWorkload(command, int(rest))
    raise NotAWorkload(f"{SERVE_VARIABLE}: found {serve!r}, accepted are {SERVE}")


def _rows(read: ReadText, path: str, columns: int) -> list[list[str]]:
    try:
        lines = read(path).splitlines()
    except FileNotFoundError:
        return []
    return [row for line in lines if len(row := line.split(":")) >= columns]
