"""Histories of what concurrent clients asked and observed, and a check that they are linearizable.

An operation has an invocation and, when its client got an answer, a completion. A history is linearizable when every
operation takes effect at one moment between the two, so that a sequential model gives what the clients observed. An
operation without an answer may have taken effect at any time after its invocation, or never.

The search is that of Wing and Gong, with Lowe's memory of configurations that were tried before. Each object (a file, a
session variable, a process) is searched by itself: a history is linearizable when each of its objects is.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

NEVER = float("inf")

State = Hashable
# (state, operation) -> the next state, or None when the operation could not observe what it did in this state. The
# observation of an operation with an unknown outcome is not looked at.
Model = Callable[[Any, "Operation"], "State | None"]


@dataclass
class Operation:
    """One call. object: what it is about. result: what was observed. Times are of one monotonic clock, in seconds;
    `completed` is NEVER while the outcome is unknown."""

    client: str
    object: str
    name: str
    argument: Any = None
    invoked: float = 0.0
    completed: float = NEVER
    result: Any = None

    @property
    def known(self) -> bool:
        return self.completed != NEVER


@dataclass
class History:
    """What all clients of a run did. Threads may record at the same time."""

    operations: list[Operation] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, client: str, thing: str, name: str, argument: Any = None) -> Operation:
        """Record an invocation, now."""
        made = Operation(client, thing, name, argument, time.monotonic())
        with self._lock:
            self.operations.append(made)
        return made

    def end(self, operation: Operation, result: Any) -> None:
        """Record the completion, now."""
        operation.result = result
        operation.completed = time.monotonic()

    def refused(self, operation: Operation) -> None:
        """The call certainly had no effect."""
        with self._lock:
            self.operations.remove(operation)

    def objects(self) -> dict[str, list[Operation]]:
        found: defaultdict[str, list[Operation]] = defaultdict(list)
        for operation in self.operations:
            found[operation.object].append(operation)
        return found


# ---- models ----


def log(state: tuple[str, ...] | None, operation: Operation) -> State | None:
    """A file of ids: `append` of one, and `read`, which gives all in their order."""
    state = state or ()
    if operation.name == "append":
        return (*state, operation.argument)
    return state if not operation.known or tuple(operation.result) == state else None


def counter(state: int | None, operation: Operation) -> State | None:
    """A number that begins at 0: `next` adds one and gives the sum, `get` gives it."""
    value = state or 0
    after = value + (operation.name == "next")
    return after if not operation.known or operation.result == after else None


def register(state: str | None, operation: Operation) -> State | None:
    """A file that begins as "": `write` of a text, and `read`."""
    value = state or ""
    if operation.name == "write":
        return str(operation.argument)
    return value if not operation.known or operation.result == value else None


def process(state: str | None, operation: Operation) -> State | None:
    """A program: `start`, `kill`, and `status`, which gives absent, running or ended."""
    value = state or "absent"
    if operation.name == "start":
        return "running" if value == "absent" else None
    if operation.name == "kill":
        return "ended" if value != "absent" else None
    return value if not operation.known or operation.result == value else None


def lifecycle(state: str | None, operation: Operation) -> State | None:
    """A sandbox: `create`, `stop`, and `get`, which gives absent, running or stopped."""
    value = state or "absent"
    if operation.name == "create":
        return "running" if value == "absent" else None
    if operation.name == "stop":
        return "stopped" if value != "absent" else None
    return value if not operation.known or operation.result == value else None


MODELS: dict[str, Model] = {
    "log": log, "counter": counter, "register": register, "process": process, "lifecycle": lifecycle,
}  # fmt: skip


# ---- the search ----


class TooLarge(Exception):
    """The search took more steps than it may."""


def linearizable(operations: Iterable[Operation], model: Model, most: int = 1_000_000) -> bool:
    """Whether the operations of one object have an order that the model allows. TooLarge after `most` steps."""
    ordered = sorted(operations, key=lambda one: one.invoked)
    needed = sum(1 << index for index, one in enumerate(ordered) if one.known)
    tried: set[tuple[int, State]] = set()
    stack: list[tuple[int, State]] = [(0, None)]
    steps = 0
    while stack:
        done, state = stack.pop()
        if done & needed == needed:
            return True
        if (done, state) in tried:
            continue
        tried.add((done, state))
        # The next one was invoked before any other that is still to come had completed.
        limit = min(one.completed for index, one in enumerate(ordered) if not done >> index & 1)
        following = []
        for index, one in enumerate(ordered):
            if one.invoked > limit:
                break
            steps += 1
            if done >> index & 1:
                continue
            after = model(state, one)
            if after is not None:
                following.append((one.completed, done | 1 << index, after))
        # What completed first is tried first, what has an unknown outcome last.
        stack.extend((done_, after) for _, done_, after in sorted(following, key=lambda item: -item[0]))
        if steps > most:
            raise TooLarge(f"{len(ordered)} operations, {len(tried)} configurations")
    return False


def violations(history: History) -> list[str]:
    """The objects whose operations are not linearizable, each with its operations. The model of an object is the last
    part of its name: "ID/log"."""
    found = []
    for name, operations in history.objects().items():
        if not linearizable(operations, MODELS[name.rpartition("/")[2]]):
            found.append(f"{name} is not linearizable:\n{told(operations)}")
    return found


def told(operations: Iterable[Operation]) -> str:
    """One line of JSON for each, in the order of their invocations."""
    ordered = sorted(operations, key=lambda one: one.invoked)
    return "\n".join(json.dumps({**asdict(one), "completed": one.completed if one.known else None}) for one in ordered)


def executions(operations: Iterable[Operation], found: Iterable[str]) -> list[str]:
    """What is wrong with how often commands were executed. found: the ids in a log, in which each command of
    `operations` with the name "append" writes its own. A command with an answer was executed once, another at most
    once; nothing else is in the log."""
    counts = Counter(found)
    wrong = []
    for one in operations:
        if one.name != "append":
            continue
        count = counts.pop(one.argument, 0)
        if count > 1 or (one.known and count != 1):
            wrong.append(f"{one.argument} was executed {count} times, outcome {'known' if one.known else 'unknown'}")
    return [*wrong, *(f"{name} was executed {count} times and never asked for" for name, count in counts.items())]
