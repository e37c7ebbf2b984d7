"""What a workload's author writes against: `Request` in, a body or a `Response` out, and hooks around it."""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from substrate_guest.identity import Identity

Headers = Mapping[str, str] | Iterable[tuple[str, str]]
Body = bytes | str | dict[str, Any] | list[Any] | Iterator[bytes] | AsyncIterator[bytes]
Handler = Callable[["Request"], Any]
"""Takes a `Request`, returns a `Body` or a `Response`, or a coroutine of either."""

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request, whole: the body is complete before a handler sees it."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...] = ()
    """Names in lower case, in the order they came; values as latin-1."""
    body: bytes = b""

    @property
    def path(self) -> str:
        """The target up to its query, percent-decoded."""
        return _unquoted(self.target.partition("?")[0])

    @property
    def query(self) -> str:
        """What follows the first `?` of the target, as sent; empty without one."""
        return self.target.partition("?")[2]

    @property
    def session(self) -> str | None:
        """The session of `/invoke/{session}`, each segment percent-decoded; `None` without one."""
        path = self.target.partition("?")[0]
        return _unquoted(path.removeprefix("/invoke/")) or None if path.startswith("/invoke/") else None

    def header(self, name: str) -> str | None:
        """The first value of header `name`, in any case; `None` without one."""
        name = name.lower()
        return next((value for found, value in self.headers if found == name), None)

    def json(self) -> Any:  # noqa: ANN401  # JSON is any of its types
        """The body as JSON; raises `ValueError` when it is not."""
        import json

        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Response:
    """What goes back to the caller.

    A body that is known at once gets a `content-length`; an iterator is sent chunked, each piece flushed as it comes.
    `content-type` follows from the type of the body unless `headers` has one.
    """

    body: Body = b""
    status: int = 200
    headers: Headers = ()


class App:
    """A handler and the hooks around it.

    `prime` warms up, once, before the guest says it is ready (and before a snapshot is taken). `before` hooks get the
    request, in order; the first error skips the handler. `after` hooks get the request too; all of them run, whatever
    happened, and their errors join the handler's. `restored` hooks get the `Identity` of a guest that has just been
    restored from a snapshot (or booted): the place to reseed, reconnect and forget cached time. Each may be a plain or
    an async function; plain ones run in a thread.
    """

    def __init__(
        self,
        handler: Handler | None = None,
        *,
        prime: Callable[[], Any] | None = None,
        before: Iterable[Callable[[Request], Any]] = (),
        after: Iterable[Callable[[Request], Any]] = (),
        restored: Iterable[Callable[[Identity], Any]] = (),
    ) -> None:
        self.handlers: list[Handler] = [] if handler is None else [handler]
        self.prime_hooks: list[Callable[[], Any]] = [] if prime is None else [prime]
        self.before_hooks = list(before)
        self.after_hooks = list(after)
        self.restored_hooks = list(restored)

    def handler(self, function: Function) -> Function:
        """Make `function` the handler; raises `ValueError` if there is one."""
        if self.handlers:
            raise ValueError(f"an App has one handler, and this one has {self.handlers[0]!r}")
        self.handlers.append(function)
        return function

    def prime(self, function: Function) -> Function:
        """Run `function()` before the guest says it is ready."""
        self.prime_hooks.append(function)
        return function

    def before(self, function: Function) -> Function:
        """Run `function(request)` before the handler."""
        self.before_hooks.append(function)
        return function

    def after(self, function: Function) -> Function:
        """Run `function(request)` after the handler, also when that failed."""
        self.after_hooks.append(function)
        return function

    def restored(self, function: Function) -> Function:
        """Run `function(identity)` whenever the guest is told who it is now."""
        self.restored_hooks.append(function)
        return function


def _unquoted(path: str) -> str:
    if "%" not in path:
        return path
    from urllib.parse import unquote

    return unquote(path, errors="surrogateescape")  # bytes that are not UTF-8 stay distinct
