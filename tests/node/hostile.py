"""Guests that mean harm, as functions to be run on each kind of guest; `ATTACKS` lists them.

Each gets a `Stage`: guests to make, of which it may make two of one base, and a place of the host's that no guest may
touch. What an attack does runs in the guest; what must be true afterwards is asserted here. As a program, started with
a directory and an interpreter, it makes those it is given the names of, as user 65534, on clones.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401  # now, because its files may be root's alone
import encodings.idna  # noqa: F401
import json
import os
import shutil
import socket
import sys
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import h11

import substrate_guest
from node.procvm_rig import GUESTS, WarmRig, warm_rig, warm_workload
from node.vmm_contract import NOBODY, ask, until_ready
from substrate_guest import confinement
from substrate_guest.filetree import WRITABLE
from substrate_node.procvm.probe import MEMORY_BOUND
from substrate_node.vmm import Base, Guest

NOBODY_UID = 65_534
MEMORY_MIB = 64
WITHIN_S = 60.0
ATTACK_WITHIN_S = 120.0
REFUSED = {"PermissionError", "Read-only file system", "FileNotFoundError", "Function not implemented"}


class Stage:
    """Guests of one kind on this host. Nothing of them may be left when it closes."""

    def __init__(self, rig: WarmRig, *, cloned: bool, place: Path) -> None:
        self.rig = rig
        self.secret = rig.run.parent / "secret"
        self.secret.write_text("untouched")
        self._members = {"memory_mib": MEMORY_MIB, "path": str(place)}
        self._workload = warm_workload(**self._members)
        self._cloned = cloned
        self._base: Base | None = None
        self._guests: list[Guest] = []

    async def guest(self) -> Guest:
        """Another guest, ready."""
        guest_id = f"g{len(self._guests)}"
        if self._cloned:
            if self._base is None:
                self._base = await self.rig.captured("base", **self._members)
            guest = await self.rig.vmm.restore(self._workload, self._base, guest_id, NOBODY)
        else:
            guest = await self.rig.vmm.boot(self._workload, guest_id, NOBODY)
        self._guests.append(guest)
        await until_ready(guest)
        return guest

    async def close(self) -> None:
        """End the guests, and see that they have left nothing and touched nothing."""
        for guest in self._guests:
            await self.rig.vmm.discard(guest.guest_id)
        if self._base is not None:
            await self.rig.vmm.discard_base(self._base)
        assert not self.rig.left()
        assert self.secret.read_text() == "untouched"


async def told(guest: Guest, program: str) -> Any:
    """What a program told that was run in a guest; None if the guest did not answer."""
    async with asyncio.timeout(WITHIN_S):
        status, body = await ask(guest, "/run/" + dedent(program).encode().hex())
    return json.loads(body) if status == 200 else None


async def well(guest: Guest) -> bool:
    """Whether a guest serves."""
    return await ask(guest, "/") == (200, b"hello")


# The attacks.


async def links_in_the_place_of_sockets_lead_nowhere(stage: Stage) -> None:
    """A guest can't reach the directory of its socket, nor make a link there for the node to follow."""
    guest = await stage.guest()
    place = stage.rig.run / guest.guest_id / "v.sock"
    outcomes = await told(
        guest,
        f"""
        import os
        place, secret = {str(place)!r}, {str(stage.secret)!r}
        told = [attempt(lambda: os.unlink(place)), attempt(lambda: os.symlink(secret, place)),
                attempt(lambda: os.rename('/tmp', os.path.dirname(place))), attempt(lambda: open(secret).read())]
        os.makedirs('/tmp/run', exist_ok=True); os.symlink(secret, '/tmp/run/v.sock')
        attempt(lambda: open('/tmp/run/v.sock', 'w').write('stolen'))
        """,
    )
    assert set(outcomes) <= REFUSED | {"Device or resource busy", "Invalid cross-device link"}, outcomes
    assert place.is_socket() or not place.parent.exists(), "a clone's has no name at all"
    assert await well(guest)


async def nobody_can_be_traced_or_read(stage: Stage) -> None:
    """Neither another process, nor its memory, nor its descriptors."""
    outcomes = await told(
        await stage.guest(),
        """
        import os
        x86 = os.uname().machine == 'x86_64'
        ptrace, readv = (101, 310) if x86 else (117, 270)
        told = [attempt(lambda: system_call(ptrace, 16, pid, 0, 0)) for pid in (1, 2, os.getppid())]
        told += [attempt(lambda: system_call(readv, 1, 0, 0, 0, 0, 0)), attempt(lambda: system_call(438, 0, 0, 0))]
        """,
    )
    assert set(outcomes) == {"PermissionError"}, outcomes


