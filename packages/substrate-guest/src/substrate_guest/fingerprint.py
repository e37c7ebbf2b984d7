"""What two guests must not have in common, for a node that checks its clones."""

import os
import random
import socket
import tempfile
import time
import uuid

try:
    import ssl
except ImportError:  # the interpreter that is added to images has no OpenSSL
    ssl = None  # type: ignore[assignment]

BOOT_ID, MACHINE_ID = "/proc/sys/kernel/random/boot_id", "/etc/machine-id"


def fingerprint() -> dict[str, object]:
    """What this guest draws when it needs something that nobody else has, who it says it is, and the time.

    `random` and `secrets` of Python's modules, and of OpenSSL, names for temporary files, and the kernel's own; the
    time is in nanoseconds since 1970.
    """
    return {
        "random": random.getrandbits(64),
        "uuid1": str(uuid.uuid1()),
        "uuid4": str(uuid.uuid4()),
        "urandom": os.urandom(16).hex(),
        "openssl": ssl.RAND_bytes(16).hex() if ssl else None,
        "temporary": os.path.basename(tempfile.mktemp()),  # noqa: PTH119, S306  # only its name is wanted
        "hostname": socket.gethostname(),
        "machine_id": _read(MACHINE_ID),
        "boot_id": _read(BOOT_ID),
        "epoch_ns": time.time_ns(),
    }


def _read(path: str) -> str | None:
    """What a small file says; None where there is none."""
    try:
        with open(path, encoding="ascii") as file:  # noqa: PTH123  # pathlib is slow to import
            return file.read().strip()
    except FileNotFoundError:
        return None
