"""The filters of system calls, run as the kernel would run them."""

from __future__ import annotations

import os
import struct
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from substrate_guest import seccomp
from substrate_guest.seccomp import ALLOW, CEILING, DENY, NO_FAMILY, NUMBERS, UNKNOWN, X32

MACHINES = dict(zip(seccomp.MACHINES, range(2), strict=True))
NEWUSER, SIGCHLD, THREAD = 0x1000_0000, 17, 0x3D_0F00
SOCKETS = [("socket", NO_FAMILY), ("socketpair", NO_FAMILY)]


@pytest.fixture(params=MACHINES)
def machine(request, monkeypatch):
    """A machine that the filters are made for."""
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=request.param))
    return request.param


def verdict(program: bytes, machine: str, number: int, *arguments: int, architecture: int | None = None) -> int:
    """What the program returns for a call; the kernel would refuse a program that never returns."""
    numbers = (*arguments, *(0 for _ in range(6 - len(arguments))))
    data = struct.pack("<IIQ6Q", number, architecture or seccomp.MACHINES[machine], 0, *numbers)
    instructions = list(struct.iter_unpack("<HBBI", program))
    accumulator = at = 0
    while True:
        code, if_true, if_false, operand = instructions[at]
        at += 1
        match code:
            case seccomp.LOAD:
                (accumulator,) = struct.unpack_from("<I", data, operand)
            case seccomp.AND:
                accumulator &= operand
            case seccomp.EQUAL:
                at += if_true if accumulator == operand else if_false
            case seccomp.AT_LEAST:
                at += if_true if accumulator >= operand else if_false
            case seccomp.RETURN:
                return operand
            case _:
                raise AssertionError(f"code {code:#x}")


def number(machine: str, name: str) -> int | None:
    return NUMBERS[name][MACHINES[machine]]


@pytest.mark.parametrize("name", sorted(seccomp.CORNERS | seccomp.NAMESPACING))
def test_a_guest_is_refused_what_no_workload_needs(machine: str, name: str):
    """Each by its number on this machine."""
    asked = number(machine, name)
    if asked is not None:
        assert verdict(seccomp.guests_filter(), machine, asked) == DENY


def test_what_nobody_has_looked_at_does_not_exist(machine: str):
    """Newer calls than the list, the other set of x86-64, other machines, and what programs do without."""
    program = seccomp.guests_filter()
    for name in seccomp.ABSENT:
        if (asked := number(machine, name)) is not None:
            assert verdict(program, machine, asked) == UNKNOWN
    for asked in (CEILING, CEILING + 1, 0x7FFF_FFFF, X32, X32 + 1, 0xFFFF_FFFF, 435):
        assert verdict(program, machine, asked) == UNKNOWN
    assert verdict(program, machine, 1, architecture=0x4000_0003) == UNKNOWN


def test_whatever_is_not_named_is_allowed(machine: str):
    """Up to the ceiling."""
    named = {both[MACHINES[machine]] for name, both in NUMBERS.items() if name != "seccomp"}
    program = seccomp.guests_filter()
    assert {verdict(program, machine, asked) for asked in set(range(CEILING)) - named} == {ALLOW}


@pytest.mark.parametrize(
    ("flags", "expected"), [(SIGCHLD, ALLOW), (THREAD, ALLOW), (NEWUSER | SIGCHLD, DENY), (0x2_0000, DENY)]
)
def test_processes_and_threads_may_be_made_and_namespaces_not(machine: str, flags: int, expected: int):
    """Whatever stands in the upper half of the argument, which the kernel does not look at."""
    for upper in (0, 1 << 32):
        assert verdict(seccomp.guests_filter(), machine, number(machine, "clone"), upper | flags) == expected


