"""A plugin of pytest that prints the outcome of each test and what its runtime has to declare, for a run in a box."""

from __future__ import annotations

import json

import pytest

_RESULTS: dict[str, dict[str, object]] = {}


def pytest_collection_finish(session: pytest.Session) -> None:
    for item in session.items:
        wanted = [need for mark in item.iter_markers("needs") for need in mark.args]
        names = [getattr(need, "value", None) or need.__name__ for need in wanted]
        _RESULTS[item.nodeid] = {"needs": names, "outcome": "not run"}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    row = _RESULTS[report.nodeid]
    if report.when == "call" or report.failed or (report.when == "setup" and report.skipped):
        row["outcome"] = report.outcome if row["outcome"] != "failed" else "failed"


def pytest_unconfigure() -> None:
    print("\nconformance results: " + json.dumps(_RESULTS))
