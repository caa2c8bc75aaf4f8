"""Rewards that a sandbox wrote. The bytes are hostile: size, encoding, nesting and numbers are checked."""

from __future__ import annotations

import json
import math
from typing import Any

LARGEST = 64 << 10  # bytes of a file with rewards
MOST = 100  # rewards of one trial
_LONGEST_NAME = 200


def number(value: object) -> float:
    """A finite number. ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{str(value)[:40]!r} is not a number")
    if isinstance(value, str) and len(value) > 100:
        raise ValueError("its text is too long for a number")
    try:
        found = float(value)
    except OverflowError:
        raise ValueError("it is too large") from None
    if not math.isfinite(found):
        raise ValueError(f"{found} is not finite")
    return found


def one(text: str) -> dict[str, float]:
    """The reward of a reward.txt. ValueError."""
    return {"reward": number(text.strip())}


def many(text: str) -> dict[str, float]:
    """The rewards of a reward.json: an object of numbers. ValueError, RecursionError."""
    found: Any = json.loads(text)
    if not isinstance(found, dict) or not found:
        raise ValueError("it is not an object with rewards")
    if len(found) > MOST or any(len(name) > _LONGEST_NAME for name in found):
        raise ValueError(f"it has more than {MOST} rewards, or a name of more than {_LONGEST_NAME} characters")
    return {name.encode("utf-8", "replace").decode(): number(value) for name, value in found.items()}


def read(name: str, raw: bytes) -> dict[str, float]:
    """The rewards of a file, by its name: JSON for *.json, else one number. ValueError."""
    if len(raw) >= LARGEST:
        raise ValueError(f"it has {LARGEST} bytes or more")
    try:
        text = raw.decode("utf-8")
        return many(text) if name.endswith(".json") else one(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
