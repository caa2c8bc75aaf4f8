"""GRPO on a text environment: a policy with a table learns to guess a number from hints. Needs the extra `gym`.

    rock admin start
    python examples/grpo.py --svg curve.svg

Each step plays groups of episodes. The episodes of a group have the same secret number, so the advantage of an episode
is its reward relative to the mean of its group: no value function is needed. The environments run in one sandbox on the
server, and one request steps all of them.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import rock

ENVIRONMENT = "game:GuessTheNumber-v0-easy"  # a number from 1 to 10, at most 4 guesses
NUMBERS = 10
HINT = re.compile(r"guessed (\d+), and the target number is (lower|higher)")


@dataclass
class Policy:
    """Logits of the ten guesses for each interval that the hints leave: shape (12, 12, 10)."""

    logits: np.ndarray = field(default_factory=lambda: np.zeros((NUMBERS + 2, NUMBERS + 2, NUMBERS)))

    def probabilities(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """low, high: bounds of the interval, shape (n,). Returns shape (n, 10)."""
        logits = self.logits[low, high]
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))

    def learn(self, low: np.ndarray, high: np.ndarray, guess: np.ndarray, advantage: np.ndarray, rate: float) -> None:
        """One gradient step of mean(advantage * log p(guess)) over all guesses."""
        gradient = -self.probabilities(low, high)
        gradient[np.arange(len(guess)), guess - 1] += 1.0
        np.add.at(self.logits, (low, high), rate * advantage[:, None] * gradient)


@dataclass
class Rollouts:
    """Guesses of all episodes: parallel arrays with one entry per guess. rewards has one entry per episode."""

    episode: np.ndarray
    low: np.ndarray
    high: np.ndarray
    guess: np.ndarray
    rewards: np.ndarray


def play(envs: Any, policy: Policy, secrets: list[int], random: np.random.Generator) -> Rollouts:
    """One episode in each environment. secrets: the seeds, which decide the numbers."""
    envs.reset(seed=secrets)
    count = len(secrets)
    low, high = np.ones(count, int), np.full(count, NUMBERS)
    rewards, running = np.zeros(count), np.arange(count)
    rows: list[np.ndarray] = []
    while len(running):
        weights = policy.probabilities(low[running], high[running]).cumsum(axis=1)
        guesses = 1 + (random.random((len(running), 1)) > weights).sum(axis=1).clip(max=NUMBERS - 1)
        rows.append(np.stack([running, low[running], high[running], guesses]))
        answers, gained, ended, cut, _ = envs.step(
            {int(index): f"\\boxed{{{guess}}}" for index, guess in zip(running, guesses, strict=True)})
        rewards[running] += gained
        for index, answer in zip(running, answers, strict=True):
            if found := HINT.search(answer):
                number = int(found[1])
                if found[2] == "lower":
                    high[index] = max(low[index], min(high[index], number - 1))
                else:
                    low[index] = min(high[index], max(low[index], number + 1))
        running = running[~(ended | cut)]
    episode, before, after, guess = np.concatenate(rows, axis=1)
    return Rollouts(episode, before, after, guess, rewards)


def advantages(rewards: np.ndarray, size: int) -> np.ndarray:
    """Rewards relative to the mean and spread of their group of `size` episodes."""
    groups = rewards.reshape(-1, size)
    spread = groups.std(axis=1, keepdims=True) + 1e-6
    return np.asarray((groups - groups.mean(axis=1, keepdims=True)) / spread).ravel()


def curve(values: list[float], path: str) -> None:
    """Write the learning curve as an SVG picture of 640 x 240."""
    points = " ".join(f"{40 + 580 * step / max(1, len(values) - 1):.1f},{210 - 190 * value:.1f}"
                      for step, value in enumerate(values))
    lines = "".join(f'<line x1="40" y1="{210 - 190 * part}" x2="620" y2="{210 - 190 * part}" stroke="#ccc"/>'
                    f'<text x="34" y="{214 - 190 * part}" text-anchor="end">{part:.0%}</text>' for part in (0, 0.5, 1))
    with open(path, "w", encoding="utf-8") as file:
        file.write(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 240" font-family="sans-serif" '
                   f'font-size="12"><rect width="640" height="240" fill="white"/>{lines}<polyline points="{points}" '
                   f'fill="none" stroke="#1565c0" stroke-width="2"/><text x="330" y="232" text-anchor="middle">'
                   f'step (solved episodes, {len(values)} steps)</text></svg>\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--groups", type=int, default=8, help="groups of a step, each with one secret number")
    parser.add_argument("--size", type=int, default=16, help="episodes of a group")
    parser.add_argument("--rate", type=float, default=0.15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--svg", help="write the learning curve to this file")
    given = parser.parse_args()
    random, policy, solved = np.random.default_rng(given.seed), Policy(), []
    with rock.make_vec([ENVIRONMENT] * (given.groups * given.size)) as envs:
        for step in range(1, given.steps + 1):
            secrets = np.repeat(random.integers(1 << 30, size=given.groups), given.size).tolist()
            rollouts = play(envs, policy, secrets, random)
            gains = advantages(rollouts.rewards, given.size)
            policy.learn(rollouts.low, rollouts.high, rollouts.guess, gains[rollouts.episode], given.rate)
            solved.append(float((rollouts.rewards >= 1).mean()))
            if step == 1 or step % 10 == 0:
                print(f"step {step}: solved {np.mean(solved[-10:]):.0%}", flush=True)
    if given.svg:
        curve(solved, given.svg)


if __name__ == "__main__":
    main()
