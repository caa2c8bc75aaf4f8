"""reasoning-gym's data sets: one question, one answer, scored by the data set itself.

A task is "NAME-NUMBER": the question of that number in the data set NAME, with the seed of its split.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from rock.guest.environments.tasks import BadParams, Message, Outcome, Task, UnknownTask, says, text_of

_ID = re.compile(r"(?:(train|test)/)?([a-z0-9_]+)-(\d{1,6})")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.S)
_SEEDS = {"train": 42, "test": 1042}
_PER_SET = 1
_SYSTEM = "Answer the question. Write the final answer between <answer> and </answer>, and nothing else between them."
# What a data set needs beside a seed: `composite` is made of others
_CONFIG: dict[str, dict[str, Any]] = {
    "composite": {"datasets": [{"name": name, "weight": 1, "config": {}} for name in ("chain_sum", "gcd")]}
}


class Reasoning(Task):
    """One question; an episode is one message.

    params at the profile: size, questions of each data set (1); datasets, names of those that are wanted.
    params at create: seed, config (of the data set).
    """

    SPLITS = ("train", "test")
    names: ClassVar[list[str]] = []
    make: ClassVar[Any] = None
    part: ClassVar[Any] = None

    @classmethod
    def prepare(cls) -> None:
        import reasoning_gym
        from reasoning_gym.composite import DatasetSpec
        from reasoning_gym.factory import DATASETS

        cls.names = sorted(DATASETS)
        cls.make = staticmethod(reasoning_gym.create_dataset)
        cls.part = DatasetSpec

    @classmethod
    def tasks(cls, split: str, params: dict[str, Any]) -> list[str]:
        size, wanted = params.get("size", _PER_SET), params.get("datasets") or cls.names
        if type(size) is not int or not 1 <= size <= 100_000:
            raise BadParams(f"size is a number of questions, not {size!r}")
        if not isinstance(wanted, list) or not set(wanted) <= set(cls.names):
            raise BadParams(f"datasets are names of: {', '.join(cls.names)}")
        before = "" if split == "train" else f"{split}/"
        return [f"{before}{name}-{number}" for name in wanted for number in range(size)]

    def __init__(self, task_id: str, params: dict[str, Any]) -> None:
        super().__init__(task_id, params)
        found = _ID.fullmatch(task_id)
        if found is None or found[2] not in self.names:
            raise UnknownTask(f"reasoning-gym has no task {task_id!r}; they are like chain_sum-0 and test/chain_sum-0")
        split, name, number = found[1] or "train", found[2], int(found[3])
        config = params.get("config") or _CONFIG.get(name, {})
        seed = params.get("seed", _SEEDS[split])
        if not isinstance(config, dict) or type(seed) is not int:
            raise BadParams("config is an object, and seed a number")
        try:
            if name == "composite":
                config = {**config, "datasets": [self.part(**part) for part in config.get("datasets", [])]}
            self.dataset = self.make(name, seed=seed, size=number + 1, **config)
        except (TypeError, AssertionError) as error:
            raise BadParams(f"{name} does not take this config: {error}") from error
        self.entry = self.dataset[number]
        self.reward = 0.0

    def start(self) -> list[Message]:
        return [says(_SYSTEM, "system"), says(str(self.entry["question"]))]

    def step(self, action: dict[str, Any], params: dict[str, Any]) -> Outcome:
        text = text_of(action)
        found = _ANSWER.findall(text)
        answer = (found[-1] if found else text).strip()
        # Some data sets give a little for any answer; to say nothing is none
        self.reward = float(self.dataset.score_answer(answer=answer, entry=self.entry)) if answer else 0.0
        return Outcome([], self.reward, terminated=True, info={"stop_reason": "answered"})

    def evaluate(self, messages: list[Message] | None, params: dict[str, Any]) -> float:
        if messages:
            raise BadParams("reasoning-gym judges the message of a step, not messages")
        return self.reward

    def solution(self) -> list[Message]:
        answer = self.entry.get("answer")
        if answer is None:
            raise BadParams(f"{self.task_id}: this data set stores no answers")
        return [{"role": "assistant", "content": f"<answer>{answer}</answer>"}]
