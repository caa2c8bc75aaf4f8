"""Make the blocking SDK, `src/rock/sync`, out of the asynchronous one, `src/rock/sdk`.

    python tools/unasync.py            write what changed
    python tools/unasync.py --check    say what is out of date, and fail if anything is

Every module is carried over, except those that have no colour and are shared (`SHARED`) and `primitives.py`, which is
written by hand on both sides.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

SOURCE = Path("src/rock/sdk")
TARGET = Path("src/rock/sync")
SHARED = {"archive", "context", "envhub.schema", "envs.__init__", "envs.registration", "envs.rock_env", "forward",
          "http", "ownerkey", "pool", "servers", "stdin", "trace", "wheels"}  # fmt: skip
BY_HAND = {"primitives.py"}

HEADER = "# GENERATED from {source} by tools/unasync.py: do not edit.\n# ruff: noqa: E501, I001, RUF100, UP028\n"

RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf"\brock\.sdk\b(?!\.(?:{'|'.join(sorted(SHARED))})\b)", "rock.sync"),
        (r"\basync (def|with|for)\b", r"\1"),
        (r"\bawait ", ""),
        (r"\b(?:a|an) asynchronous\b", "a blocking"),
        (r"\basynchronous\b", "blocking"),
        (r"\bAsync(Iterator|Iterable|Generator|ContextManager)\b", r"\1"),
        (r"\b__a(enter|exit|iter|next)__\b", r"__\1__"),
        (r"\bStopAsyncIteration\b", "StopIteration"),
        (r"\basynccontextmanager\b", "contextmanager"),
        (r"\bCoroutine\[Any, Any, ([\w.]+)\]", r"\1"),
        (r"\basyncio\.run\((\w+\(\))\)", r"\1"),
        (r"\baclose\b", "close"),
        (r"\banext\b", "next"),
    )
]


def convert(text: str, source: str) -> str:
    """The blocking text of an asynchronous module."""
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    text = re.sub(r"^(from collections\.abc import )(.+)$", _once, text, flags=re.MULTILINE)
    left = re.search(r"^(?!\s*#).*\b(async|await|asyncio)\b.*$", text, re.MULTILINE)
    if left:
        raise SystemExit(f"{source}: this line stays asynchronous: {left[0].strip()}")
    return HEADER.format(source=source) + text


def _once(match: re.Match[str]) -> str:
    return match[1] + ", ".join(dict.fromkeys(match[2].split(", ")))


def wanted() -> dict[Path, str]:
    """Every file of the blocking SDK with the text that it should have."""
    files = {}
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(SOURCE)
        if place.name not in BY_HAND and place.with_suffix("").as_posix().replace("/", ".") not in SHARED:
            files[TARGET / place] = convert(path.read_text(encoding="utf-8"), path.as_posix())
    return files


def main(arguments: list[str]) -> int:
    check = "--check" in arguments
    files = wanted()
    stale = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    extra = [path for path in TARGET.rglob("*.py") if path not in files and path.name not in BY_HAND]
    for path in [] if check else stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[path], encoding="utf-8")
    for path in [] if check else extra:
        path.unlink()
    for path in stale + extra:
        print(f"{'out of date' if check else 'written' if path in files else 'removed'}: {path}")
    return 1 if check and (stale or extra) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
