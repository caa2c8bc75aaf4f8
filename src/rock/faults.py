"""Fault injection at named points: between the decision and the execution of an operation, and before each reply.

    await faults.point("node.create.made")      no effect, unless a plan names it

A plan is text, `NAME=ACTION` separated by commas or lines; with `@N` only the N-th time, counted from the activation of
the plan, else each time. A name that ends in `*` matches all points with this prefix. Actions:

    kill             kill -9 of this process
    error            Unavailable, as of a store that does not respond
    full             StorageFull
    reject           NoCapacity, as of a worker that others filled
    stall:SECONDS    wait
    drop             for a reply: close the connection without a response

`clock=+3600` sets the wall clock of this process (time.time) ahead by so many seconds, `clock=-3600` back. The plan is
the value of ROCK_FAULTS; if that is an absolute path, the plan is the file's content, which is read again after a
change. Without ROCK_FAULTS a point costs one call and one comparison.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from dataclasses import dataclass

from rock.errors import InvalidConfig, NoCapacity, StorageFull, Unavailable

_RULE = re.compile(r"([a-z0-9_.*]+)=(kill|error|full|reject|drop|stall:[0-9]+(?:\.[0-9]+)?)(?:@([1-9][0-9]*))?")
_CLOCK = re.compile(r"clock=([+-]?[0-9]+(?:\.[0-9]+)?)")
_real_time = time.time


@dataclass
class Rule:
    """One fault: the action at one pass of a point."""

    name: str
    action: str
    at: int | None  # the pass to which it applies, counted from 1; None: each
    passed: int = 0

    def fits(self, name: str) -> bool:
        return name.startswith(self.name[:-1]) if self.name.endswith("*") else name == self.name

    def due(self) -> bool:
        self.passed += 1
        return self.at is None or self.at == self.passed


class Plan:
    """The active faults. InvalidConfig for an invalid text."""

    def __init__(self, text: str) -> None:
        self.rules: list[Rule] = []
        self.clock = 0.0
        for part in filter(None, (part.strip() for part in re.split(r"[,\n]", text))):
            if found := _CLOCK.fullmatch(part):
                self.clock = float(found[1])
            elif found := _RULE.fullmatch(part):
                self.rules.append(Rule(found[1], found[2], int(found[3]) if found[3] else None))
            else:
                hint = "NAME=kill|error|full|reject|drop|stall:S[@N]"
                raise InvalidConfig(f"ROCK_FAULTS: {part!r} is no fault", hint=hint)

    def at(self, name: str) -> str | None:
        """The action for this pass of a point."""
        action = None
        for rule in self.rules:
            if rule.fits(name) and rule.due():
                action = action or rule.action
        return action


class _Source:
    """The location of the plan, and the plan as it was last read."""

    def __init__(self) -> None:
        self.file: str | None = None
        self.seen: tuple[int, int, int] | None = None
        self.plan = Plan("")

    def now(self) -> Plan:
        if self.file is not None:
            try:
                found = os.stat(self.file)
                mark = (found.st_mtime_ns, found.st_size, found.st_ino)
                if mark != self.seen:
                    with open(self.file) as file:
                        self.plan = Plan(file.read())
                    self.seen = mark
            except FileNotFoundError:
                self.plan, self.seen = Plan(""), None
        return self.plan


_source = _Source()
active = False


def _time() -> float:
    return _real_time() + _source.now().clock


def arm(text: str) -> None:
    """Activate a plan, or the path of one; "" deactivates it. InvalidConfig."""
    global active, _source
    source = _Source()
    if text.startswith("/"):
        source.file = text
        source.now()
    else:
        source.plan = Plan(text)
    _source = source
    active = bool(text)
    time.time = _time if active else _real_time


async def point(name: str) -> None:
    """A point of fault injection. Raises the requested StorageFull, NoCapacity or Unavailable."""
    if active:
        await _reach(name)


async def _reach(name: str) -> None:
    action = _source.now().at(name)
    if action is None:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "full":
        raise StorageFull(f"no space left (a fault at {name})", hint="it was asked for by ROCK_FAULTS")
    if action == "reject":
        raise NoCapacity(f"the worker is full (a fault at {name})", hint="it was asked for by ROCK_FAULTS")
    if action == "error":
        raise Unavailable(f"no answer (a fault at {name})", hint="it was asked for by ROCK_FAULTS")
    if action.startswith("stall:"):
        await asyncio.sleep(float(action.partition(":")[2]))


async def reply(name: str) -> bool:
    """Before a reply is sent: whether to drop it. Actions that raise elsewhere have no effect here."""
    if not active:
        return False
    action = _source.now().at(f"reply.{name}")
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action is not None and action.startswith("stall:"):
        await asyncio.sleep(float(action.partition(":")[2]))
    return action == "drop"
