#!/usr/bin/env python3
"""Run a command in an emulated machine whose /dev/kvm works, where this machine has none.

QEMU emulates an x86-64 processor of AMD with its virtualization, and a small Linux runs guests on it. The machine's
files are this machine's, seen read-only below a disk that is thrown away: paths are the same inside, and what a command
writes is gone afterwards, except in shared directories. See docs/emulated-machine.md.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import json
import mmap
import os
import platform
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

TIMED_OUT, FAILED = 124, 125
"""Exit statuses that are not the command's."""
NAME = "emulated-machine"
DISK_BYTES = 32 << 30
MEMORY_MIB = 4096
TESTS_WITHIN_S = 7200.0
KERNEL_SOURCE = Path("/usr/src/linux-source-6.1.tar.xz")
PACKAGES = (
    "linux-source-6.1",
    "gcc",
    "make",
    "flex",
    "bison",
    "bc",
    "libelf-dev",
    "xz-utils",
    "util-linux",
    "e2fsprogs",
)
QEMU_PACKAGES = ("qemu-system-x86", "qemu-system-data", "qemu-system-common", "seabios")
LIBRARIES_OF_QEMU = "qemu-system-x86"

KERNEL_OPTIONS = {
    "a processor": "64BIT SMP HYPERVISOR_GUEST PARAVIRT KVM_GUEST PVH X86_X2APIC X86_MPPARSE",
    "in a quick way": "CC_OPTIMIZE_FOR_PERFORMANCE HZ_100 HIGH_RES_TIMERS NO_HZ_IDLE UNWINDER_GUESS JUMP_LABEL",
    "what makes guests": "VIRTUALIZATION KVM KVM_AMD",
    "tables and buses": "ACPI PCI PCI_MMCONFIG PCI_MSI VIRTIO_MENU VIRTIO_PCI VIRTIO_MMIO VIRTIO_MMIO_CMDLINE_DEVICES",
    "a console, and the keyboard that restarts a guest": """TTY UNIX98_PTYS SERIAL_8250 SERIAL_8250_CONSOLE
        SERIAL_8250_PNP SERIAL_8250_NR_UARTS=1 SERIAL_8250_RUNTIME_UARTS=1 VIRTIO_CONSOLE
        INPUT INPUT_KEYBOARD KEYBOARD_ATKBD SERIO SERIO_I8042 PRINTK BUG KALLSYMS""",
    "disks and file systems": """BLOCK BLK_DEV BLK_DEV_LOOP VIRTIO_BLK EXT4_FS EXT4_FS_POSIX_ACL OVERLAY_FS
        PROC_FS PROC_SYSCTL PROC_PAGE_MONITOR PROC_CHILDREN SYSFS TMPFS TMPFS_POSIX_ACL TMPFS_XATTR
        DEVTMPFS DEVTMPFS_MOUNT NETWORK_FILESYSTEMS NET_9P NET_9P_VIRTIO 9P_FS 9P_FS_POSIX_ACL
        BLK_DEV_INITRD RD_GZIP""",
    "sockets": "NET UNIX PACKET INET IPV6 NETDEVICES NET_CORE TUN VSOCKETS VIRTIO_VSOCKETS",
    "randomness, also for clones": "HW_RANDOM HW_RANDOM_VIRTIO VIRT_DRIVERS VMGENID RANDOM_TRUST_CPU",
    "time": "PTP_1588_CLOCK PTP_1588_CLOCK_KVM",
    "what programs take for granted": """EXPERT MULTIUSER POSIX_TIMERS FUTEX EPOLL SIGNALFD TIMERFD EVENTFD SHMEM AIO
        IO_URING ADVISE_SYSCALLS MEMBARRIER RSEQ FHANDLE FILE_LOCKING INOTIFY_USER SYSVIPC POSIX_MQUEUE BASE_FULL
        ELF_CORE COREDUMP CROSS_MEMORY_ATTACH USERFAULTFD BPF_SYSCALL BINFMT_ELF BINFMT_SCRIPT TRANSPARENT_HUGEPAGE
        COMPACTION HUGETLBFS""",
    "what jails are made of": """NAMESPACES UTS_NS IPC_NS USER_NS PID_NS NET_NS TIME_NS SECCOMP SECCOMP_FILTER
        CGROUPS MEMCG BLK_CGROUP CGROUP_SCHED FAIR_GROUP_SCHED CFS_BANDWIDTH CGROUP_PIDS CGROUP_FREEZER
        CGROUP_CPUACCT CPUSETS""",
}
"""What the kernel is built with, for the machine and for its guests; there is nothing else in it, and no modules."""