async def nothing_can_be_mounted_or_made_a_namespace_of(stage: Stage) -> None:
    """By none of the kernel's ways, old or new."""
    outcomes = await told(
        await stage.guest(),
        """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        def call(name, *args):
            if getattr(libc, name)(*args) < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        NEWUSER, NEWNS = 0x10000000, 0x20000
        clone = 56 if os.uname().machine == 'x86_64' else 220
        told = [attempt(lambda: call('mount', b'none', b'/tmp', b'tmpfs', 0, None)),
                attempt(lambda: call('mount', b'/', b'/tmp', None, 0x5000, None)),
                attempt(lambda: call('mount', None, b'/usr', None, 32 | 4096, None)),
                attempt(lambda: call('umount2', b'/proc', 2)), attempt(lambda: call('umount2', b'/tmp', 2)),
                attempt(lambda: call('unshare', NEWUSER)), attempt(lambda: call('unshare', NEWNS)),
                attempt(lambda: call('pivot_root', b'/', b'/')), attempt(lambda: os.chroot('/tmp')),
                attempt(lambda: system_call(clone, NEWUSER | 17, 0, 0, 0, 0)),
                attempt(lambda: system_call(435, 0, 0)), attempt(lambda: system_call(430, 0, 0)),
                attempt(lambda: system_call(428, -100, 0, 0)), attempt(lambda: system_call(442, -100, 0, 0, 0, 0)),
                attempt(lambda: system_call(467, -100, 0, 0, 0, 0)), attempt(lambda: system_call(1000)),
                attempt(lambda: os.mknod('/tmp/disk', 0o60600, 0xfe00))]
        """,
    )
    assert set(outcomes) <= {"PermissionError", "Function not implemented"}, outcomes


async def a_fork_bomb_is_bounded_and_harms_nobody_else(stage: Stage) -> None:
    """Not even a guest that was made of the same process."""
    guest, other = await stage.guest(), await stage.guest()
    count = await told(
        guest,
        """
        import os, signal
        told = 0
        try:
            while told < 5000:
                if os.fork() == 0:
                    os.closerange(3, 100)
                    signal.pause()
                told += 1
        except BlockingIOError:
            pass
        """,
    )
    assert 200 < count < confinement.PROCESSES_MAX, count
    assert (
        await told(other, "import subprocess; told = subprocess.check_output(['echo', 'fine'], text=True)") == "fine\n"
    )
    assert await told(guest, "told = attempt(__import__('os').fork)") == "BlockingIOError"
    assert (await asyncio.to_thread(os.getloadavg))[0] >= 0, "the host runs"


async def every_place_to_write_is_filled_to_one_bound(stage: Stage) -> None:
    """With bytes and with files; the host has as much room as before, and the next guest too."""
    guest, other = await stage.guest(), await stage.guest()
    before_bytes = shutil.disk_usage(stage.rig.run).free
    filled = await told(
        guest,
        f"""
        import os
        told = {{"mib": 0, "files": 0, "elsewhere": []}}
        piece = bytes(1 << 20)
        for place in {WRITABLE!r}:
            with open(place + '/filling', 'wb', buffering=0) as file:
                try:
                    while file.write(piece) == len(piece):
                        told["mib"] += 1
                except OSError:
                    pass
            os.unlink(place + '/filling')
            file = os.open(place + '/kept', os.O_CREAT | os.O_WRONLY)
            try:
                while os.write(file, piece) == len(piece):
                    pass
            except OSError:
                pass
        for place in {WRITABLE!r}:
            os.unlink(place + '/kept')
        try:
            while told["files"] < 1_000_000:
                open(f'/tmp/{{told["files"]}}', 'x').close()
                told["files"] += 1
        except OSError:
            pass
        for top, directories, _ in os.walk('/'):
            if top.startswith(('/proc', '/dev/fd', *{WRITABLE!r})):
                directories.clear()
                continue
            try:
                open(top + '/planted', 'x').close()
                told["elsewhere"].append(top)
            except OSError:
                pass
            if top.count('/') > 2:
                directories.clear()
        """,
    )
    assert filled["mib"] <= MEMORY_MIB // 2, filled
    assert filled["files"] <= MEMORY_MIB // 2 * 256, filled
    assert filled["elsewhere"] == []
    assert abs(shutil.disk_usage(stage.rig.run).free - before_bytes) < 2**30, "nothing of it is on the host's disk"
    assert await told(other, "told = open('/tmp/mine', 'w').write('room')") == 4


