"""pass@k against a direct computation, intervals against known values, and the comparison of two jobs."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rock.jobs.statistics import bootstrap, compare, mean_of, pass_at, pass_at_k, sign_test, wilson


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_samples_with_a_pass(case: tuple[int, int, int]) -> None:
    n, c, k = case
    attempts = [True] * c + [False] * (n - c)
    samples = list(itertools.combinations(attempts, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(sample) for sample in samples) / len(samples))


def test_pass_at_k_of_impossible_numbers() -> None:
    for n, c, k in ((3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)):
        with pytest.raises(ValueError, match="pass@"):
            pass_at_k(n, c, k)


def test_pass_at_k_over_tasks_leaves_out_tasks_with_few_valid_attempts() -> None:
    passed = {"a": [True, False], "b": [False, False], "c": [True], "d": []}
    one = pass_at(passed, 1)
    assert one is not None and one.tasks == 3 and one.value == pytest.approx((0.5 + 0 + 1) / 3)
    two = pass_at(passed, 2)
    assert two is not None and two.tasks == 2 and two.value == pytest.approx(0.5)
    assert pass_at(passed, 3) is None
    assert 0 <= one.low <= one.value <= one.high <= 1


def test_intervals() -> None:
    low, high = wilson(8, 10)  # figures of the literature
    assert low == pytest.approx(0.4902, abs=1e-4) and high == pytest.approx(0.9433, abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0) and wilson(0, 5)[0] == 0.0 and wilson(5, 5)[1] == 1.0
    values = [0.0] * 50 + [1.0] * 50
    assert bootstrap(values) == bootstrap(values)
    low, high = bootstrap(values)
    assert 0.38 < low < 0.43 and 0.57 < high < 0.62  # 0.5 +- 1.96 * 0.05
    single = pass_at({"a": [True, True, False, False]}, 1)
    assert single is not None and (single.low, single.high) == wilson(2, 4)


def test_a_task_without_a_valid_reward_is_not_zero() -> None:
    found = mean_of({"a": [1.0], "b": []})
    assert found is not None and found.value == 1.0 and found.tasks == 1
    assert mean_of({"b": []}) is None


def test_jobs_are_compared_by_task() -> None:
    a = {"one": [0.0, 0.0], "two": [1.0], "three": [0.5], "only": [1.0], "invalid": []}
    b = {"one": [1.0, 0.0], "two": [0.0], "three": [0.5], "more": [1.0], "invalid": [1.0]}
    found = compare(a, b)
    assert (found.tasks, found.better, found.worse, found.same) == (3, ["one"], ["two"], 1)
    assert found.only_a == ["only"] and found.only_b == ["invalid", "more"]
    assert found.difference is not None and found.difference.value == pytest.approx((0.5 - 1.0 + 0.0) / 3)
    assert found.p_value == 1.0
    assert sign_test(8, 0) == pytest.approx(2 / 256) and sign_test(0, 0) == 1.0
    assert compare({}, {}).difference is None
