"""Three small projects with a defect each, as Git repositories and SWE-bench instances.

    python examples/swe_evaluation/projects.py FOLDER

FOLDER/instances.jsonl is a data set for `rock job run`. Each repository contains the project with its defect and some
tests; the hidden tests and the solution are patches in the instance, and in no commit.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# By project: the problem, the files of the base commit, the files of the solution, and the hidden tests.
PROJECTS: dict[str, dict[str, Any]] = {
    "ledger__rounding-1": {
        "problem": "`ledger.split(total, parts)` loses cents: the parts of 100 split by 3 are 33, 33 and 33. The sum "
        "of the parts must be the total; the first parts get the remaining cents.",
        "base": {
            "ledger.py": '''"""Amounts in cents."""


def split(total, parts):
    """Split an amount into almost equal parts."""
    return [total // parts for _ in range(parts)]


def format_cents(amount):
    """1234 -> '12.34'"""
    sign = "-" if amount < 0 else ""
    return f"{sign}{abs(amount) // 100}.{abs(amount) % 100:02d}"
''',
            "tests/__init__.py": "",
            "tests/test_ledger.py": '''import unittest

import ledger


class Ledger(unittest.TestCase):
    def test_even_split(self):
        self.assertEqual(ledger.split(90, 3), [30, 30, 30])

    def test_format(self):
        self.assertEqual(ledger.format_cents(-5), "-0.05")
''',
        },
        "solution": {
            "ledger.py": '''"""Amounts in cents."""


def split(total, parts):
    """Split an amount into almost equal parts. The first parts get the remaining cents."""
    share, rest = divmod(total, parts)
    return [share + (number < rest) for number in range(parts)]


def format_cents(amount):
    """1234 -> '12.34'"""
    sign = "-" if amount < 0 else ""
    return f"{sign}{abs(amount) // 100}.{abs(amount) % 100:02d}"
''',
        },
        "tests": {
            "tests/test_ledger.py": '''import unittest

import ledger


class Ledger(unittest.TestCase):
    def test_even_split(self):
        self.assertEqual(ledger.split(90, 3), [30, 30, 30])

    def test_format(self):
        self.assertEqual(ledger.format_cents(-5), "-0.05")

    def test_uneven_split(self):
        self.assertEqual(ledger.split(100, 3), [34, 33, 33])

    def test_sum(self):
        for total in range(50):
            self.assertEqual(sum(ledger.split(total, 7)), total)
''',
        },
        "fail_to_pass": ["test_uneven_split", "test_sum"],
        "pass_to_pass": ["test_even_split", "test_format"],
        "class": "tests.test_ledger.Ledger",
    },
    "intervals__merge-2": {
        "problem": "`intervals.merge` does not merge intervals that touch: [(1, 2), (2, 3)] stays as it is. It must "
        "return [(1, 3)]. Unsorted input must work too.",
        "base": {
            "intervals.py": '''"""Closed intervals."""


def merge(intervals):
    """Merge overlapping intervals."""
    merged = []
    for low, high in intervals:
        if merged and low < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged
''',
            "tests/__init__.py": "",
            "tests/test_intervals.py": '''import unittest

import intervals


class Merge(unittest.TestCase):
    def test_overlap(self):
        self.assertEqual(intervals.merge([(1, 3), (2, 4)]), [(1, 4)])
''',
        },
        "solution": {
            "intervals.py": '''"""Closed intervals."""


def merge(intervals):
    """Merge intervals that overlap or touch."""
    merged = []
    for low, high in sorted(intervals):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged
''',
        },
        "tests": {
            "tests/test_intervals.py": '''import unittest

import intervals


class Merge(unittest.TestCase):
    def test_overlap(self):
        self.assertEqual(intervals.merge([(1, 3), (2, 4)]), [(1, 4)])

    def test_touching(self):
        self.assertEqual(intervals.merge([(1, 2), (2, 3)]), [(1, 3)])

    def test_unsorted(self):
        self.assertEqual(intervals.merge([(5, 6), (1, 2)]), [(1, 2), (5, 6)])

    @unittest.expectedFailure
    def test_open_end(self):
        self.assertEqual(intervals.merge([(1, None)]), [(1, None), None])

    @unittest.skip("slow")
    def test_many(self):
        intervals.merge([(n, n + 1) for n in range(10**7)])
''',
        },
        "fail_to_pass": ["test_touching", "test_unsorted"],
        "pass_to_pass": ["test_overlap", "test_open_end", "test_many"],
        "class": "tests.test_intervals.Merge",
    },
    "slugs__unicode-3": {
        "problem": "`slugs.slug` drops accented letters: 'Café au lait' gives 'caf-au-lait'. It must give "
        "'cafe-au-lait'. Write the fix in slugs.py.",
        "base": {
            "slugs.py": '''"""Names for URLs."""

import re


def slug(text):
    """Lower-case words, joined by dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
''',
            "tests/__init__.py": "",
            "tests/test_slugs.py": '''import unittest

import slugs


class Slug(unittest.TestCase):
    def test_words(self):
        self.assertEqual(slugs.slug("Hello, World!"), "hello-world")
''',
        },
        "solution": {
            "slugs.py": '''"""Names for URLs."""

import re
import unicodedata


def slug(text):
    """Lower-case words without accents, joined by dashes."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")
''',
        },
        "tests": {
            "tests/test_slugs.py": '''import unittest

import slugs


class Slug(unittest.TestCase):
    def test_words(self):
        self.assertEqual(slugs.slug("Hello, World!"), "hello-world")

    def test_accents(self):
        self.assertEqual(slugs.slug("Caf\\u00e9 au lait"), "cafe-au-lait")
''',
        },
        "fail_to_pass": ["test_accents"],
        "pass_to_pass": ["test_words"],
        "class": "tests.test_slugs.Slug",
    },
}


def git(folder: Path, *words: str) -> str:
    """The output of a Git command in a folder, without the user's configuration."""
    settings = ["user.name=rock", "user.email=rock@localhost", "core.hooksPath=/dev/null"]
    command = ["git", *(word for setting in settings for word in ("-c", setting)), *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")


def patch_of(repository: Path, files: dict[str, str]) -> str:
    """The patch that changes files of the base commit. It is made in a copy: the repository never has its objects."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        git(repository.parent, "clone", "-q", "--no-hardlinks", str(repository), str(copy))
        write(copy, files)
        git(copy, "add", "-A")
        return git(copy, "diff", "--cached", "--no-color")


def build(folder: Path) -> Path:
    """Create the repositories and instances.jsonl in a folder; returns the path of that file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, project in PROJECTS.items():
        repository = folder / "repositories" / name
        repository.mkdir(parents=True)
        git(repository, "init", "-q")
        write(repository, project["base"])
        git(repository, "add", "-A")
        git(repository, "commit", "-q", "-m", "Initial version")
        test = project["class"]
        rows.append({
            "instance_id": name, "problem_statement": project["problem"], "repository": f"repositories/{name}",
            "base_commit": git(repository, "rev-parse", "HEAD").strip(), "parser": "unittest", "timeout": 120,
            "patch": patch_of(repository, project["solution"]), "test_patch": patch_of(repository, project["tests"]),
            "test_cmd": f"python3 -m unittest -v {test}",
            "FAIL_TO_PASS": [f"{one} ({test}.{one})" for one in project["fail_to_pass"]],
            "PASS_TO_PASS": [f"{one} ({test}.{one})" for one in project["pass_to_pass"]],
        })  # fmt: skip
    path = folder / "instances.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
