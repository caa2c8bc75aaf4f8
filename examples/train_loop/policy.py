"""A small policy with a tokenizer, and a stub of a trainer. Both stand for a model server and a training framework.

The policy writes one digit and the end token. Its parameters are one logit for each digit, for the first turn and for
the turns after a hint. Token ids are bytes; the ids above 255 begin a message of a role or end one.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

ROLES = {"system": 256, "user": 257, "assistant": 258}
END = 259
DIGITS = range(10)


def prompt_ids(messages: list[dict[str, Any]]) -> list[int]:
    """The chat template: each message as ROLE bytes END, and the beginning of the next one of the assistant."""
    found: list[int] = []
    for message in messages:
        found += [ROLES[message["role"]], *message["content"].encode(), END]
    return [*found, ROLES["assistant"]]


@dataclass
class Policy:
    """version: increases with each update of the parameters."""

    version: int = 0
    logits: dict[str, list[float]] = field(default_factory=dict)
    random: random.Random = field(default_factory=lambda: random.Random(7))

    def _state(self, prompt: list[int]) -> str:
        """What the policy reads of a prompt: the last hint."""
        text = bytes(token for token in prompt if token < 256).decode()
        return "low" if text.endswith("Too low.") else "high" if text.endswith("Too high.") else "first"

    def log_probabilities(self, prompt: list[int]) -> list[float]:
        logits = self.logits.setdefault(self._state(prompt), [0.0 for _ in DIGITS])
        total = math.log(sum(map(math.exp, logits)))
        return [logit - total for logit in logits]

    def sample(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The fields of an answer: text, prompt_token_ids, token_ids, and logprobs of token_ids."""
        prompt = prompt_ids(messages)
        logprobs = self.log_probabilities(prompt)
        digit = self.random.choices(DIGITS, [math.exp(value) for value in logprobs])[0]
        return {"text": str(digit), "prompt_token_ids": prompt, "token_ids": [ord(str(digit)), END],
                "logprobs": [logprobs[digit], 0.0], "weight_version": str(self.version)}  # fmt: skip


class Trainer:
    """A stub of GRPO: checks the shapes, computes advantages within each group, and updates the policy's logits."""

    def __init__(self, policy: Policy, rate: float = 0.5) -> None:
        self.policy = policy
        self.rate = rate

    def step(self, groups: list[list[dict[str, Any]]]) -> dict[str, float]:
        """One update. groups: rollouts of one task each, every one an export of format "chains". Rollouts without a
        valid reward are left out. Returns the mean reward and numbers of tokens."""
        rewards: list[float] = []
        prompt_tokens = trained_tokens = 0
        for group in groups:
            valid = [row for row in group if row["reward_valid"] and not row["incomplete"]]
            mean = sum(row["reward"] for row in valid) / max(1, len(valid))
            spread = math.sqrt(sum((row["reward"] - mean) ** 2 for row in valid) / max(1, len(valid)))
            for row in valid:
                advantage = (row["reward"] - mean) / (spread + 1e-6)
                rewards.append(row["reward"])
                assert not row["missing"], row["missing"]
                for chain in row["chains"]:
                    self._learn(chain, advantage)
                    trained_tokens += sum(chain["mask"])
                    prompt_tokens += len(chain["tokens"]) - sum(chain["mask"])
        self.policy.version += 1
        return {"reward": sum(rewards) / max(1, len(rewards)), "rollouts": len(rewards),
                "prompt_tokens": prompt_tokens, "trained_tokens": trained_tokens}  # fmt: skip

    def _learn(self, chain: dict[str, Any], advantage: float) -> None:
        """chain: tokens, mask and logprobs of the same length T; segments are the completions."""
        length = len(chain["tokens"])
        assert len(chain["mask"]) == len(chain["logprobs"]) == length
        for segment in chain["segments"]:
            start, end = segment["start"], segment["end"]
            assert chain["mask"][start:end] == [1] * (end - start)
            assert int(segment["weight_version"]) == self.policy.version, "the rollout is of this policy"
            prompt, token = chain["tokens"][:start], chain["tokens"][start]
            now = self.policy.log_probabilities(prompt)
            assert abs(now[token - ord("0")] - chain["logprobs"][start]) < 5, "far from the policy that wrote it"
            logits = self.policy.logits[self.policy._state(prompt)]
            for digit in DIGITS:
                gradient = (1.0 if digit == token - ord("0") else 0.0) - math.exp(now[digit])
                logits[digit] += self.rate * advantage * gradient