MOUNT_9P = "trans=virtio,version=9p2000.L,msize=512000"
INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t ext4 /dev/vda /mnt
mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work root /mnt/root
cd /mnt/root
mount -t proc proc proc
mount -t sysfs sys sys
mount -t devtmpfs dev dev
mkdir -p dev/pts dev/shm
mount -t devpts -o ptmxmode=666 pts dev/pts
mount -t tmpfs shm dev/shm
mount -t tmpfs -o mode=755 run run
mount -t cgroup2 cgroup sys/fs/cgroup
pivot_root . mnt
cd /
umount -l /mnt
{shares}
exec {program} inside {control}
"""


class NotPossible(Exception):
    """What was asked can't be done here; the message says what to do about it."""


@dataclass(frozen=True)
class Machine:
    """A machine to run a command in."""

    kernel: Path
    qemu: tuple[str, ...]
    memory_mib: int
    cpus: int
    shares: tuple[Path, ...]


def cache() -> Path:
    """Where QEMU and the kernel are kept."""
    return Path(os.environ.get("EMULATED_MACHINE_CACHE") or "~/.cache/emulated-machine").expanduser()


def kernel_config() -> str:
    """The options of the kernel as its build reads them."""
    options = " ".join(KERNEL_OPTIONS.values()).split()
    return "".join(f"CONFIG_{option}{'' if '=' in option else '=y'}\n" for option in options)


def kernel_path(directory: Path, config: str) -> Path:
    """Where the kernel of this configuration is kept: another one has another name."""
    return directory / f"vmlinux-{hashlib.sha256(config.encode()).hexdigest()[:12]}"


def refused(wanted: str, accepted: str) -> list[str]:
    """The options that the source of the kernel does not know, or not like this."""
    return sorted(set(wanted.split()) - set(accepted.split()))


