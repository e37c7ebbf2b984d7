"""Images from registries, over the distribution API: every part checked against its digest, downloads resumed."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, TypeVar

import httpx
from msgspec import Struct

from fc_invoke.credentials import DOCKER_HUB, Login
from substrate_node.images import Descriptor, Image, ImageUnusable, Limits, Progress, image_of, locked
from substrate_node.images.documents import INDEX_TYPES, MANIFEST_TYPES, checked_digest

_HUB_HOST = "registry-1.docker.io"
_HOST = r"(?P<host>localhost|(?:[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*)|\[[0-9a-fA-F:]+\])(?::(?P<port>\d{1,5}))?"
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
_ANSWER_BYTES_MAX = 1 << 16
_TRIES = 5
"""In a row without a single new byte."""
_PAUSE_S, _PAUSE_S_MAX = 0.25, 30.0
_STALE_S = 7 * 24 * 3600
_TIMES = httpx.Timeout(60.0, connect=10.0)

Result = TypeVar("Result")


class RegistryUnavailable(Exception):
    """A registry did not answer, or not in a way that helps; the message says which and what to do."""


class Reference(Struct, frozen=True, kw_only=True):
    """The name of an image in a registry; `tag` counts only without `digest`."""

    registry: str
    repository: str
    tag: str
    digest: str | None

    @classmethod
    def of(cls, text: str) -> Reference:
        """What people write: `[registry/]name[:tag][@digest]`. Raises `ImageUnusable`."""
        name, at, digest = text.partition("@")
        head, _, rest = name.partition("/")
        if rest and (head == "localhost" or any(mark in head for mark in ".:[")):
            registry, path = head, rest
        else:
            registry, path = DOCKER_HUB, name
        path, _, tag = path.partition(":")
        if registry in (DOCKER_HUB, "index.docker.io", _HUB_HOST):
            registry, path = DOCKER_HUB, path if "/" in path else f"library/{path}"
        if not (re.fullmatch(_HOST, registry) and _PATH.fullmatch(path) and _TAG.fullmatch(tag or "latest")):
            raise ImageUnusable(
                f"{text[:200]!r} names no image; accepted are `[registry/]name[:tag][@sha256:…]` and paths that exist"
            )
        return cls(
            registry=registry,
            repository=path,
            tag=tag or "latest",
            digest=checked_digest(digest, text[:200]) if at else None,
        )

    def __str__(self) -> str:
        return f"{self.registry}/{self.repository}{f'@{self.digest}' if self.digest else f':{self.tag}'}"

    def url(self, *, plain_http: bool) -> str:
        """Where the registry's API is; without TLS only on this machine, or where somebody said so."""
        host = _HUB_HOST if self.registry == DOCKER_HUB else self.registry
        scheme = "http" if plain_http or _is_loopback(host) else "https"
        return f"{scheme}://{host}/v2/{self.repository}"


@contextmanager
def pulled(
    reference: Reference,
    *,
    into: Path,
    architecture: str,
    login: Login | None,
    limits: Limits,
    report: Callable[[Progress], None],
    plain_http: bool = False,
    pause: Callable[[float], object] = time.sleep,
) -> Iterator[Image]:
    """An image of a registry, for the length of the block; its layers are fetched when they are opened.

    They are kept below `into` until the block ends. When it is broken off, or something is not to be had, they stay
    there, and the next attempt goes on where this one stopped. Raises `ImageUnusable` and `RegistryUnavailable`, as
    does opening a layer.
    """
    url = reference.url(plain_http=plain_http)
    own_proxies = not _is_loopback(httpx.URL(url).netloc.decode())
    headers = {"accept-encoding": "identity", "user-agent": "fc-invoke"}
    with httpx.Client(follow_redirects=True, timeout=_TIMES, trust_env=own_proxies, headers=headers) as client:
        source = _Repository(client, reference, url, login, pause)
        top = source.top(limits)
        _remove_stale(into)
        place = into / top.digest.removeprefix("sha256:")
        with locked(into / f".lock-{place.name}", waiting=lambda: report(_waiting(reference))):
            place.mkdir(mode=0o700, exist_ok=True)
            blobs = _Blobs(source, place, limits, report)
            try:
                yield image_of(blobs, (top,), str(reference), architecture=architecture, name=None, limits=limits)
            except ImageUnusable:  # nor will another attempt make it better
                shutil.rmtree(place)
                raise
            shutil.rmtree(place)


