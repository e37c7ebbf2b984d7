"""Who a guest is, and how a process that was cloned with all its memory becomes that guest."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from substrate_guest.problems import BadInput, Problem, parsed_object, shown

if TYPE_CHECKING:
    from collections.abc import MutableMapping
    from pathlib import Path

ENTROPY_BYTES_MIN = 32
CA_VARIABLES = ("SSL_CERT_FILE", "GIT_SSL_CAINFO", "NODE_EXTRA_CA_CERTS", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
SYSTEM_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")

Wanted = TypeVar("Wanted")


@dataclass(frozen=True, slots=True)
class Identity:
    """What the node tells a guest about itself after a restore, and after a cold boot too."""

    epoch_ns: int
    """The time now, in nanoseconds since 1970."""
    entropy: bytes
    """Random bytes that no other guest got."""
    guest_id: str
    hostname: str
    boot_id: str
    ca_pem: str | None
    """Certificates to trust beside the system's."""
    restored: bool
    """Whether this guest is a clone; false after a cold boot."""


def parse_identity(body: bytes) -> Identity:
    """The identity in the JSON of `POST /shim/restored`; members we do not know are ignored.

    Raises `BadInput`.
    """
    members = parsed_object(body)
    problems: list[Problem] = []

    def member(name: str, wanted: type[Wanted], accepted: str, default: Wanted) -> Wanted:
        value = members.get(name)
        if isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
            return value
        problems.append(Problem(name, shown(value) if name in members else "nothing", accepted))
        return default

    epoch_ns = member("epoch_ns", int, "nanoseconds since 1970", 0)
    entropy = _entropy(member("entropy_b64", str, "base64 of random bytes", ""), problems)
    guest_id = member("guest_id", str, "a string", "")
    hostname = member("hostname", str, "a string", "")
    boot_id = member("boot_id", str, "a string", "")
    ca_pem = None if members.get("ca_pem") is None else member("ca_pem", str, "PEM certificates or null", "")
    restored = member("restored", bool, "true or false", False)  # noqa: FBT003  # the default of a member
    if problems:
        raise BadInput(problems)
    return Identity(epoch_ns, entropy, guest_id, hostname, boot_id, ca_pem, restored)


def _entropy(encoded: str, problems: list[Problem]) -> bytes:
    from binascii import Error, a2b_base64

    try:
        entropy = a2b_base64(encoded.encode(), strict_mode=True)
    except (Error, ValueError):
        entropy = b""
    if len(entropy) < ENTROPY_BYTES_MIN and not any(problem.path == "entropy_b64" for problem in problems):
        problems.append(
            Problem("entropy_b64", f"{len(encoded)} characters", f"base64 of {ENTROPY_BYTES_MIN} bytes or more")
        )
    return entropy


class Kernel(Protocol):
    """The parts of a kernel that its only guest may set; each method raises `OSError` when it may not."""

    def set_clock(self, epoch_ns: int) -> None:
        """Make `epoch_ns` the time."""
        ...

    def set_hostname(self, hostname: str) -> None:
        """Make `hostname` the name of this machine."""
        ...

    def add_entropy(self, entropy: bytes) -> None:
        """Stir `entropy` into what the kernel hands out as random."""
        ...

    def set_boot_id(self, boot_id: str) -> None:
        """Let `boot_id` be read as the kernel's."""
        ...

    def set_machine_id(self, entropy: bytes) -> None:
        """Let an id made of `entropy` be read as the machine's, where it has one."""
        ...


