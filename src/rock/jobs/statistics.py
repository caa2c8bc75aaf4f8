"""Statistics of rewards: pass@k with intervals, and the paired comparison of two jobs. Pure functions."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SEED = 20_240_229
_SAMPLES = 2000
_Z = 1.959963984540054  # of a two-sided interval of 95 %

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """An estimate with its 95 % interval. tasks: number of tasks that it is from."""

    value: float
    low: float
    high: float
    tasks: int


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate 1 - C(n-c, k) / C(n, k) of the probability that one of k attempts passes.

    n: attempts; c: passed attempts; k <= n. ValueError.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {c} passed attempts of {n}")
    if n - c < k:
        return 1.0
    missed = 1.0
    for i in range(n - c + 1, n + 1):
        missed *= 1.0 - k / i
    return 1.0 - missed


def wilson(passed: int, total: int) -> Interval:
    """Wilson's score interval of a proportion."""
    if total == 0:
        return 0.0, 1.0
    share = passed / total
    middle = (share + _Z**2 / (2 * total)) / (1 + _Z**2 / total)
    half = _Z / (1 + _Z**2 / total) * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(values: Sequence[float], samples: int = _SAMPLES) -> Interval:
    """The percentile bootstrap interval of the mean over tasks; the same values give the same interval."""
    if len(values) < 2:
        return (0.0, 1.0) if not values else (values[0], values[0])
    chance = random.Random(_SEED)
    means = sorted(sum(chance.choices(values, k=len(values))) / len(values) for _ in range(samples))
    return means[int(0.025 * samples)], means[min(samples - 1, int(0.975 * samples))]


def pass_at(passed: Mapping[str, Sequence[bool]], k: int) -> Estimate | None:
    """pass@k over tasks. passed: by task, whether each valid attempt passed. Tasks with fewer than k valid attempts are
    left out; None when no task is left."""
    counts = [(len(one), sum(one)) for one in passed.values() if len(one) >= k]
    if not counts:
        return None
    values = [pass_at_k(n, c, k) for n, c in counts]
    if k == 1 and (len(counts) == 1 or all(n == 1 for n, _ in counts)):
        low, high = wilson(sum(c for _, c in counts), sum(n for n, _ in counts))
    else:
        low, high = bootstrap(values)
    return Estimate(sum(values) / len(values), low, high, len(values))


def mean_of(values: Mapping[str, Sequence[float]]) -> Estimate | None:
    """The mean reward over tasks, with its bootstrap interval."""
    means = [sum(one) / len(one) for one in values.values() if one]
    if not means:
        return None
    low, high = bootstrap(means)
    return Estimate(sum(means) / len(means), low, high, len(means))


@dataclass(frozen=True)
class Comparison:
    """Two jobs on the tasks that both have with valid rewards. difference: mean of B minus A over tasks, with its
    interval. p_value: of the exact sign test over tasks that differ. only_a, only_b: tasks without a counterpart."""

    tasks: int
    mean_a: float
    mean_b: float
    difference: Estimate | None
    better: list[str]
    worse: list[str]
    same: int
    p_value: float
    only_a: list[str]
    only_b: list[str]


def compare(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> Comparison:
    """Compare the rewards of two jobs by task. a, b: rewards of the valid attempts by task."""
    left = {task: sum(values) / len(values) for task, values in a.items() if values}
    right = {task: sum(values) / len(values) for task, values in b.items() if values}
    both = sorted(left.keys() & right.keys())
    changes = {task: right[task] - left[task] for task in both}
    better = [task for task in both if changes[task] > 1e-12]
    worse = [task for task in both if changes[task] < -1e-12]
    difference = None
    if both:
        low, high = bootstrap(list(changes.values()))
        difference = Estimate(sum(changes.values()) / len(both), low, high, len(both))
    means = [sum(side[task] for task in both) / max(1, len(both)) for side in (left, right)]
    return Comparison(
        len(both), means[0], means[1], difference, better, worse,
        len(both) - len(better) - len(worse), sign_test(len(better), len(worse)),
        sorted(left.keys() - right.keys()), sorted(right.keys() - left.keys()),
    )  # fmt: skip


def sign_test(better: int, worse: int) -> float:
    """The two-sided p-value of the exact sign test."""
    total = better + worse
    tail: float = sum(math.comb(total, i) for i in range(min(better, worse) + 1)) / 2**total
    return min(1.0, 2 * tail)
