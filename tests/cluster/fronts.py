"""A public application over a scripted executor, with everything around it that a test looks at."""

from __future__ import annotations

from itertools import count

from msgspec import Struct

from fakes.executor import Act, ScriptedExecutor
from substrate_cluster.admission import Admission
from substrate_cluster.auth import Anonymous, Authenticator
from substrate_cluster.ingress import Limits, public_app
from substrate_seam.events import Event, InvocationEnded
from substrate_seam.workload import Workload, WorkloadSpec


class Entry(Struct, frozen=True, kw_only=True):
    workload: Workload
    request_timeout_s: float = 90.0
    start_timeout_s: float = 30.0
    callers: frozenset[str] | None = None


def entry(name: str = "thumb", *, guest: str = "substrate", callers: frozenset[str] | None = None) -> Entry:
    spec = WorkloadSpec(name=name, command=("python", "-m", "app"), guest=guest)
    return Entry(workload=Workload.of(spec), callers=callers)


class Table(dict[str, Entry]):
    def entries(self) -> tuple[Entry, ...]:
        return tuple(self.values())


class Bench:
    """The application under test; leaving its `with` block checks that nothing is held and nothing was told twice."""

    def __init__(
        self,
        *acts: Act,
        entries: tuple[Entry, ...] = (),
        authenticator: Authenticator | None = None,
        caller_limit: int = 64,
        body_budget_bytes: int = 1 << 20,
        limits: Limits | None = None,
        not_ready: tuple[str, ...] = (),
        allowed_hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "::1"),
    ) -> None:
        self.executor = ScriptedExecutor(*acts)
        self.admission = Admission(caller_limit=caller_limit, body_budget_bytes=body_budget_bytes)
        self.events: list[Event] = []
        self._ids = count(1)
        named = entries or (entry(), entry("shim", guest="go-shim"))
        self.app = public_app(
            catalog=Table({each.workload.name: each for each in named}),
            executor=self.executor,
            authenticator=authenticator or Anonymous(),
            admission=self.admission,
            allowed_hosts=allowed_hosts,
            limits=limits or Limits(body_bytes_max=1000),
            ready=lambda: list(not_ready),
            mint_id=lambda: f"{next(self._ids):032x}",
            emit=self.events.append,
            prefix="FC_INVOKE_",
        )

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.admission.in_flight == {}
        assert self.admission.body_bytes == 0
        assert self.executor.given_back == [each.id for each in self.executor.invocations]
        assert len(self.told(InvocationEnded)) == len(self.executor.invocations)

    def told(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def ended(self) -> InvocationEnded:
        (event,) = self.told(InvocationEnded)
        assert isinstance(event, InvocationEnded)
        return event
