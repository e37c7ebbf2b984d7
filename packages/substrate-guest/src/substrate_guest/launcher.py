"""A program that does one thing: it becomes another program, with arguments that are fixed in it.

A kernel starts its first process from one file, without arguments worth having, and the image may have neither a shell
nor a dynamic loader. So the launcher is an ELF of a few hundred bytes that needs nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

BASE = 0x40_0000
"""Where it is loaded."""
_HEAD, _PROGRAM_HEAD = struct.Struct("<16sHHIQQQIHHHHHH"), struct.Struct("<IIQQQQQQ")
_LITTLE_ENDIAN_64_BIT = b"\x7fELF\x02\x01\x01"
_EXECUTABLE, _X86_64, _LOAD, _READ_EXECUTE, _PAGE = 2, 62, 1, 5, 0x1000
_CODE = (
    "488b0424"  # mov rax, [rsp]            the number of arguments, behind which
    "488d54c410"  # lea rdx, [rsp+rax*8+16]   the environment begins: it is passed on
    "bf%s"  # mov edi, path
    "be%s"  # mov esi, arguments
    "b83b000000"  # mov eax, 59               execve
    "0f05"  # syscall
    "bf7f000000"  # mov edi, 127              it failed: there is no such program
    "b83c000000"  # mov eax, 60               exit
    "0f05"  # syscall
)


def launcher(argv: Sequence[str]) -> bytes:
    """The executable for x86-64 that runs `argv`, of which the first is a path, in the environment it gets."""
    code_bytes = len(bytes.fromhex(_CODE % ("00000000", "00000000")))
    table = BASE + _HEAD.size + _PROGRAM_HEAD.size + code_bytes
    pointers, strings = [], b""
    for argument in argv:
        pointers.append(table + 8 * (len(argv) + 1) + len(strings))
        strings += argument.encode() + b"\0"
    code = bytes.fromhex(_CODE % (_immediate(pointers[0]), _immediate(table)))
    data = code + struct.pack(f"<{len(argv) + 1}Q", *pointers, 0) + strings
    size = _HEAD.size + _PROGRAM_HEAD.size + len(data)
    entry = BASE + _HEAD.size + _PROGRAM_HEAD.size
    head = (_HEAD.size, _PROGRAM_HEAD.size, 1, 0, 0, 0)
    return (
        _HEAD.pack(_LITTLE_ENDIAN_64_BIT, _EXECUTABLE, _X86_64, 1, entry, _HEAD.size, 0, 0, *head)
        + _PROGRAM_HEAD.pack(_LOAD, _READ_EXECUTE, 0, BASE, BASE, size, size, _PAGE)
        + data
    )


def _immediate(address: int) -> str:
    return struct.pack("<I", address).hex()
