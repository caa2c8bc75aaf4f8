"""Run one step of a make target with progress: `python tools/step.py LABEL COMMAND...`

On a terminal one line shows the label, the package that pip is working on and the elapsed time. Elsewhere a plain line
is printed at the start, every ten seconds, and at the end. The output of the command is printed only if it fails; the
exit code is that of the command.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time

INTERVAL = 1.0  # seconds between two updates on a terminal
PLAIN = 10.0  # seconds between two lines elsewhere
_STEP = re.compile(r"^\s*(Collecting|Downloading|Building|Installing|Preparing|Getting) (.*)")


def main(label: str, command: list[str]) -> int:
    terminal = sys.stdout.isatty()
    began, printed = time.monotonic(), 0.0
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace") as child:  # fmt: skip
        lines: list[str] = []
        reader = threading.Thread(target=_read, args=(child, lines), daemon=True)
        reader.start()
        if not terminal:
            print(f"{label} ...", flush=True)
        while reader.is_alive():
            elapsed = time.monotonic() - began
            if terminal:
                print(f"\r\033[K{label} ({elapsed:.0f} s){_current(lines)}", end="", flush=True)
            elif elapsed - printed >= PLAIN:
                printed = elapsed
                print(f"{label}: {elapsed:.0f} s{_current(lines)}", flush=True)
            reader.join(INTERVAL)
        status = child.wait()
    outcome = "done" if status == 0 else f"failed with exit code {status}"
    print(f"{chr(13) + chr(27) + '[K' if terminal else ''}{label}: {outcome} in {time.monotonic() - began:.0f} s")
    if status:
        print("".join(lines), end="", file=sys.stderr)
    return status


def _read(child: subprocess.Popen[str], lines: list[str]) -> None:
    assert child.stdout is not None
    lines.extend(iter(child.stdout.readline, ""))


def _current(lines: list[str]) -> str:
    """What pip is doing, in at most 40 characters."""
    for line in reversed(lines[-50:]):
        if found := _STEP.match(line):
            return f": {found[1].lower()} {found[2].strip()}"[:40]
    return ""


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
