"""Every attempt to escape, at every level that this machine has; and the table of them in docs/security.md."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.escape.attempt import Attempt
from tests.escape.catalogue import ATTEMPTS
from tests.escape.levels import LEVELS, PAGE, rows, run_levels

pytestmark = pytest.mark.timeout(900)
_ISOLATED = LEVELS[1:]
_WORDS = ("blocked", "open", "inside", "absent")


@pytest.fixture(scope="module")
def told() -> dict[str, dict[str, Any]]:
    if os.environ.get("ROCK_TEST_GVISOR"):
        return run_levels()
    why = "takes minutes: set ROCK_TEST_GVISOR=1, as `make gvisor` does"
    return {**run_levels(LEVELS[:-1]), "gvisor": {"unsupported": why}}


def _result(told: dict[str, dict[str, Any]], level: str, attempt: Attempt) -> list[str]:
    if "unsupported" in told[level]:
        pytest.skip(f"{level}: {told[level]['unsupported']}")
    result: list[str] = told[level]["results"][attempt.key]
    if result[0] == "skipped":
        pytest.skip(f"{attempt.key}: {result[1]}")
    return result


@pytest.mark.parametrize("level", _ISOLATED)
def test_no_attempt_gets_out(told: dict[str, dict[str, Any]], level: str) -> None:
    if "unsupported" in told[level]:
        pytest.skip(f"{level}: {told[level]['unsupported']}")
    wrong = {}
    for attempt in ATTEMPTS:
        word, detail = told[level]["results"][attempt.key]
        if word == "broken" or (word == "open" and level not in attempt.open_at):
            wrong[attempt.key] = f"{word}: {detail}"
    assert wrong == {}
    assert told[level]["isolation"] == level


@pytest.mark.parametrize("attempt", [a for a in ATTEMPTS if a.control], ids=lambda attempt: attempt.key)
def test_it_is_an_attack_where_nothing_isolates(told: dict[str, dict[str, Any]], attempt: Attempt) -> None:
    word, detail = _result(told, "none", attempt)
    assert word == "open", detail


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_is_left_of_them(told: dict[str, dict[str, Any]], level: str) -> None:
    if "unsupported" in told[level]:
        pytest.skip(f"{level}: {told[level]['unsupported']}")
    assert {name: left for name, left in told[level]["left"].items() if left} == {}


def test_nothing_is_open_where_root_makes_namespaces() -> None:
    assert [attempt.key for attempt in ATTEMPTS if "namespaces" in attempt.open_at] == []
    out = [attempt.key for attempt in ATTEMPTS if "userns" in attempt.open_at]
    assert all(key.startswith("resources: memory") for key in out), "only a limit may be open to an ordinary user"


def test_the_table_has_every_attempt(told: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    written = rows(PAGE.read_text())
    assert list(written) == [attempt.key for attempt in ATTEMPTS], "run `make escape-table`"
    for level, column in (("landlock", 1), ("userns", 2), ("namespaces", 3), ("gvisor", 4)):
        if "unsupported" in told[level]:
            continue
        now = {key: result[0] for key, result in told[level]["results"].items()}
        stale = [key for key, words in written.items() if words[column] == "blocked" and now[key] == "open"]
        assert stale == [], f"{level}: open, and the page says blocked"
    with capsys.disabled():
        for level in LEVELS:
            words = [result[0] for result in told[level].get("results", {}).values()]
            counts = ", ".join(f"{words.count(word)} {word}" for word in _WORDS if word in words)
            print(f"\n  escape attempts, {level}: {counts or told[level].get('unsupported')}", end="")
        print()
