"""SWE-bench: instances, logs of tests, grading and reports (schema 2). Pure functions over data.

An instance is a JSON object with instance_id, base_commit, problem_statement, test_patch, FAIL_TO_PASS, PASS_TO_PASS
and `patch`, the solution. Beyond SWE-bench: `image`, or `repository`, a local Git repository whose base_commit is
copied without its history; `workdir`, `test_cmd`, `timeout`, and `parser`, the format of the output of the tests:
"pytest" or "unittest".
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rock.errors import InvalidConfig

LARGEST_PATCH = 16 << 20  # bytes
LARGEST_DATA = 1 << 30
WORKDIR = "/testbed"
TEST_TIMEOUT = 1800.0
PARSERS = ("pytest", "unittest")
UNITTEST = "python3 -m unittest -v"
PYTEST = "python3 -m pytest -rA -v --tb=short -p no:cacheprovider"

APPLIED, APPLY_FAILED = ">>>>> Applied Patch", ">>>>> Patch Apply Failed"
START, END = ">>>>> Start Test Output", ">>>>> End Test Output"
EXIT_CODE, TIMED_OUT = ">>>>> Test Exit Code: ", ">>>>> Tests Timed Out"

_PASSED = ("PASSED", "XFAIL")
_STATUS = ("PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL", "XPASS")
_SUMMARY = re.compile(r"^=+ short test summary info =+$", re.M)
_LINE = re.compile(rf"^({'|'.join(_STATUS)}) (\S.*)$")
_VERBOSE = re.compile(rf"^(\S+::.*?) ({'|'.join(_STATUS)})(?: \(.*\))?(?:\s+\[ *\d+%\])?$")
_CODES = re.compile(r"\x1b\[[0-9;]*m")
_FILES = re.compile(r'^diff --git (?:"?a/(.*?)"?) (?:"?b/(.*?)"?)$', re.M)


@dataclass(frozen=True)
class Instance:
    """One instance. repository: a local Git repository, or None where the image contains it at `workdir`."""

    id: str
    problem: str
    base_commit: str
    patch: str
    test_patch: str
    fail_to_pass: tuple[str, ...]
    pass_to_pass: tuple[str, ...]
    image: str | None = None
    repository: str | None = None
    workdir: str = WORKDIR
    test_cmd: str = ""
    timeout: float = TEST_TIMEOUT
    parser: str = "pytest"

    @classmethod
    def parse(cls, data: Any, base: Path | None = None) -> Instance:
        """An instance of its JSON object. base: folder of relative repositories. InvalidConfig."""
        if not isinstance(data, dict):
            raise InvalidConfig("an instance is not an object", hint="see docs/guides/jobs.md")
        name = data.get("instance_id")
        try:
            repository = data.get("repository")
            if repository is not None:
                repository = str((base or Path()) / str(repository))
            made = cls(
                str(data["instance_id"]), str(data.get("problem_statement", "")), str(data.get("base_commit", "HEAD")),
                str(data.get("patch") or ""), str(data.get("test_patch") or ""), _tests(data["FAIL_TO_PASS"]),
                _tests(data.get("PASS_TO_PASS", [])), data.get("image") or data.get("docker_image"), repository,
                str(data.get("workdir", WORKDIR)), str(data.get("test_cmd") or ""),
                float(data.get("timeout", TEST_TIMEOUT)), str(data.get("parser", "pytest")),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidConfig(f"instance {name!r} is invalid: {error!r}", hint="see docs/guides/jobs.md") from None
        if not re.fullmatch(r"[A-Za-z0-9_.+-]{1,200}", made.id) or made.id in (".", ".."):
            raise InvalidConfig(f"{made.id[:80]!r} is not an instance id", hint="use letters, digits and _.+-")
        if not re.fullmatch(r"[A-Za-z0-9_./~^-]{1,200}", made.base_commit) or made.base_commit.startswith("-"):
            raise InvalidConfig(f"instance {made.id}: {made.base_commit!r} is not a commit", hint="use its hash")
        if made.parser not in PARSERS:
            raise InvalidConfig(f"instance {made.id}: there is no parser {made.parser!r}", hint="pytest or unittest")
        if not made.timeout > 0:
            raise InvalidConfig(f"instance {made.id}: timeout {made.timeout} is not positive", hint="write seconds")
        if not made.workdir.startswith("/"):
            raise InvalidConfig(f"instance {made.id}: workdir {made.workdir} is not absolute", hint="begin it with /")
        return made

    @property
    def test_files(self) -> list[str]:
        """Files of the test patch."""
        return sorted({path for pair in _FILES.findall(self.test_patch) for path in pair})

    @property
    def command(self) -> str:
        """The command line of the tests; by default pytest on the Python files of the test patch."""
        if self.test_cmd:
            return self.test_cmd
        if self.parser == "unittest":
            return UNITTEST
        files = [file for file in self.test_files if file.endswith(".py")]
        named = sorted({test.partition("::")[0] for test in (*self.fail_to_pass, *self.pass_to_pass)})
        return " ".join([PYTEST, *("'" + file.replace("'", "'\\''") + "'" for file in files or named)])


def _tests(value: Any) -> tuple[str, ...]:
    """Expected tests: a list, or the text of a JSON list, as SWE-bench's data set has it."""
    found = json.loads(value) if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(test, str) for test in found):
        raise ValueError("FAIL_TO_PASS and PASS_TO_PASS are lists of test ids")
    return tuple(found)


