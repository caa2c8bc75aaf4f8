"""Damage to the files by which a rocklet goes on after a crash: bits that flip, writes that are torn, files that end
early. As a disk or a file system does it that loses power, or ages."""

from __future__ import annotations

import random
from pathlib import Path

BLOCK = 512  # bytes that a disk writes at once


def files(run: Path) -> list[Path]:
    """Journals, output files and records below the folder `run` of a server's home, that have content."""
    found = [path for name in ("spools", "records") for path in sorted((run / name).rglob("*")) if path.is_file()]
    return [path for path in found if path.stat().st_size]


def damage(run: Path, seed: int, kind: str) -> Path | None:
    """Damage one of the files; which, or None when there is none. kind: flip (one bit), cut (it ends early), zeros (a
    block that was never written), empty."""
    draw = random.Random(seed)
    found = files(run)
    if not found:
        return None
    path = draw.choice(found)
    data = bytearray(path.read_bytes())
    at = draw.randrange(len(data))
    if kind == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "zeros":
        begin = at // BLOCK * BLOCK
        end = min(begin + BLOCK, len(data))
        data[begin:end] = bytes(end - begin)
    else:
        data.clear()
    path.write_bytes(bytes(data))  # in place, as a disk does it: whoever has it open reads this
    return path
