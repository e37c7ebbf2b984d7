"""The settings that several daemons share, each under the daemon's own prefix: of a front, and of a node."""

from __future__ import annotations

import platform
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from msgspec import Struct

from substrate_seam.events import Event, InvocationEnded
from substrate_service.address import Address, TcpAddress
from substrate_service.logs import STEPS
from substrate_service.settings import EnvironmentReader

MIB = 1024 * 1024
JAILED: tuple[Literal["auto", "on", "off"], ...] = ("auto", "on", "off")
LOG_LEVELS = ("info", "debug")
_GO_ARCH = {"x86_64": "amd64", "aarch64": "arm64"}


class FrontSettings(Struct, frozen=True, kw_only=True):
    """Of a daemon that takes calls: where it listens, who may call, what it admits, which workloads there are.

    `drain_within_s` None means: as long as the longest call may take, and 30 s.
    """

    listen: Address
    admin_listen: Address
    admin_token_file: Path | None
    tokens_file: Path | None
    allowed_hosts: tuple[str, ...]
    workloads_file: Path | None
    workloads: str | None
    caller_limit: int
    body_limit_bytes: int
    body_budget_bytes: int
    body_within_s: float
    drain_within_s: float | None


class NodeSettings(Struct, frozen=True, kw_only=True):
    """Of a daemon that runs guests. `memory_mib` None means: what the machine or the container has, less a reserve."""

    node_id: str
    arch: str
    pod_uid: str | None
    state_root: Path | None
    memory_mib: int | None
    boot_within_s: float
    firecracker_bin: Path
    kernel_image: Path
    kernel_initrd: Path | None
    kernel_boot_args: str | None
    harness_init: str
    jailer: Literal["auto", "on", "off"]
    guest_oom_score_adj: int
    audit_journal: Path | None


class TlsFiles(Struct, frozen=True, kw_only=True):
    """A certificate, its key, and the authority that the other end's certificate must come from; PEM files."""

    cert: Path
    key: Path
    ca: Path


def read_tls(reader: EnvironmentReader, prefix: str) -> TlsFiles | None:
    """The files of a wire authenticated both ways, or None; some of them without the others are a problem."""
    names = [f"{prefix}TLS_CERT_FILE", f"{prefix}TLS_KEY_FILE", f"{prefix}TLS_CA_FILE"]
    cert, key, ca = (reader.path(name, None) for name in names)
    if cert is not None and key is not None and ca is not None:
        return TlsFiles(cert=cert, key=key, ca=ca)
    if (cert, key, ca) != (None, None, None):
        for name, path in zip(names, (cert, key, ca), strict=True):
            if path is None:
                reader.refuse(name, "a path, since the other files of the wire's certificate are set")
    return None


def read_front(reader: EnvironmentReader, prefix: str) -> FrontSettings:
    """The front's settings; problems stay in the reader."""
    settings = FrontSettings(
        listen=reader.address(f"{prefix}LISTEN_ADDR", TcpAddress("127.0.0.1", 8080)),
        admin_listen=reader.address(f"{prefix}ADMIN_LISTEN_ADDR", TcpAddress("127.0.0.1", 8081)),
        admin_token_file=reader.path(f"{prefix}ADMIN_TOKEN_FILE", None),
        tokens_file=reader.path(f"{prefix}TOKENS_FILE", None),
        allowed_hosts=reader.names(f"{prefix}ALLOWED_HOSTS"),
        workloads_file=reader.path(f"{prefix}WORKLOADS_FILE", None),
        workloads=reader.text(f"{prefix}WORKLOADS", None),
        caller_limit=reader.integer(f"{prefix}CALLER_LIMIT", 64, at_least=1),
        body_limit_bytes=reader.size(f"{prefix}BODY_LIMIT", 8 * MIB),
        body_budget_bytes=reader.size(f"{prefix}BODY_BUDGET", 256 * MIB),
        body_within_s=reader.duration(f"{prefix}BODY_TIMEOUT", 30.0),
        drain_within_s=reader.duration(f"{prefix}DRAIN_TIMEOUT", None, zero=True),
    )
    if reader.names(f"{prefix}ALLOWED_CALLERS"):
        reader.refuse(
            f"{prefix}ALLOWED_CALLERS",
            f"nothing yet: callers are not reviewed by Kubernetes in this version. Use {prefix}TOKENS_FILE, "
            "and `callers` of each workload",
        )
    if not settings.admin_listen.loopback and settings.admin_token_file is None:
        reader.refuse(
            f"{prefix}ADMIN_LISTEN_ADDR", f"an address of this machine alone, unless {prefix}ADMIN_TOKEN_FILE is set"
        )
    return settings


def read_quiet(
    reader: EnvironmentReader, prefix: str, *, call: type[Event] = InvocationEnded
) -> frozenset[type[Event]]:
    """What the log leaves out: the steps of a call but for `call`, which tells the others, unless all is asked for."""
    level = reader.choice(f"{prefix}LOG_LEVEL", LOG_LEVELS[0], among=LOG_LEVELS)
    return STEPS - {call} if level == LOG_LEVELS[0] else frozenset()


def open_doors(front: FrontSettings, prefix: str) -> tuple[str, ...]:
    """What stands open by these settings, in sentences for operators."""
    doors = []
    if front.tokens_file is None:
        doors.append(f"Anybody may call who reaches the public listener: see {prefix}TOKENS_FILE.")
    if front.admin_token_file is None:
        doors.append(f"Anybody with an account on this machine is an operator: see {prefix}ADMIN_TOKEN_FILE.")
    return tuple(doors)


def read_node(reader: EnvironmentReader, prefix: str, environment: Mapping[str, str]) -> NodeSettings:
    """The node's settings; problems stay in the reader. The node is called as the machine is, if nobody names it."""
    arch = _GO_ARCH.get(platform.machine(), platform.machine())
    return NodeSettings(
        node_id=reader.text(f"{prefix}NODE", environment.get("NODE_NAME") or socket.gethostname()),
        arch=reader.choice(f"{prefix}ARCH", arch, among=(arch,)),
        pod_uid=environment.get("POD_UID") or None,
        state_root=reader.path(f"{prefix}STATE_ROOT", None),
        memory_mib=reader.integer(f"{prefix}MEMORY_MIB", None, at_least=1),
        boot_within_s=reader.duration(f"{prefix}BOOT_READY_TIMEOUT", 60.0),
        firecracker_bin=reader.path(f"{prefix}FIRECRACKER_BIN", Path("/opt/fc/firecracker")),
        kernel_image=reader.path(f"{prefix}KERNEL_IMAGE", Path("/opt/fc/vmlinux.container")),
        kernel_initrd=reader.path(f"{prefix}KERNEL_INITRD", None),
        kernel_boot_args=reader.text(f"{prefix}KERNEL_BOOT_ARGS", None),
        harness_init=reader.text(f"{prefix}HARNESS_INIT", "/usr/local/bin/fc-shim-init"),
        jailer=reader.choice(f"{prefix}JAILER", JAILED[0], among=JAILED),
        guest_oom_score_adj=reader.integer(f"{prefix}GUEST_OOM_SCORE_ADJ", 1000, at_most=1000),
        audit_journal=reader.path(f"{prefix}AUDIT_JOURNAL", None),
    )