def load(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """The objects of a JSON or JSONL file by instance id. InvalidConfig names the line."""
    place = Path(path)
    try:
        if place.stat().st_size > LARGEST_DATA:
            raise InvalidConfig(f"{place} has more than {LARGEST_DATA} bytes", hint="split the file")
        text = place.read_text(encoding="utf-8")
        if text.lstrip()[:1] == "[":
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidConfig(f"{place} is not a JSON list or JSONL: {error}", hint="correct the file") from None
    found: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("instance_id"), str):
            raise InvalidConfig(f"{place}: entry {number} has no instance_id", hint="see docs/guides/jobs.md")
        found[row["instance_id"]] = row
    return found


def digest(data: Mapping[str, Any]) -> str:
    """A digest of an instance, which a resumed job compares."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


# ---- grading ----


def parse_log(log: str) -> dict[str, str]:
    """Status by test id, from the output of pytest -rA -v. The last short summary counts; tests that it does not name,
    such as skipped ones, have the status of their verbose line."""
    log = _CODES.sub("", log)
    found: dict[str, str] = {}
    for line in log.splitlines():
        match = _VERBOSE.match(line.rstrip())
        if match is not None:
            found[match[1]] = match[2]
    headers = list(_SUMMARY.finditer(log))
    for line in log[headers[-1].end() :].splitlines() if headers else ():
        match = _LINE.match(line.rstrip())
        if match is not None and match[1] != "SKIPPED":
            name = match[2] if match[1] == "PASSED" else _without_reason(match[2])
            found[name] = match[1]
    return found


_UNITTEST = re.compile(r"^(.+?) \.\.\. (ok|FAIL|ERROR|skipped .*|expected failure|unexpected success)$")
_WORDS = {"ok": "PASSED", "FAIL": "FAILED", "ERROR": "ERROR", "expected failure": "XFAIL",
          "unexpected success": "XPASS"}  # fmt: skip


def parse_unittest(log: str) -> dict[str, str]:
    """Status by test, from the output of unittest -v; a test is "NAME (MODULE.CLASS.NAME)"."""
    found: dict[str, str] = {}
    for line in log.splitlines():
        match = _UNITTEST.match(line.rstrip())
        if match is not None:
            found[match[1]] = _WORDS.get(match[2], "SKIPPED")
    return found


def statuses_of(instance: Instance, log: str) -> dict[str, str]:
    """Status by test id, from the output of the tests of an instance."""
    return parse_unittest(log) if instance.parser == "unittest" else parse_log(log)


def _without_reason(text: str) -> str:
    """The test id before " - REASON". A parameter may contain " - " too."""
    if "[" in text.partition(" - ")[0]:
        head, separator, _ = text.partition("] - ")
        return head + "]" if separator else text
    return text.partition(" - ")[0]


def status_of(test: str, statuses: Mapping[str, str]) -> str | None:
    """The status of an expected test. An expected id that is cut in a parameter matches the ids with that prefix, if
    they agree; None: the test did not run."""
    if test in statuses:
        return statuses[test]
    if "[" in test and not test.endswith("]"):
        found = {status for name, status in statuses.items() if name.startswith(test)}
        if len(found) == 1:
            return found.pop()
    return None


@dataclass(frozen=True)
class Grade:
    """fail_to_pass, pass_to_pass: (success, failure) of the expected tests."""

    fail_to_pass: tuple[list[str], list[str]]
    pass_to_pass: tuple[list[str], list[str]]

    @property
    def resolved(self) -> bool:
        return not self.fail_to_pass[1] and not self.pass_to_pass[1]

    def tests_status(self) -> dict[str, Any]:
        pairs = {"FAIL_TO_PASS": self.fail_to_pass, "PASS_TO_PASS": self.pass_to_pass, "FAIL_TO_FAIL": ([], []),
                 "PASS_TO_FAIL": ([], [])}  # fmt: skip
        return {name: {"success": pair[0], "failure": pair[1]} for name, pair in pairs.items()}


def grade(instance: Instance, statuses: Mapping[str, str]) -> Grade:
    """XFAIL counts as passed. A skipped test fails FAIL_TO_PASS and keeps PASS_TO_PASS. A missing test fails."""
    return Grade(_split(instance.fail_to_pass, statuses, _PASSED),
                 _split(instance.pass_to_pass, statuses, (*_PASSED, "SKIPPED")))  # fmt: skip


def _split(
    tests: Iterable[str], statuses: Mapping[str, str], good: Sequence[str]
) -> tuple[list[str], list[str]]:
    success: list[str] = []
    failure: list[str] = []
    for test in tests:
        (success if status_of(test, statuses) in good else failure).append(test)
    return success, failure


def log_text(output: str, exit_code: int | None, timed_out: bool, applied: bool) -> str:
    """The log of an evaluation with SWE-bench's marks."""
    if not applied:
        return f"{APPLY_FAILED}\n{output}"
    end = TIMED_OUT if timed_out else f"{EXIT_CODE}{exit_code}"
    return f"{APPLIED}\n{START}\n{output}\n{END}\n{end}\n"