async def no_descriptor_leads_out(stage: Stage) -> None:
    """A guest has its three streams, its sockets and what it opened; none of them is a directory, or of the host."""
    leaked = os.open(stage.secret, os.O_RDONLY)
    os.set_inheritable(leaked, True)
    listening = socket.create_server(("127.0.0.1", 0))
    os.set_inheritable(listening.fileno(), True)
    try:
        found = await told(
            await stage.guest(),
            """
            import os, stat
            told = []
            for name in os.listdir('/proc/self/fd'):
                try:
                    mode, target = os.fstat(int(name)).st_mode, os.readlink('/proc/self/fd/' + name)
                except OSError:
                    continue
                told.append([name, target, stat.S_ISDIR(mode), stat.S_ISREG(mode)])
            """,
        )
    finally:
        os.close(leaked)
        listening.close()
    assert not [one for one in found if str(stage.rig.run) in one[1] or "secret" in one[1]], found
    assert not [one for one in found if one[3]], found
    assert [one for one in found if one[2]] == [] or all("/proc/" in one[1] for one in found if one[2]), found
    assert len(found) < 16, found


async def signals_reach_nobody_outside(stage: Stage) -> None:
    """Neither the process it was made of, nor its other clones, nor the daemon: by number, by group, or to all."""
    guest, other = await stage.guest(), await stage.guest()
    await told(
        guest,
        f"""
        import os, signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        told = []
        for pid in [*range(2, 400), {os.getpid()}, {os.getppid()}, -{os.getpgrp()}]:
            told.append(attempt(lambda: os.kill(pid, signal.SIGKILL)))
        told.append(attempt(lambda: os.kill(-1, signal.SIGTERM)))
        told.append(attempt(lambda: os.killpg(0, signal.SIGTERM)))
        told.append(attempt(lambda: os.kill(0, signal.SIGSTOP)))
        """,
    )
    assert await well(other)
    assert await well(await stage.guest()), "and more can be made"


async def no_other_namespace_can_be_entered(stage: Stage) -> None:
    """Not that of its first process, nor by a descriptor of a process."""
    outcomes = await told(
        await stage.guest(),
        """
        import os
        setns = 308 if os.uname().machine == 'x86_64' else 268
        told = [attempt(lambda: system_call(setns, os.pidfd_open(1), 0x20000))]
        for name in ('mnt', 'pid', 'net', 'user', 'uts', 'ipc', 'cgroup'):
            for process in ('1', 'self'):
                space = f'/proc/{process}/ns/{name}'
                told.append(attempt(lambda: system_call(setns, os.open(space, os.O_RDONLY), 0)))
        """,
    )
    assert len(outcomes) > 5
    assert set(outcomes) == {"PermissionError"}, outcomes


async def proc_shows_its_own_processes_and_takes_no_settings(stage: Stage) -> None:
    """Nothing of the daemon, no way to its files through another's root, and no setting of the kernel's."""
    found = await told(
        await stage.guest(),
        f"""
        import os
        told = {{"pids": [int(name) for name in os.listdir('/proc') if name.isdigit()],
                "roots": [attempt(lambda: os.path.exists('/proc/%d/root{stage.secret}' % pid)) for pid in (1, 2)],
                "writes": [], "daemon": os.path.exists('/proc/{os.getpid()}/stat') and {os.getpid()} > 100}}
        for name in ('sys/kernel/core_pattern', 'sys/kernel/hostname', 'sys/vm/drop_caches', 'sysrq-trigger',
                     'sys/kernel/random/boot_id', 'sys/user/max_user_namespaces', 'sys/net/ipv4/ip_forward',
                     'sys/kernel/modprobe', 'kcore', 'kmsg'):
            told["writes"].append(attempt(lambda: os.write(os.open('/proc/' + name, os.O_WRONLY), b'1')))
        """,
    )
    assert max(found["pids"]) < 100, found
    assert "True" not in found["roots"], found
    assert found["daemon"] is False
    assert set(found["writes"]) <= REFUSED | {"Input/output error"}, found["writes"]