class OwnKernel:
    """The kernel of the VM that this guest is."""

    def set_clock(self, epoch_ns: int) -> None:
        """See `Kernel.set_clock`."""
        time.clock_settime_ns(time.CLOCK_REALTIME, epoch_ns)

    def set_hostname(self, hostname: str) -> None:
        """See `Kernel.set_hostname`."""
        import socket

        socket.sethostname(hostname)

    def add_entropy(self, entropy: bytes) -> None:
        """See `Kernel.add_entropy`; the pool hands out other bytes from now on, in every process."""
        import fcntl
        import struct

        add_entropy, reseed = 0x40085203, 0x5207  # RNDADDENTROPY and RNDRESEEDCRNG of linux/random.h
        with open("/dev/urandom", "wb", buffering=0) as pool:  # noqa: PTH123  # see `_trust`
            fcntl.ioctl(pool, add_entropy, struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy)
            fcntl.ioctl(pool, reseed)

    def set_boot_id(self, boot_id: str) -> None:
        """See `Kernel.set_boot_id`."""
        from substrate_guest.machine import stand_in

        stand_in("/proc/sys/kernel/random/boot_id", f"{boot_id}\n")

    def set_machine_id(self, entropy: bytes) -> None:
        """See `Kernel.set_machine_id`; the id does not give the entropy away."""
        from hashlib import sha256

        from substrate_guest.machine import stand_in

        stand_in("/etc/machine-id", f"{sha256(b'machine-id' + entropy).hexdigest()[:32]}\n")


class Identities:
    """Makes this process the guest that it is told to be.

    `kernel` is the machine's when it is a VM of its own, and `None` for a process guest: its clock is the host's, and
    what else a namespace may change was changed before the workload ran.
    """

    def __init__(self, kernel: Kernel | None, environ: MutableMapping[str, str]) -> None:
        self._kernel = kernel
        self._environ = environ
        self._ca_bundle: Path | None = None

    def adopt(self, identity: Identity) -> dict[str, str]:
        """Take on `identity`; what became of clock, host name, entropy and CA, in words."""
        reseed(identity.entropy)
        return {
            "entropy": self._ask_kernel("add_entropy", identity.entropy),
            "clock": self._ask_kernel("set_clock", identity.epoch_ns),
            "hostname": self._ask_kernel("set_hostname", identity.hostname),
            "boot_id": self._ask_kernel("set_boot_id", identity.boot_id),
            "machine_id": self._ask_kernel("set_machine_id", identity.entropy),
            "ca": "none" if identity.ca_pem is None else self._trust(identity.ca_pem),
        }

    def _ask_kernel(self, verb: str, value: object) -> str:
        if self._kernel is None:
            return "the host's"
        try:
            getattr(self._kernel, verb)(value)
        except OSError as error:  # a guest that dropped its privileges is not permitted to, and goes on without
            return f"not set: {error.strerror or error}"
        return "set"

    def _trust(self, ca_pem: str) -> str:
        if self._ca_bundle is None:
            import tempfile  # with pathlib, most of what this module would add to a cold start
            from pathlib import Path

            self._ca_bundle = Path(tempfile.mkdtemp(prefix="substrate-ca-")) / "bundle.pem"
        # These variables replace the system's certificates for most of their readers, so the file holds both.
        self._ca_bundle.write_text(_system_certificates() + ca_pem + "\n")
        for variable in CA_VARIABLES:
            self._environ.setdefault(variable, str(self._ca_bundle))
        return str(self._ca_bundle)


def reseed(entropy: bytes) -> None:
    """Make the random numbers of every module that is loaded differ from every other clone's."""
    loaded = sys.modules.get
    if generator := loaded("random"):
        generator.seed(int.from_bytes(entropy))  # not the bytes themselves, which it would hash first
    if tls := loaded("ssl"):
        tls.RAND_add(entropy, float(len(entropy)))
    if temporary := loaded("tempfile"):
        vars(temporary)["_name_sequence"] = None  # made again from fresh bytes at its next use
    if identifiers := loaded("uuid"):
        vars(identifiers).update(_node=None, _last_timestamp=None)  # what `uuid1` remembers of this machine
    if numbers := loaded("numpy.random"):
        numbers.seed(list(entropy))


def _system_certificates() -> str:
    from pathlib import Path

    found = next((Path(name) for name in SYSTEM_BUNDLES if os.access(name, os.R_OK)), None)
    return found.read_text(errors="replace") + "\n" if found else ""
