"""What environments were asked and have not answered."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from rock.errors import RockError

Answered = bytes | bytearray | RockError  # a whole frame, or why there is none


class Batch:
    """Answers to what was asked together, in that order."""

    __slots__ = ("answers", "future", "left")

    def __init__(self, count: int) -> None:
        self.answers: list[Answered] = [b""] * count
        self.left = count
        self.future: asyncio.Future[list[Answered]] = asyncio.get_running_loop().create_future()

    def put(self, place: int, answer: Answered) -> None:
        self.answers[place] = answer
        self.left -= 1
        if not self.left and not self.future.done():
            self.future.set_result(self.answers)


@dataclass(slots=True)
class Call:
    """Something that an environment was asked. `id`: the asker's."""

    batch: Batch
    place: int
    number: int
    op: int
    id: int


@dataclass
class Hosted:
    """An environment inside. `pipe`: its own way for requests, if it has one. `ended`: why it is no longer there.
    `asked`: ids of what it has not answered, each within `timeout` seconds; since when the first of them waits, and
    what ends it. `dead`: its process is gone. `token`: what its pipes are given for; `lent`: who has them, and is told
    when they are taken back."""

    env_id: str
    pipe: int | None = None
    closed: bool = False
    ended: RockError | None = None
    timeout: float | None = None
    asked: deque[int] = field(default_factory=deque)
    since: float = 0.0
    timer: asyncio.TimerHandle | None = None
    dead: bool = False
    token: str = ""
    lent: Callable[[RockError], None] | None = None
    returned: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class Lent:
    """An environment's pipes, which a client plays it by. `memory`: for large answers, and where its part begins, when
    there is such memory. `timeout`: seconds for each thing that it is asked."""

    requests: int
    answers: int
    memory: tuple[int, int] | None
    timeout: float