async def the_end_of_its_first_process_is_its_own_end(stage: Stage) -> None:
    """The kernel spares it its own signals; if it dies all the same, its owner is told and nobody else is harmed."""
    guest, other = await stage.guest(), await stage.guest()
    await told(guest, "import os, signal; told = attempt(lambda: os.kill(1, signal.SIGKILL))")
    await ask(guest, "/exit/9")
    async with asyncio.timeout(WITHIN_S):
        await asyncio.shield(guest.exited)
    assert await well(other)


async def guests_share_no_names_that_are_in_no_file(stage: Stage) -> None:
    """Abstract sockets and shared memory of one guest are not there for the other, nor the host's for either."""
    with socket.socket(socket.AF_UNIX) as ours:
        name = f"\0hostile-{os.getpid()}"
        ours.bind(name)
        ours.listen()
        one, other = await stage.guest(), await stage.guest()
        bind = f"""
        import socket
        kept = __import__('builtins').__dict__.setdefault('kept', [])
        kept.append(socket.socket(socket.AF_UNIX)); kept[-1].bind({name!r}); kept[-1].listen()
        told = 'bound'
        """
        connect = f"""
        import ctypes, os, socket
        libc = ctypes.CDLL(None, use_errno=True)
        told = [attempt(lambda: socket.socket(socket.AF_UNIX).connect({name!r})), libc.shmget(4711, 4096, 0)]
        """
        assert await told(one, connect) == ["ConnectionRefusedError", -1]
        assert await told(one, bind) == "bound"
        assert await told(one, "import ctypes; told = ctypes.CDLL(None).shmget(4711, 4096, 0o1666) >= 0") is True
        assert await told(other, connect) == ["ConnectionRefusedError", -1]
        assert await told(other, bind) == "bound"


async def no_network_is_in_reach(stage: Stage) -> None:
    """Neither the host's loopback, nor raw packets, nor other kinds of sockets, nor an interface of its own making."""
    with socket.create_server(("127.0.0.1", 0)) as ours:
        found = await told(
            await stage.guest(),
            f"""
            import socket, struct
            told = {{"loopback": attempt(lambda: socket.create_connection(('127.0.0.1', {ours.getsockname()[1]}), 5)),
                    "names": [name for _, name in socket.if_nameindex()], "families": [], "netlink": []}}
            for family in (17, 38, 40, 29, 30, 31, 44):
                told["families"].append(attempt(lambda: socket.socket(family, socket.SOCK_STREAM)))
            told["families"].append(attempt(lambda: socket.socket(17, socket.SOCK_RAW)))
            told["raw"] = attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
            for protocol in (4, 6, 9, 12, 15, 21):
                told["netlink"].append(attempt(lambda: socket.socket(16, socket.SOCK_RAW, protocol)))
            route = socket.socket(16, socket.SOCK_RAW, 0)
            new_link = struct.pack('=IHHIIBxHiII', 32, 16, 5 | 0x600, 1, 0, 0, 0, 0, 1, 1)
            route.send(new_link)
            told["link"] = struct.unpack_from('=i', route.recv(200), 16)[0]
            """,
        )
    assert found["loopback"] == "ConnectionRefusedError"
    assert found["names"] == ["lo"]
    assert set(found["families"]) == {"Address family not supported by protocol"}, found
    assert found["raw"] == "PermissionError"
    assert set(found["netlink"]) == {"Address family not supported by protocol"}, found
    assert found["link"] < 0, found


async def what_it_shows_to_all_can_be_changed_by_none(stage: Stage) -> None:
    """The interpreter, the workload and the system are read-only by every way to change a file."""
    outcomes = await told(
        await stage.guest(),
        """
        import os, sys
        told = []
        python = os.path.realpath(sys.executable)
        for path in (sys.executable, python, os.__file__, 'warm.py', '/usr/bin/env', '/etc/passwd'):
            told += [attempt(lambda: os.chmod(path, 0o777)), attempt(lambda: os.utime(path)),
                     attempt(lambda: os.unlink(path)), attempt(lambda: os.truncate(path, 0)),
                     attempt(lambda: os.rename('/tmp', path)), attempt(lambda: open(path, 'r+')),
                     attempt(lambda: os.setxattr(path, 'user.a', b'1'))]
        """,
    )
    assert set(outcomes) <= REFUSED | {"Invalid cross-device link", "NotADirectoryError", "Device or resource busy"}