def qemu_arguments(machine: Machine, control: Path, *, tsc_khz: int) -> list[str]:
    """How QEMU is told to be the machine; the directory `control` holds its init, and gets its console."""
    kernel = [
        *("console=ttyS0", "quiet", "reboot=t", "panic=-1"),
        # Under load the machine would measure its clock wrongly, and hang.
        *("tsc=reliable", f"tsc_early_khz={tsc_khz}", f"lpj={tsc_khz * 10}"),
        *("root=root", "rootfstype=9p", f"rootflags={MOUNT_9P},cache=loose", "ro", f"init={control}/init"),
    ]
    return [
        *("setpriv", "--pdeathsig", "KILL"),
        *machine.qemu,
        *("-M", "microvm,rtc=on", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-bios", "qboot.rom"),  # the other firmware starts all processors, and now and then ends in a triple fault
        *("-accel", "tcg,thread=multi", "-cpu", "EPYC"),
        *("-m", f"{machine.memory_mib}M", "-smp", str(machine.cpus)),
        *("-kernel", str(machine.kernel), "-append", " ".join(kernel)),
        *_shared(Path("/"), "root", readonly=True),
        *(word for number, path in enumerate([control, *machine.shares]) for word in _shared(path, f"share{number}")),
        *("-device", "virtio-rng-device", "-device", "virtio-serial-device"),
        *("-drive", f"if=none,id=disk,format=raw,cache=unsafe,file={control}/disk"),
        *("-device", "virtio-blk-device,drive=disk"),
        *("-serial", f"file:{control}/console"),
        *("-chardev", "stdio,id=output,signal=off", "-device", "virtserialport,nr=1,chardev=output"),
    ]


def _shared(path: Path, tag: str, *, readonly: bool = False) -> Iterator[str]:
    if "," in str(path):
        raise NotPossible(f"{path} can't be shared: QEMU takes no path with a comma")
    yield from (
        "-fsdev",
        f"local,id={tag},path={path},security_model=none,multidevs=remap,readonly={'on' if readonly else 'off'}",
    )
    yield from ("-device", f"virtio-9p-device,fsdev={tag},mount_tag={tag}")


def init_script(control: Path, shares: Sequence[Path]) -> str:
    """What the machine runs first: it makes its files, and goes on as this program."""
    mounts = [
        f"mount -t 9p -o {MOUNT_9P},cache=mmap share{number} {shlex.quote(str(path))}"
        for number, path in enumerate([control, *shares])
    ]
    program = shlex.join([sys.executable, str(Path(__file__).resolve())])
    return INIT.format(shares="\n".join(mounts), program=program, control=shlex.quote(str(control)))


def run(machine: Machine, command: Sequence[str], environ: Mapping[str, str], *, timeout_s: float | None) -> int:
    """Run a command in a machine that is made for it; its exit status, or `TIMED_OUT`, or `FAILED` with the reason."""
    with tempfile.TemporaryDirectory(prefix=f"{NAME}-") as made:
        control = Path(made)
        asked = {"argv": list(command), "env": dict(environ), "directory": str(Path.cwd())}
        (control / "command").write_text(json.dumps(asked))
        (control / "init").write_text(init_script(control, machine.shares))
        (control / "init").chmod(0o755)
        _make_disk(control / "disk")
        arguments = qemu_arguments(machine, control, tsc_khz=measured_tsc_khz())
        with (control / "qemu").open("w") as log:
            # Its input stays open: at the end of it, QEMU would take its output for closed, too.
            process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stderr=log)
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                print(f"{NAME}: ended after {timeout_s:g} s", file=sys.stderr)
                return TIMED_OUT
            finally:
                process.kill()
                process.wait()
        try:
            return int((control / "status").read_text())
        except (FileNotFoundError, ValueError):
            for name in ("qemu", "console"):
                said = (control / name).read_text(errors="replace") if (control / name).exists() else ""
                print(f"{NAME}: the machine failed; its {name} says:", said[-2000:], sep="\n", file=sys.stderr)
            return FAILED


def _make_disk(path: Path) -> None:
    """An empty disk, which takes no room until it is written to."""
    with path.open("xb") as file:
        file.truncate(DISK_BYTES)
    # Not in the machine's memory: a control group that is given so much would be charged for what it writes.
    subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", path], check=True)


def inside(control: Path) -> NoReturn:
    """Be the first process of the machine: run the command, keep its status, end the machine."""
    libc = ctypes.CDLL(None)
    try:
        socket.sethostname(NAME)
        _loopback_up()
        asked = json.loads((control / "command").read_text())
        (port,) = Path("/dev").glob("vport*p1")
        with port.open("wb", buffering=0) as output:
            process = subprocess.Popen(
                asked["argv"],
                cwd=asked["directory"],
                env=asked["env"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            ended, status = os.wait()
            while ended != process.pid:
                ended, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        (control / "status").write_text(str(code if code >= 0 else 128 - code))
    finally:
        libc.sync()
        libc.reboot(0x0123_4567)
        os._exit(1)


def _loopback_up() -> None:
    get_flags, set_flags, up = 0x8913, 0x8914, 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        (flags,) = struct.unpack_from("H", fcntl.ioctl(sock, get_flags, struct.pack("16sH22x", b"lo", 0)), 16)
        fcntl.ioctl(sock, set_flags, struct.pack("16sH22x", b"lo", flags | up))


def measured_tsc_khz() -> int:
    """The frequency of this processor's time stamp counter, which the emulated one shows too."""
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0\xc3")  # rdtsc; shl rdx, 32; or rax, rdx; ret
    counter = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(code)))

    def moment() -> tuple[int, int]:
        """The counter and the time in nanoseconds of the least disturbed of many looks at both."""
        looks = [(counter(), time.monotonic_ns(), counter()) for _ in range(200)]
        before, now_ns, after = min(looks, key=lambda look: look[2] - look[0])
        return (before + after) // 2, now_ns

    first, first_ns = moment()
    time.sleep(0.25)
    last, last_ns = moment()
    return round((last - first) * 1_000_000 / (last_ns - first_ns))