# ---- reports ----


def instance_report(name: str, result: Mapping[str, Any], infra_reason: str | None) -> dict[str, Any]:
    """The report.json of an instance. result: `swe` of a trial's result; infra_reason: of a trial without a reward."""
    body: dict[str, Any] = {
        "patch_is_None": not result.get("patch_exists", False), "patch_exists": bool(result.get("patch_exists", False)),
        "patch_successfully_applied": bool(result.get("applied", False)),
        "resolved": bool(result.get("resolved", False)) and infra_reason is None,
        "infra_failure": infra_reason is not None,
    }  # fmt: skip
    if infra_reason is not None:
        body["infra_failure_reason"] = infra_reason
    if "tests_status" in result:
        body["tests_status"] = result["tests_status"]
    return {name: body}


GROUPS = ("submitted", "completed", "resolved", "unresolved", "infra_failure", "ambiguous_failure", "empty_patch",
          "error")  # fmt: skip


def run_report(total: int, groups: Mapping[str, Iterable[str]], incomplete: Iterable[str],
               reasons: Mapping[str, str]) -> dict[str, Any]:
    """The report of a run, schema 2. groups: ids by name of GROUPS."""
    ids = {name: sorted(set(groups.get(name, ()))) for name in GROUPS}
    counts = {f"{name}_instances": len(ids[name]) for name in GROUPS}
    return {
        "total_instances": total, **counts, **{f"{name}_ids": ids[name] for name in GROUPS},
        "incomplete_ids": sorted(set(incomplete)), "failure_reasons": dict(sorted(reasons.items())),
        "schema_version": 2,
    }  # fmt: skip
