"""tools/step.py: the progress of `make demo` and `make test` while they install."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

STEP = str(Path(__file__).parent.parent / "tools" / "step.py")
WORK = "echo 'Collecting six (from -r requirements.lock)'; echo 'WARNING: noise'; sleep 2.5"


def test_a_terminal_is_not_silent() -> None:
    main, terminal = pty.openpty()
    child = subprocess.Popen([sys.executable, STEP, "installing", "sh", "-c", WORK], stdout=terminal)
    os.close(terminal)
    shown, gaps, last = b"", [], time.monotonic()
    try:
        while part := os.read(main, 1000):
            gaps.append(time.monotonic() - last)
            last = time.monotonic()
            shown += part
    except OSError:  # the last writer has closed the terminal
        pass
    os.close(main)
    assert child.wait() == 0
    assert max(gaps) < 2.4, gaps  # an update per second
    assert b"collecting six" in shown and b"noise" not in shown
    assert shown.replace(b"\r\n", b"\n").rpartition(b"\r\033[K")[2].startswith(b"installing: done in ")


def test_plain_lines_elsewhere() -> None:
    done = subprocess.run([sys.executable, STEP, "installing", "sh", "-c", WORK], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    first, last = done.stdout.splitlines()
    assert first == "installing ..." and last.startswith("installing: done in ")


def test_a_failure_shows_the_output() -> None:
    done = subprocess.run([sys.executable, STEP, "installing", "sh", "-c", "echo broken; echo why >&2; exit 7"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 7
    assert "failed with exit code 7" in done.stdout and done.stderr.splitlines() == ["broken", "why"]