async def what_it_leaves_running_ends_with_it(stage: Stage) -> None:
    """Whatever it did to get away: another session, another parent, signals ignored. `Stage.close` sees to it."""
    started = await told(
        await stage.guest(),
        """
        import os, signal, time
        for _ in range(10):
            if os.fork() == 0:
                os.closerange(3, 100)
                os.setsid()
                for number in range(1, 32):
                    try:
                        signal.signal(number, signal.SIG_IGN)
                    except OSError:
                        pass
                if os.fork():
                    os._exit(0)
                while True:
                    time.sleep(600)
        told = 'away'
        """,
    )
    assert started == "away"


async def memory_is_bounded_or_said_not_to_be(stage: Stage) -> None:
    """A guest that takes more than its workload was given is killed, where there are control groups; else all know."""
    guest = await stage.guest()
    report = await stage.rig.vmm.probe()
    hog = f"kept = bytearray({4 * MEMORY_MIB} << 20); kept[::4096] = b'x' * len(kept[::4096]); told = 'took it'"
    came = await told(guest, hog)
    if MEMORY_BOUND in report.applied:
        assert came is None
        async with asyncio.timeout(WITHIN_S):
            assert (await asyncio.shield(guest.exited)).words == "killed by SIGKILL"
    else:
        assert came == "took it"
        assert MEMORY_BOUND in {measure.name for measure in report.missing if measure.why_not}


async def nobody_outside_is_watched_or_held_up(stage: Stage) -> None:
    """Not through a file that host and guest both read."""
    outcomes = await told(
        await stage.guest(),
        """
        import ctypes, fcntl, os
        libc = ctypes.CDLL(None, use_errno=True)
        def watch():
            if libc.inotify_init1(0) < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        shared = os.open('/usr/bin/env', os.O_RDONLY)
        told = [attempt(watch), attempt(lambda: fcntl.fcntl(shared, fcntl.F_SETLEASE, fcntl.F_RDLCK)),
                attempt(lambda: fcntl.fcntl(os.open('/usr', os.O_RDONLY), fcntl.F_NOTIFY, 1))]
        """,
    )
    assert outcomes == ["Function not implemented", "PermissionError", "PermissionError"]


Attack = Callable[[Stage], Awaitable[None]]

ATTACKS: tuple[Attack, ...] = (
    links_in_the_place_of_sockets_lead_nowhere,
    nobody_can_be_traced_or_read,
    nothing_can_be_mounted_or_made_a_namespace_of,
    a_fork_bomb_is_bounded_and_harms_nobody_else,
    every_place_to_write_is_filled_to_one_bound,
    no_descriptor_leads_out,
    signals_reach_nobody_outside,
    no_other_namespace_can_be_entered,
    proc_shows_its_own_processes_and_takes_no_settings,
    the_end_of_its_first_process_is_its_own_end,
    guests_share_no_names_that_are_in_no_file,
    no_network_is_in_reach,
    what_it_shows_to_all_can_be_changed_by_none,
    what_it_leaves_running_ends_with_it,
    memory_is_bounded_or_said_not_to_be,
    nobody_outside_is_watched_or_held_up,
)


async def attacked(
    attack: Attack, run: Path, *, cloned: bool, python: str = sys.executable, place: Path = GUESTS
) -> None:
    """Make an attack with a guest from `place`, and see that nothing has come of it."""
    async with warm_rig(run, python=python) as rig:
        stage = Stage(rig, cloned=cloned, place=place)
        try:
            await attack(stage)
        finally:
            await stage.close()


def main(home: Path, python: str) -> None:
    """Make attacks as an ordinary user, from a place that everybody can read; prints what each came to, as JSON.

    The name of each is a line of the input; what it came to is a line, empty if nothing has come of it.
    """
    place = home / "place"
    shutil.copytree(GUESTS, place)
    for package in (substrate_guest, h11):
        shutil.copytree(Path(package.__file__).parent, place / package.__name__)
    os.chown(home, NOBODY_UID, NOBODY_UID)
    confinement.become(NOBODY_UID)
    attacks = {attack.__name__: attack for attack in ATTACKS}
    for line in sys.stdin:
        name = line.strip()
        attempt = attacked(attacks[name], home / name / "run", cloned=True, python=python, place=place)
        try:
            asyncio.run(asyncio.wait_for(attempt, ATTACK_WITHIN_S))
        except Exception:  # noqa: BLE001  # whatever it was, the test tells it
            print(json.dumps(traceback.format_exc()), flush=True)  # noqa: T201  # to the test
        else:
            print(json.dumps(""), flush=True)  # noqa: T201  # to the test


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