@pytest.mark.parametrize(
    ("request_", "expected"), [(0x8900, DENY), (0x8933, DENY), (0x89FF, DENY), (0x88FF, ALLOW), (0x8A00, ALLOW)]
)
def test_the_hosts_network_devices_are_not_asked_for(machine: str, request_: int, expected: int):
    """By no descriptor: a socket that the host made answers for the host."""
    for upper in (0, 1 << 32):
        assert verdict(seccomp.guests_filter(), machine, number(machine, "ioctl"), 3, upper | request_) == expected


@pytest.mark.parametrize(("command", "expected"), [(1024, DENY), (1026, DENY), (1025, ALLOW), (3, ALLOW), (6, ALLOW)])
def test_nobody_who_opens_a_file_is_held_up_or_watched(machine: str, command: int, expected: int):
    """Locks are for everybody who may read a file: what a program has in its own files it may lock."""
    for upper in (0, 1 << 32):
        assert verdict(seccomp.guests_filter(), machine, number(machine, "fcntl"), 3, upper | command) == expected


@pytest.mark.parametrize("name", ["socket", "socketpair"])
@pytest.mark.parametrize(
    ("family", "protocol", "expected"),
    [(1, 0, ALLOW), (2, 6, ALLOW), (10, 0, ALLOW), (16, 0, ALLOW), (16, 12, NO_FAMILY)]
    + [(family, 0, NO_FAMILY) for family in (0, 3, 17, 29, 38, 40, 44, 99)],
)
def test_sockets_are_of_few_families(machine: str, name: str, family: int, protocol: int, expected: int):
    """Unix, both of the internet, and of netlink what tells of addresses and routes. Least of all VSOCK."""
    asked = number(machine, name)
    assert verdict(seccomp.guests_filter(), machine, asked, family, 1, protocol) == expected


@given(
    asked=st.integers(0, CEILING + 5) | st.integers(0, 2**32 - 1),
    first=st.integers(0, 2**64 - 1) | st.sampled_from([1, 2, 16, NEWUSER, SIGCHLD]),
    second=st.integers(0, 2**64 - 1) | st.integers(0x8800, 0x8AFF) | st.integers(1020, 1030),
    third=st.integers(0, 30),
)
@example(asked=56, first=NEWUSER, second=0, third=0)
def test_a_clones_filter_and_its_zygotes_are_together_a_guests(asked: int, first: int, second: int, third: int):
    """The kernel goes by the strictest of all filters of a process; between the two nothing is lost."""
    machine = os.uname().machine

    def strictest(*programs: bytes) -> bool:
        return all(verdict(program, machine, asked, first, second, third) == ALLOW for program in programs)

    both = strictest(seccomp.zygotes_filter(), seccomp.clones_filter())
    assert both == strictest(seccomp.guests_filter())


def test_a_zygote_may_make_namespaces_and_nothing_else_that_a_guest_may_not(machine: str):
    """And furnish them."""
    program = seccomp.zygotes_filter()
    assert verdict(program, machine, number(machine, "clone"), NEWUSER) == ALLOW
    for name in seccomp.NAMESPACING:
        assert verdict(program, machine, number(machine, name)) == ALLOW
    for name in seccomp.CORNERS:
        if (asked := number(machine, name)) is not None:
            assert verdict(program, machine, asked) == DENY


def test_every_jump_stays_within_reach():
    """A jump has eight bits."""
    for program in (seccomp.guests_filter(), seccomp.zygotes_filter(), seccomp.clones_filter()):
        for at, (code, if_true, if_false, _) in enumerate(struct.iter_unpack("<HBBI", program)):
            if code in (seccomp.EQUAL, seccomp.AT_LEAST):
                assert at + 1 + max(if_true, if_false) < len(program) // 8


def test_a_machine_whose_numbers_nobody_knows_has_no_filter(monkeypatch: pytest.MonkeyPatch):
    """Which its report then says."""
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="riscv64"))
    with pytest.raises(OSError, match="riscv64") as refusal:
        seccomp.guests_filter()
    assert "riscv64" in str(refusal.value.filename)
