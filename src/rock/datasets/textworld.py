"""TextWorld: text adventures that are generated, each from its seed, with a quest to be won.

A game is compiled when the first instance of it is made, which takes seconds, and kept in the sandbox for the others.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from typing import Any, ClassVar

from rock.guest.environments.tasks import BadParams, Message, Outcome, Task, UnknownTask, says, text_of

_ID = re.compile(r"quest-(\d{1,6})")
_FOLDER = "/tmp/rock-textworld"
_OPTIONS = {"world_size": (5, 1, 50), "nb_objects": (10, 1, 100), "quest_length": (5, 1, 20)}
_MOST_MOVES = 100
_ATTEMPTS = 5  # at a game that its expert wins
_SYSTEM = (
    "You play a text adventure. Answer with one command, such as: look, inventory, go east, open door, take key, "
    "put apple on table."
)


class TextWorld(Task):
    """One game. params at create: world_size (rooms), nb_objects, quest_length, max_moves."""

    SPLITS = ("train", "test")
    engine: ClassVar[Any] = None

    @classmethod
    def prepare(cls) -> None:
        import textworld
        import textworld.generator

        cls.engine = textworld

    @classmethod
    def tasks(cls, split: str, params: dict[str, Any]) -> list[str]:
        return [f"quest-{seed}" for seed in (range(1000) if split == "train" else range(1000, 1100))]

    def __init__(self, task_id: str, params: dict[str, Any]) -> None:
        super().__init__(task_id, params)
        found = _ID.fullmatch(task_id)
        if found is None:
            raise UnknownTask(f"TextWorld has no task {task_id!r}; they are like quest-0, with the seed as number")
        self.most = _number(params, "max_moves", _MOST_MOVES, 1, 10_000)
        self.moves = 0
        options = {name: _number(params, name, *bounds) for name, bounds in _OPTIONS.items()}
        self.game = self._open(self._made(int(found[1]), options))
        self.state = self.game.reset()

    def _open(self, path: str) -> Any:
        infos = self.engine.EnvInfos(policy_commands=True, max_score=True, won=True, lost=True, score=True)
        return self.engine.start(path, infos)

    def _made(self, seed: int, options: dict[str, int]) -> str:
        """The file of the game; of several that want it, one makes it."""
        name = hashlib.sha256(json.dumps([seed, options], sort_keys=True).encode()).hexdigest()[:16]
        os.makedirs(_FOLDER, exist_ok=True)
        path = os.path.join(_FOLDER, f"{name}.z8")
        with open(f"{path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.path.exists(f"{path}.done"):
                for attempt in range(_ATTEMPTS):
                    self._compile(path, seed + attempt * 1_000_000, options)
                    if self._can_be_won(path):
                        break
                open(f"{path}.done", "w").close()
        return path

    def _compile(self, path: str, seed: int, options: dict[str, int]) -> None:
        spec = self.engine.GameOptions()
        spec.seeds, spec.path, spec.force_recompile = seed, path, True
        spec.nb_rooms, spec.nb_objects = options["world_size"], options["nb_objects"]
        spec.quest_length = options["quest_length"]
        self.engine.generator.compile_game(self.engine.generator.make_game(spec), spec)

    def _can_be_won(self, path: str) -> bool:
        """Whether the expert's commands win. Two things of nearly one name can be one to the game's parser."""
        game = self._open(path)
        try:
            state = game.reset()
            for command in list(state.policy_commands or ()):
                state, _, _ = game.step(command)
            return bool(state.won)
        finally:
            game.close()

    def start(self) -> list[Message]:
        return [says(_SYSTEM, "system"), says(self.state.feedback)]

    def step(self, action: dict[str, Any], params: dict[str, Any]) -> Outcome:
        lines = text_of(action).strip().splitlines()
        before, self.moves = self.state.score, self.moves + 1
        self.state, _, done = self.game.step(lines[-1].strip() if lines else "")
        over = bool(done or self.state.won or self.state.lost)
        late = not over and self.moves >= self.most
        info = {"score": self.state.score, "max_score": self.state.max_score, "won": bool(self.state.won)}
        if over or late:
            info["stop_reason"] = "won" if self.state.won else "lost" if over else "move_limit"
        reward = 1.0 if self.state.won else float(self.state.score - before) / max(1, self.state.max_score)
        return Outcome([says(self.state.feedback)], reward, terminated=over, truncated=late, info=info)

    def evaluate(self, messages: list[Message] | None, params: dict[str, Any]) -> float:
        if messages:
            raise BadParams("TextWorld judges the game as it stands, not messages")
        return 1.0 if self.state.won else float(self.state.score) / max(1, self.state.max_score)

    def solution(self) -> list[Message]:
        commands = list(self.state.policy_commands or ())
        if not commands:
            raise BadParams(f"{self.task_id}: the expert knows no way from here")
        return [{"role": "assistant", "content": command} for command in commands]

    def close(self) -> None:
        self.game.close()


def _number(params: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = params.get(name, default)
    if type(value) is not int or not low <= value <= high:
        raise BadParams(f"{name} is a number from {low} to {high}, not {value!r}")
    return value
