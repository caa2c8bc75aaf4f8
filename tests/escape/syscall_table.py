"""Every system call number with what the filter of a sandbox says of it, computed by running the filter itself.

    python -m tests.escape.syscall_table            write the table of docs/security.md
    python -m tests.escape.syscall_table --check    only say whether it is up to date
    python -m tests.escape.syscall_table --list     one line a number, 0 to 479, of this machine
"""

from __future__ import annotations

import errno
import platform
import struct
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rock.runtime.namespace.launcher import seccomp, syscall_list

PAGE = Path(__file__).parent.parent.parent / "docs" / "security.md"
BEGIN, END = "<!-- system calls: written by tests/escape/syscall_table.py -->\n", "<!-- end of the system calls -->\n"
NUMBERS = range(480)
_ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LD, _JA, _JEQ, _JGE, _JSET, _AND, _RET = 0x20, 0x05, 0x15, 0x35, 0x45, 0x54, 0x06


def run(code: bytes, number: int, arguments: Sequence[int] = (), *, arch: int | None = None) -> str:
    """What the filter says: "allowed", "killed", or the name of an error. arch: of this filter's machine by default."""
    program = [struct.unpack_from("HBBI", code, place) for place in range(0, len(code), 8)]
    data = struct.pack("<iIQ6Q", number, program[1][3] if arch is None else arch, 0,
                       *(list(arguments) + [0] * 6)[:6])
    at, value = 0, 0
    while True:
        what, yes, no, operand = program[at]
        at += 1
        if what == _LD:
            (value,) = struct.unpack_from("<I", data, operand)
        elif what == _AND:
            value &= operand
        elif what == _JA:
            at += operand
        elif what == _RET:
            break
        else:
            true = {_JEQ: value == operand, _JGE: value >= operand, _JSET: bool(value & operand)}[what]
            at += yes if true else no
    if operand == 0x7FFF0000:
        return "allowed"
    return "killed" if operand == 0x80000000 else errno.errorcode[operand & 0xFFFF]


def verdicts(machine: str, **options: bool) -> dict[int, str]:
    """For each number what the filter says of it, with arguments that are all 0. options: of `seccomp.build`."""
    code = seccomp.build(machine, **options)
    return {number: run(code, number) for number in NUMBERS}


def table() -> str:
    """The lists, as Markdown."""
    known = {name for numbers in syscall_list.NUMBERS.values() for name in numbers}
    inspected = {name for name in syscall_list.ALLOWED if name in seccomp.inspected()}
    lists = {
        "Allowed": syscall_list.ALLOWED - inspected,
        "Allowed with some arguments only": inspected,
        "Refused with EPERM": syscall_list.REFUSED,
        "Refused with ENOSYS, as is each number without a name": known - syscall_list.ALLOWED - syscall_list.REFUSED,
    }
    for machine, numbers in syscall_list.NUMBERS.items():
        said = verdicts(machine)
        for name, number in numbers.items():
            otherwise = "allowed" if name in syscall_list.ALLOWED else "ENOSYS"
            expected = "EPERM" if name in syscall_list.REFUSED else otherwise
            assert name in inspected or said[number] == expected, (machine, name, said[number])
    lines = []
    for title, names in lists.items():
        text = ", ".join(f"`{name}`" for name in sorted(names))
        lines += [f"- {title} ({len(names)}):", textwrap.indent(textwrap.fill(text, 114), "  "), ""]
    lines.append(", ".join(
        f"{machine}: {len(seccomp.build(machine)) // 8} instructions"
        for machine in sorted(syscall_list.NUMBERS)) + ".")
    return "\n".join(lines) + "\n"


def written() -> str:
    """The lists as the page has them; "" without."""
    text = PAGE.read_text()
    return text.partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    if "--list" in sys.argv:
        machine = platform.machine()
        names = {number: name for name, number in syscall_list.NUMBERS[machine].items()}
        for number, verdict in verdicts(machine).items():
            print(f"{number:3} {names.get(number, '-'):28} {verdict}")
    elif written() != table():
        if "--check" in sys.argv:
            sys.exit("docs/security.md has not the system calls of the filter: run this without --check")
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
