"""A workload as nodes know it: what to start a guest from, and how many. Its digest is its identity."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from substrate_seam.invocation import Isolation, WorkloadRef

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")]  # `$` would take a trailing newline
Positive = Annotated[int, Meta(ge=1)]

FEATURES = frozenset({"sessioned", "pool"})
"""What a node of this version knows of `WorkloadSpec.requires`."""


class EgressRules(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a guest may connect: host or host:port patterns; `deny` wins over `allow`."""

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()


class WorkloadSpec(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one workload needs from a node. Tolerant of fields it does not know: planes are upgraded separately.

    Exactly one of `command` (a process guest) and `rootfs_path` (a microVM) is set. `requires` names the features a
    node must know to run this safely; a node that lacks one refuses instead of ignoring it.
    """

    name: Name
    command: tuple[str, ...] = ()
    path: str | None = None
    python: str | None = None
    env: dict[str, str] = {}
    image: str = ""
    rootfs_path: str | None = None
    harness_init: str | None = None
    guest: Literal["substrate", "go-shim"] = "substrate"
    isolation: Isolation | None = None
    vcpus: Positive = 2
    memory_mib: Positive = 2048
    concurrency: Positive = 4
    queue: Annotated[int, Meta(ge=0)] = 256
    pool: Annotated[int, Meta(ge=0)] = 0
    warm_base: bool = False
    ready_path: str = "/shim/ready"
    sessioned: bool = False
    egress_enabled: bool = False
    egress: EgressRules | None = None
    prime_egress: bool = False
    requires: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a spec that names no guest, or two."""
        if bool(self.command) == (self.rootfs_path is not None):
            raise ValueError(f"workload {self.name!r} needs exactly one of `command` and `rootfs_path`")


# msgspec leaves a default out only when it is the very same object, which a number read from a file is not.
_DEFAULTS = {
    field.name: {} if field.default_factory is dict else field.default for field in msgspec.structs.fields(WorkloadSpec)
}


class Workload:
    """A spec together with the very bytes that travel; `digest` is the SHA-256 of those bytes in hex.

    The bytes are kept as received, because decoding drops what a newer peer added.
    """

    __slots__ = ("digest", "raw", "spec")

    def __init__(self, spec: WorkloadSpec, raw: bytes) -> None:
        self.spec = spec
        self.raw = raw
        self.digest = hashlib.sha256(raw).hexdigest()

    @classmethod
    def of(cls, spec: WorkloadSpec) -> Workload:
        """Seal a spec: sorted keys, defaults left out, so equal specs have equal digests."""
        said = {name: value for name, default in _DEFAULTS.items() if (value := getattr(spec, name)) != default}
        return cls(spec, msgspec.json.encode(said, order="sorted"))

    @classmethod
    def parse(cls, raw: bytes) -> Workload:
        """Read the bytes of another plane; raises `msgspec.ValidationError` or `msgspec.DecodeError`."""
        return cls(msgspec.json.decode(raw, type=WorkloadSpec), raw)

    @property
    def name(self) -> str:
        """The name people gave it; queue and slots go by it."""
        return self.spec.name

    @property
    def ref(self) -> WorkloadRef:
        """How an invocation names it."""
        return WorkloadRef(self.spec.name, self.digest)

    def __eq__(self, other: object) -> bool:
        """Two workloads are equal when their bytes are."""
        return isinstance(other, Workload) and other.raw == self.raw

    def __hash__(self) -> int:
        """Hash the digest."""
        return hash(self.digest)

    def __repr__(self) -> str:
        """Show name and digest."""
        return f"Workload({self.name!r}, {self.digest[:12]})"
