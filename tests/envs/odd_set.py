"""A training set that does whatever its agent says, the bad things too."""

from __future__ import annotations

import os
import random
import threading
import time
from typing import Any

from rock.guest.environments.tasks import BadParams, Message, Outcome, Task, UnknownTask, says, text_of


class Odd(Task):
    SPLITS = ("train",)

    @classmethod
    def tasks(cls, split: str, params: dict[str, Any]) -> list[str]:
        return ["one", "two", *params.get("more", [])]

    def __init__(self, task_id: str, params: dict[str, Any]) -> None:
        super().__init__(task_id, params)
        if task_id == "broken":
            raise RuntimeError("made of glass")
        if task_id not in ("one", "two"):
            raise UnknownTask(f"no task {task_id}")

    def start(self) -> list[Message]:
        if self.params.get("bad"):
            raise BadParams("bad is not taken")
        return [says("Do something odd.")]

    def step(self, action: dict[str, Any], params: dict[str, Any]) -> Outcome:
        word, _, rest = text_of(action).partition(" ")
        if word == "sleep":
            time.sleep(float(rest))
        elif word == "draw":
            self.drawn = [*getattr(self, "drawn", []), random.random()]
            return Outcome([says(repr(self.drawn))], self.drawn[-1])
        elif word == "thread":
            threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
        elif word == "raise":
            raise RuntimeError(rest)
        elif word == "exit":
            os._exit(int(rest))
        elif word == "end":
            return Outcome([], 0.5, terminated=True, info={"stop_reason": "asked for"})
        return Outcome([says(f"{word} {params.get('tail', '')}{os.getpid()}")], 0.25)

    def evaluate(self, messages: list[Message] | None, params: dict[str, Any]) -> Any:
        return {"messages": messages, "params": params}
