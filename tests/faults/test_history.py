"""The checker itself, on histories that were made by hand, and on random ones next to a search through all orders."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from tests.faults.history import (
    MODELS,
    NEVER,
    History,
    Operation,
    TooLarge,
    counter,
    executions,
    lifecycle,
    linearizable,
    log,
    process,
    register,
    violations,
)


def op(name: str, argument: object, invoked: float, completed: float = NEVER, result: object = None) -> Operation:
    return Operation("c", "s/x", name, argument, invoked, completed, result)


GOOD = {
    "nothing": (log, []),
    "one after another": (log, [op("append", "a", 0, 1), op("append", "b", 2, 3), op("read", None, 4, 5, ["a", "b"])]),
    "at the same time, either order": (
        log, [op("append", "a", 0, 5), op("append", "b", 1, 4), op("read", None, 6, 7, ["b", "a"])]),
    "a read during an append sees it": (log, [op("append", "a", 0, 9), op("read", None, 1, 2, ["a"])]),
    "a read during an append does not see it": (log, [op("append", "a", 0, 9), op("read", None, 1, 2, [])]),
    "an unknown one that happened": (log, [op("append", "a", 0), op("read", None, 5, 6, ["a"])]),
    "an unknown one that did not happen": (log, [op("append", "a", 0), op("read", None, 5, 6, [])]),
    "an unknown one that happened late": (
        log, [op("append", "a", 0), op("read", None, 1, 2, []), op("read", None, 5, 6, ["a"])]),
    "numbers": (counter, [op("next", None, 0, 3, 2), op("next", None, 1, 2, 1), op("get", None, 4, 5, 2)]),
    "a number that an unknown one took": (counter, [op("next", None, 0), op("next", None, 1, 2, 2)]),
    "writes": (register, [op("write", "x", 0, 4), op("write", "y", 1, 3), op("read", None, 5, 6, "x")]),
    "a process": (process, [op("start", None, 0, 1), op("status", None, 2, 3, "running"), op("kill", None, 4, 5),
                            op("status", None, 6, 7, "ended")]),
    "a stop that is under way": (lifecycle, [op("create", None, 0, 1), op("stop", None, 2, 9),
                                             op("get", None, 3, 4, "running"), op("get", None, 5, 6, "stopped")]),
}  # fmt: skip
BAD = {
    "lost": (log, [op("append", "a", 0, 1), op("read", None, 2, 3, [])]),
    "twice": (log, [op("append", "a", 0, 1), op("read", None, 2, 3, ["a", "a"])]),
    "an unknown one twice": (log, [op("append", "a", 0), op("read", None, 2, 3, ["a", "a"])]),
    "in the wrong order": (log, [op("append", "a", 0, 1), op("append", "b", 2, 3), op("read", None, 4, 5, ["b", "a"])]),
    "seen before it was asked": (log, [op("read", None, 0, 1, ["a"]), op("append", "a", 2, 3)]),
    "seen, then not": (log, [op("append", "a", 0, 9), op("read", None, 1, 2, ["a"]), op("read", None, 3, 4, [])]),
    "an unknown one that was undone": (
        log, [op("append", "a", 0), op("read", None, 1, 2, ["a"]), op("read", None, 3, 4, [])]),
    "two orders for two readers": (
        log, [op("append", "a", 0, 9), op("append", "b", 0, 9), op("read", None, 1, 2, ["a", "b"]),
              op("read", None, 3, 4, ["b", "a"])]),
    "a number twice": (counter, [op("next", None, 0, 3, 1), op("next", None, 1, 2, 1)]),
    "a number left out": (counter, [op("next", None, 0, 1, 1), op("next", None, 2, 3, 3)]),
    "a session that began anew": (counter, [op("next", None, 0, 1, 1), op("next", None, 2, 3, 1)]),
    "an old value": (register, [op("write", "x", 0, 1), op("write", "y", 2, 3), op("read", None, 4, 5, "x")]),
    "a process that came back": (process, [op("start", None, 0, 1), op("kill", None, 2, 3),
                                           op("status", None, 4, 5, "running")]),
    "a sandbox that came back": (lifecycle, [op("create", None, 0, 1), op("stop", None, 2, 9),
                                             op("get", None, 3, 4, "stopped"), op("get", None, 5, 6, "running")]),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_good_histories(name: str) -> None:
    model, operations = GOOD[name]
    assert linearizable(operations, model)


@pytest.mark.parametrize("name", BAD)
def test_bad_histories(name: str) -> None:
    model, operations = BAD[name]
    assert not linearizable(operations, model)


def every_order(operations: list[Operation]) -> bool:
    """The definition itself: each choice of unknown ones, in each order that keeps to the times."""
    known = [one for one in operations if one.known]
    unknown = [one for one in operations if not one.known]
    for count in range(len(unknown) + 1):
        for chosen in itertools.combinations(unknown, count):
            for order in itertools.permutations([*known, *chosen]):
                if any(b.completed < a.invoked for a, b in itertools.combinations(order, 2)):
                    continue
                state: object = None
                for one in order:
                    state = counter(state, one)  # type: ignore[arg-type]
                    if state is None:
                        break
                else:
                    return True
    return False


def test_random_histories_next_to_the_definition() -> None:
    draw, seen = random.Random(5), {True: 0, False: 0}
    for _ in range(400):
        operations = []
        for _ in range(draw.randint(1, 5)):
            begun = draw.uniform(0, 6)
            done = NEVER if draw.random() < 0.25 else begun + draw.uniform(0.1, 4)
            operations.append(op(draw.choice(["next", "get"]), None, begun, done, draw.randint(0, 3)))
        expected = every_order(operations)
        seen[expected] += 1
        assert linearizable(operations, counter) == expected, operations
    assert min(seen.values()) > 50


def test_a_long_history_is_quick_and_a_hopeless_one_ends() -> None:
    long = [op("next", None, at, at + 30, at + 1) for at in range(400)]
    began = time.monotonic()
    assert linearizable(long, counter)
    assert time.monotonic() - began < 10
    hopeless = [op("append", str(number), 0, 9) for number in range(14)] + [op("read", None, 10, 11, ["none"])]
    with pytest.raises(TooLarge):
        linearizable(hopeless, log, most=10_000)


def test_each_object_by_itself() -> None:
    history = History()
    for thing in ("a/counter", "b/counter"):
        for value in (1, 2):
            history.end(history.begin("c", thing, "next"), value)
    assert violations(history) == []
    history.end(history.begin("c", "b/counter", "next"), 2)
    (wrong,) = violations(history)
    assert wrong.startswith("b/counter is not") and wrong.count("\n") == 3
    refused = history.begin("c", "a/counter", "next")
    history.refused(refused)
    assert len(history.objects()["a/counter"]) == 2 and set(MODELS) >= {"counter", "log"}


def test_how_often_commands_were_executed() -> None:
    operations = [op("append", "a", 0, 1), op("append", "b", 0), op("read", None, 2, 3, ["a"])]
    assert executions(operations, ["a"]) == executions(operations, ["b", "a"]) == []
    assert executions(operations, []) == ["a was executed 0 times, outcome known"]
    assert executions(operations, ["a", "b", "b"]) == ["b was executed 2 times, outcome unknown"]
    assert executions(operations, ["a", "z"]) == ["z was executed 1 times and never asked for"]
