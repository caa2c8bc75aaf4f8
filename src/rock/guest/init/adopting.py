"""Programs that pid 1 did not start: copies of those of another sandbox. Standard library only."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from rock.guest.init import programs
from rock.guest.init.link import Connection, Fault

if TYPE_CHECKING:
    from rock.guest.init.pid1 import Init

_NUMBERS = {"stdin": 0, "stdout": 1, "stderr": 2}
_MOST = 64  # descriptors of one reply


def adopt(init: Init, connection: Connection, number: int, request: dict[str, Any]) -> None:
    """Register programs as kept ones, before they are there, and reply with the ends of their streams for them.

    programs: `pid`, `key`, and `streams`, whose values say whether the program reads ("r") or writes ("w").
    """
    made: list[tuple[programs.Program, programs.Streams]] = []
    try:
        for one in request["programs"]:
            made.append(_program(init, one))
        names = [(program.key, name) for program, streams in made for name in streams.ours]
        if len(names) > _MOST:
            raise Fault("quota_exceeded", f"the programs have {len(names)} streams, more than {_MOST}")
    except BaseException:
        for _, streams in made:
            streams.close()
        raise
    fds = []
    for program, streams in made:
        program.held = dict(streams.ours)
        init.programs[program.pid] = program
        fds += [streams.theirs[_NUMBERS[name] if name in _NUMBERS else int(name)] for name in streams.ours]
        for fd in set(streams.theirs.values()) - set(fds):  # /dev/null
            os.close(fd)
    init.answer(connection, number, {"streams": [list(one) for one in names]}, fds)


def _program(init: Init, spec: dict[str, Any]) -> tuple[programs.Program, programs.Streams]:
    pid, key, wanted = int(spec["pid"]), str(spec["key"]), dict(spec["streams"])
    if pid in init.programs or any(program.key == key for program in init.programs.values()):
        raise Fault("conflict", f"a program with the key {key!r} exists already")
    standard = {name: "pipe" if name in wanted else "null" for name in _NUMBERS}
    channels = {name: way for name, way in wanted.items() if name not in _NUMBERS}
    return programs.Program(pid, key, True, False), programs.Streams({**standard, "channels": channels}, None)
