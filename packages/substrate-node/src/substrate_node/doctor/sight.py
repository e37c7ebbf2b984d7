"""What was seen of a machine, before anybody judges it."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class Tried(Struct, frozen=True):
    """What came of an attempt: words of success, or `why_not`."""

    said: str = ""
    why_not: str = ""

    @property
    def worked(self) -> bool:
        """Whether it did what was tried."""
        return not self.why_not


class Processor(Struct, frozen=True, kw_only=True):
    """Of the machine: architecture as `uname` says it, what the processor is called, and some of what it can do."""

    arch: str
    name: str
    virtualizes: bool
    """Whether it shows the instructions for virtual machines; always False but on x86-64."""
    emulated: bool
    """Whether a hypervisor says that this is a virtual machine."""


class Kvm(Struct, frozen=True, kw_only=True):
    """The device: whether it is there, opens, and makes a virtual machine. `modules` of it that the kernel has."""

    path: str
    present: bool
    opened: Tried
    api: int | None
    created: Tried
    modules: frozenset[str]


class Program(Struct, frozen=True, kw_only=True):
    """A program of Firecracker's, and what it says of itself."""

    path: str
    version: Tried


class HostFile(Struct, frozen=True, kw_only=True):
    """A file that guests are lent: its first bytes (at least 64 if it has them), and who may read it."""

    path: str
    read: Tried
    head: bytes = b""
    readable_by_all: bool = False


class ControlGroups(Struct, frozen=True, kw_only=True):
    """Version 2 of them, where guests are to get theirs; `root` None: it is not mounted.

    `busy`: it is not the machine's first one, and has processes of its own, which forbids it to have groups below.
    """

    root: str | None
    offered: frozenset[str] = frozenset()
    enabled: frozenset[str] = frozenset()
    writable: bool = False
    busy: bool = False


class Storage(Struct, frozen=True, kw_only=True):
    """The state root, and the file system it is on or will be. `usable` says so, or why the daemon would refuse it."""

    path: str
    usable: Tried
    daemon_pid: int | None
    filesystem: str
    free_mib: int
    holes: Tried
    longest_socket_bytes: int


class Bounds(Struct, frozen=True, kw_only=True):
    """What processes of ours may have; None: no bound. `processes` is the least of what the user and the group may."""

    descriptors: int | None
    processes: int | None
    guest_memory_mib: int


class Sight(Struct, frozen=True, kw_only=True):
    """A machine as a daemon with the same settings would meet it. `prefix` is that of the settings.

    `jail` is what was asked for, `jail_objections` why it can't be had; `measures` what a trial guest told.
    """

    prefix: str
    user: str
    host_kernel: str
    processor: Processor
    kvm: Kvm
    firecracker: Program
    snapshot_format: Tried
    jail: Literal["auto", "on", "off"]
    jail_objections: tuple[str, ...]
    kernel: HostFile
    initrd: HostFile | None
    cgroups: ControlGroups
    storage: Storage
    bounds: Bounds
    process_trial: Tried
    missing_measures: tuple[tuple[str, str, str], ...]
    """Of process guests: name, why not, and a hint, which may be empty."""
