"""Graded tasks of a training set: the adapter interface, and the host of one task instance.

An adapter is one class in one module, for the standard library and the packages of its set. Its source reaches the host
of environments on the command line. `prepare` runs once there, and each instance is a process forked from it: instances
share what `prepare` loads, and a failure of one instance does not affect others.
"""

from __future__ import annotations

import json
import sys
import time
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

DATA = "/tmp/rock-dataset"  # mount point of a user's data folder inside
_TEXT_KEPT = 4000

Message = dict[str, Any]  # role, content, and fields of the dialect: tool_calls, ...


class TaskError(Exception):
    """The request cannot be served, and the caller must change it. `code`: one of rock/errors.py."""

    code = "invalid_config"


class UnknownTask(TaskError):
    """No task has that id."""

    code = "not_found"


class BadParams(TaskError):
    """A parameter, a split or messages that the set does not accept."""


class MissingData(TaskError):
    """The set's data is missing; the message states how to supply it."""

    code = "unsupported"


class BadAction(Exception):
    """The agent's message is not a valid action. The observation reports it, and the episode continues."""


@dataclass
class Outcome:
    """The result of a step. state: messages for the agent. reward: of this step."""

    state: list[Message]
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: dict[str, Any] = field(default_factory=dict)


def says(content: str, role: str = "user") -> Message:
    """A message to the agent."""
    return {"role": role, "content": content, **({"tool_calls": []} if role == "user" else {})}


def text_of(action: Mapping[str, Any]) -> str:
    """The text of the agent's message; BadAction when it has none."""
    content = action.get("content")
    if content is None:
        return ""
    if not isinstance(content, str):
        raise BadAction("content has to be text")
    return content


class Task:
    """One instance of a graded task: the base class of adapters.

    Imported packages must be in the set's PACKAGES. A set must implement `tasks`, `start`, `step` and `evaluate`.
    """

    SPLITS: ClassVar[tuple[str, ...]] = ("train",)
    fork_safe: ClassVar[bool] = False  # a copy by os.fork is correct, whatever the process holds: see forking.py

    def __init__(self, task_id: str, params: dict[str, Any]) -> None:
        self.task_id = task_id
        self.params = params

    @classmethod
    def prepare(cls) -> None:
        """Import and load shared data. Runs once, before the first instance; threads do not survive the fork."""

    @classmethod
    def tasks(cls, split: str, params: dict[str, Any]) -> list[str]:
        """Ids of all tasks of a split, in a stable order."""
        raise NotImplementedError

    def start(self) -> list[Message]:
        """The first messages: an optional system prompt, and the user's message."""
        raise NotImplementedError

    def step(self, action: dict[str, Any], params: dict[str, Any]) -> Outcome:
        """Process the agent's message. BadAction for an invalid one; any other exception is an error of the
        environment."""
        raise NotImplementedError

    def evaluate(self, messages: list[Message] | None, params: dict[str, Any]) -> Any:
        """The current score: a number, or a dictionary with details. Repeated calls return the same."""
        raise NotImplementedError

    def tools(self, messages: list[Message] | None, params: dict[str, Any]) -> Any:
        """The tools of the agent, as plain data; None where there are no tools."""
        return None

    def solution(self) -> list[Message]:
        """Messages that solve the task, for tests of the set itself; BadParams where none is known."""
        raise BadParams(f"no solution of {self.task_id} is known")

    def close(self) -> None:
        """Release its resources."""


def load(module: str, source: str, name: str) -> type[Task]:
    """Load the adapter's class from the source of its module."""
    made = types.ModuleType(module)
    sys.modules[module] = made
    exec(compile(source, module, "exec"), made.__dict__)
    found = getattr(made, name)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise TypeError(f"{module}.{name} is no Task")
    return found


_ADAPTER: dict[str, type[Task]] = {}  # the only set of this sandbox


def install(packed: str) -> None:
    """In the host, before the first instance: load the adapter {"name", "module", "class", "source"} and prepare it."""
    told = json.loads(packed)
    adapter = load(told["module"], told["source"], told["class"])
    adapter.prepare()
    _ADAPTER[told["name"]] = adapter


class TaskHost:
    """An instance behind the interface of an environment.

    kwargs: "task_id", or None for a process that only serves the set's profile; "params"; "time_limit": seconds for the
    episode, after which a step is not executed and returns truncated.
    """

    vector = False

    def __init__(self, name: str, kwargs: Mapping[str, Any]) -> None:
        if name not in _ADAPTER:
            there = ", ".join(_ADAPTER) or "none"
            raise BadParams(f"this sandbox has no training set {name!r}; what it has: {there}")
        self._adapter = _ADAPTER[name]
        self._id = kwargs.get("task_id")
        self._params = kwargs.get("params") or {}
        self._limit: float | None = kwargs.get("time_limit")
        self._began = time.monotonic()
        self._over: str | None = None
        self._task: Task | None = None
        if self._id is not None:
            self._task = self._adapter(str(self._id), self._params)

    @property
    def task(self) -> Task:
        if self._task is None:
            raise BadParams("no task was chosen")
        return self._task

    def reset(self, seed: Any = None, options: Any = None) -> tuple[Any, Any]:
        """The first messages. May be called once: a new episode is a new instance."""
        return self.task.start(), {"task_id": self.task.task_id}

    def step(self, asked: Any) -> tuple[Any, Any, Any, Any, Any]:
        action, params = asked.get("action"), asked.get("params") or {}
        if self._over is not None:
            raise BadParams(f"the episode is over: {self._over}")
        if self._limit is not None and time.monotonic() - self._began > self._limit:
            self._over = "episode_timeout"
            info = {"truncated": True, "stop_reason": "episode_timeout", "failure": "timeout",
                    "error": f"the episode took longer than {self._limit:g} s"}  # fmt: skip
            return [], 0.0, False, True, info
        try:
            if not isinstance(action, dict):
                raise BadAction("an action is a message: an object with role and content")
            done = self.task.step(action, params)
        except BadAction as error:
            text = str(error)[:_TEXT_KEPT]
            return [says(text)], 0.0, False, False, {"failure": "bad_action", "error": text}
        if done.terminated or done.truncated:
            self._over = str(done.info.get("stop_reason", "it was finished"))
        info = {**done.info, "truncated": True} if done.truncated else done.info
        return done.state, float(done.reward), done.terminated, done.truncated, info

    def call(self, what: str, arguments: list[Any]) -> Any:
        if what == "profile":
            split, params = arguments
            return self._profile(split, params or {})
        if what == "evaluate":
            messages, params = arguments
            return self.task.evaluate(messages, params or {})
        if what == "tools":
            messages, params = arguments
            return self.task.tools(messages, params or {})
        if what == "solution":
            return self.task.solution()
        raise BadParams(f"a task cannot be asked for {what!r}: profile, evaluate, tools, solution")

    def _profile(self, split: Any, params: dict[str, Any]) -> list[str]:
        if split not in self._adapter.SPLITS:
            raise BadParams(f"there is no split {split!r}: {', '.join(self._adapter.SPLITS)}")
        return self._adapter.tasks(split, params)

    def layers(self) -> list[Any]:
        return [] if self._task is None else [self._task]

    def close(self) -> None:
        if self._task is not None:
            self._task.close()