class _Blobs:
    """The parts of one image: documents in memory, everything else in files that are complete and checked."""

    def __init__(self, source: _Repository, place: Path, limits: Limits, report: Callable[[Progress], None]) -> None:
        self._source = source
        self._place = place
        self._limits = limits
        self._report = report

    def open(self, wanted: Descriptor, /) -> IO[bytes]:
        if wanted.media_type in INDEX_TYPES | MANIFEST_TYPES:
            return BytesIO(self._source.manifest(wanted.digest, self._limits)[1])
        path = self._place / wanted.digest.removeprefix("sha256:")
        if not path.exists():
            self._source.fetch(wanted, path, self._report)
        return path.open("rb", buffering=0)


class _Again(Exception):
    """It may go well another time, after so many seconds or when we think fit."""

    def __init__(self, why: str, after_s: float | None = None) -> None:
        super().__init__(why)
        self.after_s = after_s


class _Repository:
    """One repository of a registry, and how it wants to be asked."""

    def __init__(
        self,
        client: httpx.Client,
        reference: Reference,
        url: str,
        login: Login | None,
        pause: Callable[[float], object],
    ) -> None:
        self._client = client
        self._reference = reference
        self._url = url
        self._login = login
        self._pause = pause
        self._authorization: str | None = None
        self._manifests: dict[str, tuple[str, bytes]] = {}

    def top(self, limits: Limits) -> Descriptor:
        """What the reference names: a manifest or an index, whose digest is that of its bytes."""
        named = self._reference.digest or self._reference.tag
        media_type, data = self.manifest(named, limits)
        digest = _digest_of(data)
        self._manifests[digest] = media_type, data
        return Descriptor(media_type, digest, len(data))

    def manifest(self, named: str, limits: Limits) -> tuple[str, bytes]:
        """The media type and the bytes of a manifest or an index, by tag or by digest."""
        if named not in self._manifests:
            self._manifests[named] = self._persistently(lambda: self._get_manifest(named, limits), lambda: 0)
        return self._manifests[named]

    def _get_manifest(self, named: str, limits: Limits) -> tuple[str, bytes]:
        accepted = {"accept": ", ".join(sorted(INDEX_TYPES | MANIFEST_TYPES))}
        with self._get(f"/manifests/{named}", accepted) as answer:
            data = _bounded(answer, limits.document_bytes)
            media_type = answer.headers.get("content-type", "").partition(";")[0].strip()
            promised = named if named.startswith("sha256:") else answer.headers.get("docker-content-digest")
        if promised is not None and promised.startswith("sha256:") and promised != _digest_of(data):
            raise ImageUnusable(
                f"{self._reference}: the registry sent {_digest_of(data)} for {promised}. "
                "It is broken, or something between us and it changes what it sends."
            )
        if media_type not in INDEX_TYPES | MANIFEST_TYPES:
            accepted_types = ", ".join(sorted(INDEX_TYPES | MANIFEST_TYPES))
            raise ImageUnusable(f"{self._reference} is of type {media_type[:100]!r}; accepted are {accepted_types}")
        return media_type, data

    def fetch(self, wanted: Descriptor, path: Path, report: Callable[[Progress], None]) -> None:
        """Download a blob to a path, where it appears complete; what an earlier attempt got is not fetched again."""
        partial = path.with_name(f"{path.name}.partial")
        resumed = partial.exists()
        while True:
            self._persistently(lambda: self._fetch_rest(wanted, partial, report), lambda: _size(partial))
            with partial.open("rb") as file:
                found = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
            if found == wanted.digest:
                break
            partial.unlink()
            if not resumed:
                raise ImageUnusable(
                    f"{self._reference}: the registry sent {found} for {wanted.digest}. "
                    "It is broken, or something between us and it changes what it sends."
                )
            resumed = False  # what was there before may have been wrong: once more, from the beginning
        _sync(partial)
        partial.rename(path)

    def _fetch_rest(self, wanted: Descriptor, partial: Path, report: Callable[[Progress], None]) -> None:
        have = _size(partial)
        if have > wanted.size:
            partial.unlink()
            have = 0
        if have == wanted.size and partial.exists():
            return
        with self._get(f"/blobs/{wanted.digest}", {"range": f"bytes={have}-"} if have else {}) as answer:
            if answer.status_code == 206 and _starts_at(answer) != have:
                partial.unlink(missing_ok=True)
                raise _Again("the registry sent another part of a blob than it was asked for")
            done = have if answer.status_code == 206 else 0
            with partial.open("ab" if done else "wb") as file:
                for chunk in answer.iter_raw():  # larger pieces would lose what came before a break
                    done += len(chunk)
                    if done > wanted.size:
                        raise ImageUnusable(
                            f"{self._reference}: {wanted.digest} is longer than the {wanted.size} bytes promised"
                        )
                    file.write(chunk)
                    report(Progress(step="pull", item=wanted.digest[7:19], done_bytes=done, total_bytes=wanted.size))
        if done < wanted.size:
            raise _Again(f"the registry sent {done} of {wanted.size} bytes")

    def _persistently(self, work: Callable[[], Result], reached: Callable[[], int]) -> Result:
        """Do the work, again if need be, until it has failed several times in a row without getting further."""
        failed = 0
        before = reached()
        while True:
            try:
                return work()
            except (_Again, httpx.TransportError) as error:
                failed = failed + 1 if reached() <= before else 1
                before = max(before, reached())
                if failed >= _TRIES:
                    raise RegistryUnavailable(
                        f"{self._reference.registry} can't be used: {error or type(error).__name__}. "
                        "Run the command again: it goes on where it stopped."
                    ) from error
                wanted_s = error.after_s if isinstance(error, _Again) else None
                self._pause(min(_PAUSE_S * 2**failed if wanted_s is None else wanted_s, _PAUSE_S_MAX))

    @contextmanager
    def _get(self, path: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        """An answer of 200 or 206, our login shown if it is asked for. Raises `_Again` and the errors of `pulled`."""
        for attempt in (1, 2):
            shown = {"authorization": self._authorization} if self._authorization else {}
            with self._client.stream("GET", self._url + path, headers={**headers, **shown}) as answer:
                if answer.status_code == 401 and attempt == 1:
                    challenges = answer.headers.get_list("www-authenticate")
                    self._authorization = self._authorize(challenges)
                    continue
                self._check(answer, path)
                yield answer
            return

    def _check(self, answer: httpx.Response, path: str) -> None:
        status = answer.status_code
        if status in (200, 206):
            return
        words = _said(answer)
        if status == 429 or status >= 500 or status == 416:
            after = answer.headers.get("retry-after", "")
            raise _Again(f"it answered {status} {words}", float(after) if after.isdecimal() else None)
        if status in (401, 403):
            hint = f"Run `docker login {self._reference.registry}` with an account that may read it"
            raise ImageUnusable(f"{self._reference}: access denied {words}. {hint}, or check the name.")
        if status == 404:
            what = "such image" if path.startswith("/manifests") else f"{path.rpartition('/')[2]}, a part of the image"
            raise ImageUnusable(f"{self._reference}: the registry has no {what} {words}")
        raise RegistryUnavailable(f"{self._reference.registry} answered {status} {words}")

    def _authorize(self, challenges: list[str]) -> str:
        """What to send as `Authorization`, as one of the challenges wants it."""
        wanted = {challenge.partition(" ")[0].lower(): challenge for challenge in challenges}
        if "bearer" in wanted:
            return f"Bearer {self._token(dict(_CHALLENGE.findall(wanted['bearer'])))}"
        if "basic" in wanted and self._login is not None and self._login.username:
            return _basic(self._login)
        if "basic" in wanted:
            hint = f"Run `docker login {self._reference.registry}`."
            raise ImageUnusable(f"{self._reference}: the registry wants a name and a password. {hint}")
        raise RegistryUnavailable(
            f"{self._reference.registry} wants {', '.join(wanted)[:100] or 'nothing we know of'}; "
            "accepted are Bearer and Basic"
        )

    def _token(self, challenge: Mapping[str, str]) -> str:
        """A token for reading the repository, from where the registry sends us; without a login, anybody's."""
        realm = httpx.URL(challenge.get("realm", ""))
        if realm.scheme != "https" and not (realm.scheme == "http" and self._url.startswith("http://")):
            raise RegistryUnavailable(
                f"{self._reference.registry} sends us for a token to {str(realm)[:200]!r}: not safe"
            )
        query = {"scope": challenge.get("scope") or f"repository:{self._reference.repository}:pull"}
        if "service" in challenge:
            query["service"] = challenge["service"]
        if self._login is not None and self._login.identity_token is not None:
            form = {**query, "grant_type": "refresh_token", "client_id": "fc-invoke"}
            form["refresh_token"] = self._login.identity_token
            request = self._client.build_request("POST", realm, data=form)
        else:
            shown = {"authorization": _basic(self._login)} if self._login is not None else {}
            request = self._client.build_request("GET", realm.copy_merge_params(query), headers=shown)
        answer = self._client.send(request, stream=True)
        try:
            if answer.status_code in (400, 401, 403):
                raise ImageUnusable(
                    f"{self._reference}: the login for {self._reference.registry} was not accepted {_said(answer)}. "
                    f"Run `docker login {self._reference.registry}`."
                )
            if answer.status_code != 200:
                raise _Again(f"its token service answered {answer.status_code} {_said(answer)}")
            told = _json_object(_bounded(answer, _ANSWER_BYTES_MAX))
        finally:
            answer.close()
        token = told.get("token") or told.get("access_token")
        if not isinstance(token, str) or not token.isprintable():
            raise RegistryUnavailable(f"{self._reference.registry}: its token service gave no token")
        return token


def _bounded(answer: httpx.Response, size_max: int) -> bytes:
    data = bytearray()
    for chunk in answer.iter_raw():
        data += chunk
        if len(data) > size_max:
            raise ImageUnusable(f"{answer.url} is over {size_max} bytes long, which is the most accepted")
    return bytes(data)


def _json_object(data: bytes) -> dict[str, object]:
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _said(answer: httpx.Response) -> str:
    """The registry's own words about an error, in brackets, as far as they can be shown."""
    try:
        errors = _json_object(_bounded(answer, _ANSWER_BYTES_MAX)).get("errors")
    except (ImageUnusable, httpx.TransportError):
        errors = None
    first = errors[0] if isinstance(errors, list) and errors and isinstance(errors[0], dict) else {}
    words = " ".join(str(first[key]) for key in ("code", "message") if first.get(key))
    return f"({''.join(letter for letter in words if letter.isprintable())[:200] or answer.reason_phrase})"


def _starts_at(answer: httpx.Response) -> int | None:
    """The first byte of a partial answer."""
    found = re.match(r"bytes (\d+)-", answer.headers.get("content-range", ""))
    return int(found[1]) if found else None


def _basic(login: Login) -> str:
    return f"Basic {base64.b64encode(f'{login.username}:{login.password}'.encode()).decode()}"


def _digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_loopback(host: str) -> bool:
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    try:
        return name == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _waiting(reference: Reference) -> Progress:
    return Progress(step="wait", item=f"for another pull of {reference}", done_bytes=0, total_bytes=None)


def _remove_stale(into: Path) -> None:
    """Remove what pulls left that nobody took up again."""
    into.mkdir(mode=0o700, parents=True, exist_ok=True)
    for place in into.iterdir():
        if place.is_dir() and place.stat().st_mtime < time.time() - _STALE_S:
            with locked(into / f".lock-{place.name}", waiting=None) as ours:
                if ours:
                    shutil.rmtree(place, ignore_errors=True)
