"""What only a process itself can read, by system calls that a stopped one executes: all of them in one stop, from a
room that it maps for them and unmaps; without that room, one stop for each.

Standard library only.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from rock.runtime.namespace.launcher import ptrace, syscall_list

NUMBERS = {**syscall_list.NUMBERS["x86_64"], "clone3": 435, "close_range": 436}
# mov rax and the six arguments from [r12]; syscall; store rax; next row; stop at an error, or after r13 rows
LOOP = bytes.fromhex("498b0424 498b7c2408 498b742410 498b542418 4d8b542420 4d8b442428 4d8b4c2430 0f05 4989442438"
                     "4983c440 483d01f0ffff 7305 49ffcd 75c6 cc")  # fmt: skip
ROW = 64
_PR = {"death_signal": 2, "dumpable": 3, "securebits": 27, "subreaper": 37, "tid_address": 40}
_BY_ADDRESS = ("death_signal", "subreaper", "tid_address")
_TIMERS = (0, 1, 2)
_SLOT = 32  # bytes of a result in memory
_ROOM, _ROWS, _DATA = 1 << 14, 1 << 7, 1 << 13  # size; places of the rows and of the results
_PRIVATE_ANONYMOUS, _ALL = 0x22, 7


class Own:
    """What only a process itself can read."""

    break_ = securebits = tid_address = death_signal = dumpable = 0
    subreaper = False
    alternate_stack = b""
    timers: Sequence[bytes] = ()
    actions: Sequence[tuple[int, bytes]] = ()


class _Question:
    """A system call. place: the argument that is the address of a result of `size` bytes; -1 for a call without."""

    def __init__(self, name: str, *arguments: int, place: int = -1, size: int = 8) -> None:
        self.number = NUMBERS[name]
        self.arguments = list(arguments)
        self.place = place
        self.size = size
        self.value = 0
        self.data = b""

    def at(self, address: int) -> list[int]:
        """The arguments, with an address for the result."""
        return [address if index == self.place else one for index, one in enumerate(self.arguments)]


def ask(process: ptrace.Injection, handled: int) -> Own:
    """handled: the mask of handled signals. OSError."""
    questions = {"break_": _Question("brk", 0)}
    for name, option in _PR.items():
        questions[name] = _Question("prctl", option, 0, 0, 0, 0, place=1 if name in _BY_ADDRESS else -1)
    questions["stack"] = _Question("sigaltstack", 0, 0, place=1, size=24)
    timers = [_Question("getitimer", which, 0, place=1, size=32) for which in _TIMERS]
    signals = {number: _Question("rt_sigaction", number, 0, 0, 8, place=2, size=32)
               for number in range(1, 65) if handled >> (number - 1) & 1}  # fmt: skip
    _execute(process, [*questions.values(), *timers, *signals.values()])
    own = Own()
    own.break_ = questions["break_"].value
    for name in _PR:
        one = questions[name]
        value = int(struct.unpack("=Q", one.data)[0]) if name in _BY_ADDRESS else one.value
        setattr(own, name, bool(value) if name == "subreaper" else value)
    own.alternate_stack = questions["stack"].data
    own.timers = [one.data for one in timers]
    own.actions = [(number, one.data) for number, one in signals.items()]
    return own


def _execute(process: ptrace.Injection, questions: Sequence[_Question]) -> None:
    try:
        room = process.call(NUMBERS["mmap"], 0, _ROOM, _ALL, _PRIVATE_ANONYMOUS, (1 << 64) - 1, 0)
    except OSError:  # such as at a limit of its address space
        _each(process, questions)
        return
    try:
        _together(process, questions, room)
    finally:
        process.call(NUMBERS["munmap"], room, _ROOM)


def _each(process: ptrace.Injection, questions: Sequence[_Question]) -> None:
    for one in questions:
        one.value = process.call(one.number, *one.at(process.put(bytes(one.size))))
        if one.place >= 0:
            one.data = process.fetch(one.size)


def _together(process: ptrace.Injection, questions: Sequence[_Question], room: int) -> None:
    rows = []
    for index, one in enumerate(questions):
        arguments = one.at(room + _DATA + index * _SLOT)
        rows.append(struct.pack("=8Q", one.number, *arguments, *[0] * (6 - len(arguments)), 0))
    process.write(room, LOOP)
    process.write(room + _ROWS, b"".join(rows))
    process.execute(room, room + _ROWS, len(rows))
    results = process.read(room + _ROWS, ROW * len(rows))
    data = process.read(room + _DATA, _SLOT * len(rows))
    for index, (one, found) in enumerate(zip(questions, struct.iter_unpack("=8q", results), strict=True)):
        if -4096 < found[7] < 0:
            raise OSError(-found[7], "a process cannot be asked for its state")
        one.value = found[7] & (1 << 64) - 1
        one.data = data[index * _SLOT : index * _SLOT + one.size]
