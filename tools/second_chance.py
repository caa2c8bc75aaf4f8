"""Run pytest, and a few tests that failed beside others once more, alone.

    python tools/second_chance.py NAME [pytest's own words ...]

Tests that start servers and kill them share two cores with others that do, and a moment that is long enough alone may
be too short then. Up to _MOST failures are run again with nothing of this run beside them, and told either way: what
passes only alone has a race, in the test or in what it tests. NAME keeps runs apart that go on at the same time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_MOST = 3
_FAILED = 1  # pytest's exit status where tests failed, and nothing else was wrong


def main(name: str, words: list[str]) -> int:
    cache = Path(".pytest_cache") / name
    noted = cache / "v/cache/lastfailed"
    noted.unlink(missing_ok=True)
    pytest = [sys.executable, "-m", "pytest", "-o", f"cache_dir={cache}"]
    status = subprocess.call([*pytest, *words])
    failed = list(json.loads(noted.read_text())) if status == _FAILED and noted.exists() else []
    if not 0 < len(failed) <= _MOST:
        return status
    print(f"\nonce more, alone: {' '.join(failed)}", flush=True)
    again = subprocess.call([*pytest, *failed])
    left = set(json.loads(noted.read_text())) if noted.exists() else set()
    for test in failed:
        print(f"{'FAILED TWICE' if test in left else 'PASSED ONLY ALONE'} {test}", flush=True)
    return again


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