def set_up(directory: Path) -> Path:
    """Install what is missing, and build the kernel unless there is one; its path. Takes ten minutes the first time."""
    if platform.machine() != "x86_64" or not shutil.which("apt-get"):
        raise NotPossible("the machine is made of Debian's packages for amd64: run this on a Debian of that kind")
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES, LIBRARIES_OF_QEMU], check=True)
    if _is_bookworm() and not (directory / "qemu").exists():
        _unpack_newer_qemu(directory)
    config = kernel_config()
    kernel = kernel_path(directory, config)
    if not kernel.exists():
        with tempfile.TemporaryDirectory(dir=directory, prefix="build-") as build:
            _build_kernel(Path(build), config).rename(kernel)
    return kernel


def _is_bookworm() -> bool:
    return platform.freedesktop_os_release().get("VERSION_CODENAME") == "bookworm"


def _unpack_newer_qemu(directory: Path) -> None:
    """Bookworm's own QEMU 7.2 lets nested guests hang; that of its backports does not. The system's stays as it is."""
    mirror = _said(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Codename: bookworm", "Created-By: Packages"])
    with tempfile.TemporaryDirectory(dir=directory, prefix="qemu-") as made:
        work = Path(made)
        key = "/usr/share/keyrings/debian-archive-keyring.gpg"
        (work / "sources").write_text(f"deb [signed-by={key}] {mirror.split()[0]} bookworm-backports main\n")
        (work / "lists/partial").mkdir(parents=True)
        places = [f"Dir::Etc::SourceList={work}/sources", "Dir::Etc::SourceParts=-", f"Dir::State::Lists={work}/lists"]
        apt = ["apt-get", *(word for place in [*places, "APT::Sandbox::User=root"] for word in ("-o", place))]
        subprocess.run([*apt, "update"], check=True)
        subprocess.run([*apt, "download", *QEMU_PACKAGES], cwd=work, check=True)
        for package in work.glob("*.deb"):
            subprocess.run(["dpkg", "--extract", package, work / "root"], check=True)
        (work / "root").rename(directory / "qemu")


def _build_kernel(build: Path, config: str) -> Path:
    subprocess.run(["tar", "xf", KERNEL_SOURCE, "-C", build, "--strip-components=1"], check=True)
    (build / "wanted").write_text(config)
    make = ["make", "-C", str(build)]
    subprocess.run([*make, "allnoconfig", "KCONFIG_ALLCONFIG=wanted"], check=True, stdout=subprocess.DEVNULL)
    unknown = refused(config, (build / ".config").read_text())
    if unknown:
        raise NotPossible(f"this source of the kernel does not take {' '.join(unknown)}: mend KERNEL_OPTIONS")
    subprocess.run([*make, f"-j{os.cpu_count()}", "vmlinux"], check=True)
    return build / "vmlinux"


def _said(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def ready(directory: Path) -> tuple[Path, tuple[str, ...]]:
    """The kernel, and how QEMU is started. Raises `NotPossible` before `setup`."""
    kernel, unpacked = kernel_path(directory, kernel_config()), directory / "qemu"
    if not kernel.exists() or (_is_bookworm() and not unpacked.exists()):
        raise NotPossible(f"there is no {kernel}: run `{Path(__file__).name} setup` first, as root")
    if not unpacked.exists():
        return kernel, ("qemu-system-x86_64",)
    share = unpacked / "usr/share"
    return kernel, (f"{unpacked}/usr/bin/qemu-system-x86_64", "-L", f"{share}/qemu", "-L", f"{share}/seabios")


def tests(directory: Path, arguments: Sequence[str]) -> tuple[Machine, list[str], dict[str, str]]:
    """The machine, the command and the environment of the tests that take real microVMs."""
    missing = [name for name in ("firecracker", "jailer") if not os.access(directory / name, os.X_OK)]
    project = Path(__file__).resolve().parents[1]
    if missing:
        raise NotPossible(
            f"{directory} has no {' and no '.join(missing)} to run: unpack a release of Firecracker there, and "
            "take the version out of the names of its two programs"
        )
    if not (project / ".venv").exists():
        raise NotPossible(f"there is no environment in {project}: run `uv sync` first")
    try:
        kernel, qemu = ready(cache())
    except NotPossible:
        set_up(cache())
        kernel, qemu = ready(cache())
    environ = {
        **os.environ,
        "FC_INVOKE_FIRECRACKER_BIN": str(directory.resolve() / "firecracker"),
        "FC_INVOKE_KERNEL_IMAGE": str(kernel),
    }
    options = ["-n", "0", "-o", "faulthandler_timeout=1800", "-m", "firecracker"]
    # Only the files that have such a test: the machine takes minutes to read all of them.
    files = [
        str(file) for file in sorted((project / "tests").rglob("test_*.py")) if "mark.firecracker" in file.read_text()
    ]
    command = [str(project / ".venv/bin/python"), "-m", "pytest", *options, *files, *arguments]
    return Machine(kernel, qemu, MEMORY_MIB, os.cpu_count() or 1, ()), command, environ


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("setup", help="install packages and build the kernel: once, as root, on a Debian for amd64")
    verbs.add_parser("guest-kernel", help="print the path of the kernel, for a microVM to boot")
    running = verbs.add_parser("run", help="run a command as root in the machine; the exit status is its own")
    running.add_argument("--memory", type=int, default=MEMORY_MIB, metavar="MIB")
    running.add_argument("--cpus", type=int, default=os.cpu_count() or 1)
    running.add_argument("--timeout", type=float, metavar="SECONDS", help=f"exit status {TIMED_OUT} afterwards")
    running.add_argument(
        "--share", type=Path, action="append", default=[], metavar="DIR", help="keep what is written there"
    )
    running.add_argument("command", nargs="+", metavar="COMMAND")
    testing = verbs.add_parser("test", help="run the tests that take real microVMs; set up first where that is missing")
    testing.add_argument(
        "firecracker", type=Path, metavar="DIR", help="where `firecracker` and `jailer` of a release are"
    )
    testing.add_argument("pytest", nargs="*", metavar="ARG", help="what pytest is told besides, after `--`")
    verbs.add_parser("inside").add_argument("control", type=Path)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Do what the command line asks for."""
    asked = parsed(arguments)
    if asked.verb == "inside":
        inside(asked.control)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if asked.verb == "setup":
            print(set_up(cache()))
            return 0
        if asked.verb == "test":
            return run(*tests(asked.firecracker, asked.pytest), timeout_s=TESTS_WITHIN_S)
        kernel, qemu = ready(cache())
        if asked.verb == "guest-kernel":
            print(kernel)
            return 0
        shares = tuple(share.resolve(strict=True) for share in asked.share)
        machine = Machine(kernel, qemu, asked.memory, asked.cpus, shares)
        return run(machine, asked.command, os.environ, timeout_s=asked.timeout)
    except (NotPossible, OSError, subprocess.CalledProcessError) as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
