"""Logins for registries, from where `docker login` keeps them."""

from __future__ import annotations

import base64
import binascii
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

DOCKER_HUB = "docker.io"
_HUB_KEYS = ("https://index.docker.io/v1/", "index.docker.io", "registry-1.docker.io", DOCKER_HUB)
_IDENTITY = "<token>"
_HELPER_WITHIN_S = 30


class LoginUnusable(Exception):
    """What is kept about a login can't be used; the message says where it is kept and why not."""


class Login(Struct, frozen=True, kw_only=True):
    """Who we are to one registry: a name and a password, or a token that is exchanged for others."""

    username: str = ""
    password: str = ""
    identity_token: str | None = None

    def __repr__(self) -> str:
        return f"Login(username={self.username!r})"  # so that no traceback or log ever shows the rest


def docker_config_path(environ: Mapping[str, str]) -> Path:
    """Where `docker login` writes: below `DOCKER_CONFIG`, or in the user's home."""
    directory = environ.get("DOCKER_CONFIG")
    return (Path(directory) if directory else Path(environ.get("HOME") or "/root") / ".docker") / "config.json"


def login_for(registry: str, config: Path) -> Login | None:
    """The login for a registry (`host` or `host:port`), or None. Credential helpers are asked as docker asks them.

    Raises `LoginUnusable`.
    """
    try:
        kept = json.loads(config.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise LoginUnusable(f"{config} can't be read: {error}") from error
    if not isinstance(kept, dict):
        raise LoginUnusable(f"{config} is not what `docker login` writes: it holds no object")
    keys = _HUB_KEYS if registry == DOCKER_HUB else (registry, f"https://{registry}", f"http://{registry}")
    helpers = _object(kept, "credHelpers", config)
    for key in keys:
        helper = helpers.get(key, kept.get("credsStore"))
        asked = _asked(str(helper), key) if helper else None
        if asked is not None:
            return asked
    logins = _object(kept, "auths", config)
    found = next((logins[key] for key in keys if isinstance(logins.get(key), dict)), None)
    return _written(found, registry, config) if found is not None else None


def _object(kept: dict[str, Any], key: str, config: Path) -> dict[str, Any]:
    found = kept.get(key) or {}
    if not isinstance(found, dict):
        raise LoginUnusable(f"{config}: `{key}` is no object")
    return found


def _written(found: Mapping[str, Any], registry: str, config: Path) -> Login | None:
    """A login as it stands in the file."""
    try:
        username, _, password = base64.b64decode(found.get("auth") or "", validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError, TypeError) as error:
        raise LoginUnusable(
            f"{config}: the login for {registry} is malformed. Run `docker login {registry}`."
        ) from error
    token = found.get("identitytoken") or None
    username, password = found.get("username") or username, found.get("password") or password.rstrip("\0")
    if not username and token is None:
        return None
    return Login(username=username, password=password, identity_token=token)


def _asked(helper: str, key: str) -> Login | None:
    """A login from the program `docker-credential-<helper>`; None when it knows none."""
    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run(
            [program, "get"], input=key.encode(), capture_output=True, timeout=_HELPER_WITHIN_S, check=False
        )
        if done.returncode != 0:
            return None  # which is how it says that there is none
        told = json.loads(done.stdout)
        username, secret = str(told["Username"]), str(told["Secret"])
    except FileNotFoundError as error:
        raise LoginUnusable(f"{program} is not installed, but docker's configuration names it") from error
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError, TypeError) as error:
        raise LoginUnusable(f"{program} gave no login for {key}: {type(error).__name__}") from error
    if username == _IDENTITY:
        return Login(identity_token=secret)
    return Login(username=username, password=secret)
