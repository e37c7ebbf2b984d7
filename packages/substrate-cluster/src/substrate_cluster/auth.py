"""Who calls: the ways in which an `Authorization` header becomes a caller's name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from substrate_seam.errors import Ran, Reason, SubstrateError

ANONYMOUS: Final = "anonymous"
"""The name of every caller where callers are not asked who they are."""

_BEARER: Final = re.compile(rb"bearer[ \t]+([!-~]+)", re.IGNORECASE)
_LINE: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9._:@/-]{0,252})[ \t]+sha256:([0-9A-Fa-f]{64})")
_INDEX_BYTES: Final = 8


class Authenticator(Protocol):
    """Says who calls. With `uses_authorization` the header is the front's own and never reaches a guest."""

    @property
    def uses_authorization(self) -> bool:
        """Whether callers identify themselves to us by `Authorization`."""
        ...

    async def authenticate(self, authorization: Sequence[bytes]) -> str:
        """The caller's name, from the values of the request's `Authorization` fields.

        Raises `SubstrateError`: `unauthenticated`, or `dependency-unavailable` when whoever knows cannot be asked.
        """
        ...


class Anonymous:
    """Asks nobody who they are."""

    uses_authorization = False

    async def authenticate(self, authorization: Sequence[bytes]) -> str:
        """The one name there is; an `Authorization` header is the guest's business."""
        return ANONYMOUS


def bearer_token(authorization: Sequence[bytes]) -> bytes:
    """The token of the one `Authorization: Bearer` field; raises `unauthenticated` when it is missing or malformed."""
    found = _BEARER.fullmatch(authorization[0].strip()) if len(authorization) == 1 else None
    if found is None:
        raise SubstrateError(
            Reason.UNAUTHENTICATED,
            "missing or malformed Authorization header",
            ran=Ran.NO,
            hint="Send one `Authorization: Bearer <token>`.",
        )
    return found[1]


def rejected() -> SubstrateError:
    """The answer to a token that names nobody; it says no more than that."""
    return SubstrateError(Reason.UNAUTHENTICATED, "unauthorized", ran=Ran.NO)


class TokensRefused(ValueError):
    """A token file that cannot be used; `problems` has every one of them, with its line."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


class StaticTokens:
    """Knows callers by the hashes of their tokens, one `name sha256:hex` a line; the tokens themselves are nowhere."""

    uses_authorization = True

    def __init__(self, path: Path) -> None:
        """Read the file; raises `TokensRefused`."""
        self._path = path
        self._callers: Mapping[bytes, tuple[bytes, str]] = {}
        self.reload()

    def reload(self) -> None:
        """Put the file as it is now in force; raises `TokensRefused`, and then what was in force stays so."""
        try:
            text = self._path.read_text("utf-8")
        except OSError as error:
            raise TokensRefused([f"{self._path}: the file of tokens can't be read: {error.strerror}"]) from error
        except UnicodeDecodeError as error:
            raise TokensRefused([f"{self._path}: {error}"]) from error
        try:
            self._callers = _parse(text)
        except TokensRefused as error:
            raise TokensRefused([f"{self._path}: {problem}" for problem in error.problems]) from None

    async def authenticate(self, authorization: Sequence[bytes]) -> str:
        """The name beside the token's hash."""
        digest = sha256(bearer_token(authorization)).digest()
        # A part of the digest finds the one candidate; the rest is compared in constant time.
        known, name = self._callers.get(digest[:_INDEX_BYTES], (b"", ""))
        if not compare_digest(known, digest):
            raise rejected()
        return name


def _parse(text: str) -> Mapping[bytes, tuple[bytes, str]]:
    """The callers of a token file by the start of their digests; a caller may have several tokens."""
    callers: dict[bytes, tuple[bytes, str]] = {}
    first_lines: dict[bytes, int] = {}
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        found = _LINE.fullmatch(entry)
        if found is None:
            problems.append(f"line {number}: accepted is `name sha256:` and 64 hex digits, or a comment after `#`")
            continue
        name, digest = found[1], bytes.fromhex(found[2])
        index = digest[:_INDEX_BYTES]
        if name == ANONYMOUS:
            problems.append(f"line {number}: {ANONYMOUS!r} is what callers without a token are called; choose another")
        elif index in callers:
            problems.append(f"line {number}: the same hash as in line {first_lines[index]}")
        else:
            callers[index] = (digest, name)
            first_lines[index] = number
    if problems:
        raise TokensRefused(problems)
    return callers


if TYPE_CHECKING:
    _fits: tuple[type[Authenticator], ...] = (Anonymous, StaticTokens)
