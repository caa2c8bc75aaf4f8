"""Draw what bench/fleet.py measured: `python bench/plot.py FIGURES SVG`, where FIGURES is what that printed.

Text alone, as no library for drawing is among the dependencies: axes by powers of two and ten, one line a series.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Points = list[tuple[float, float]]
WIDTH, HEIGHT, MARGIN = 420, 300, 56
COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#8d6a9f", "#777777", "#b08900")


def ticks(low: float, high: float, base: int) -> list[float]:
    """Powers of the base around what is shown."""
    first, last = math.floor(math.log(low, base) + 1e-9), math.ceil(math.log(high, base) - 1e-9)
    return [float(base) ** power for power in range(first, max(last, first + 1) + 1)]


def label(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def chart(number: int, title: str, x_name: str, x_base: int, series: dict[str, Points]) -> Iterator[str]:
    """One panel, beside those before it; both axes are logarithmic."""
    xs = [x / (1000 if x_base == 2 else 1) for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    across, up = ticks(min(xs), max(xs), x_base), ticks(min(ys), max(ys), 10)
    scale = 1000 if x_base == 2 else 1

    def at(x: float, y: float) -> tuple[float, float]:
        right = math.log(x / across[0]) / math.log(across[-1] / across[0])
        high = math.log(y / up[0]) / math.log(up[-1] / up[0])
        return MARGIN + right * (WIDTH - MARGIN - 16), HEIGHT - MARGIN - high * (HEIGHT - MARGIN - 40)

    yield f'<g transform="translate({number * WIDTH},0)"><text x="{WIDTH / 2}" y="20" class="t">{title}</text>'
    for x in across:
        left, below = at(x, up[0])
        yield f'<line x1="{left:.1f}" y1="{below:.1f}" x2="{left:.1f}" y2="{at(x, up[-1])[1]:.1f}" class="g"/>'
        yield f'<text x="{left:.1f}" y="{below + 16:.1f}" class="m">{label(x * scale)}</text>'
    for y in up:
        left, below = at(across[0], y)
        yield f'<line x1="{left:.1f}" y1="{below:.1f}" x2="{at(across[-1], y)[0]:.1f}" y2="{below:.1f}" class="g"/>'
        yield f'<text x="{left - 6:.1f}" y="{below + 4:.1f}" class="e">{label(y)}</text>'
    yield f'<text x="{WIDTH / 2}" y="{HEIGHT - 22}" class="m">{x_name}</text>'
    for row, (name, points) in enumerate(series.items()):
        colour = COLOURS[row % len(COLOURS)]
        places = [at(x / scale, y) for x, y in sorted(points)]
        yield f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="' + " ".join(
            f"{left:.1f},{below:.1f}" for left, below in places) + '"/>'  # fmt: skip
        yield from (f'<circle cx="{left:.1f}" cy="{below:.1f}" r="3" fill="{colour}"/>' for left, below in places)
        yield f'<text x="{MARGIN + 8}" y="{48 + 15 * row}" fill="{colour}">{name}</text>'
    yield "</g>"


def panels(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str, int, dict[str, Points]]]:
    """(title, what is along the axis, base of its ticks, series)."""
    found = list(rows)
    bursts = [row for row in found if "rock_p50" in row]
    single, group = ([row for row in bursts if row["kind"] == f"{kind} creates"] for kind in ("single", "group"))

    def of(chosen: list[dict[str, Any]], name: str, along: str = "size") -> Points:
        return [(row[along], row[name]) for row in chosen if row[name] > 0]

    if bursts:
        yield "seconds to the answer", "creates at once, 100 workers", 2, {
            "P50": of(single, "p50"), "P99": of(single, "p99"), "P50, groups of 1,000": of(group, "p50"),
            "ROCK's published P50": of(single, "rock_p50"), "ROCK's published P99": of(single, "rock_p99"),
        }  # fmt: skip
        yield "CPU of each create, ms", "creates at once, 100 workers", 2, {
            "admin": of(single, "admin_ms"), "hosts": of(single, "hosts_ms"), "client": of(single, "client_ms"),
            "admin, groups": of(group, "admin_ms"), "hosts, groups": of(group, "hosts_ms"),
        }  # fmt: skip
    grown = [row for row in found if row["kind"] == "group creates" and "sandboxes" in row]
    if grown:
        workers = sorted({row["workers"] for row in grown})
        yield "the admin's memory, MB", "sandboxes", 10, {
            f"{count} workers": of([row for row in grown if row["workers"] == count], "admin_mb", "sandboxes")
            for count in workers
        }  # fmt: skip


def main() -> None:
    figures, target = Path(sys.argv[1]), Path(sys.argv[2])
    rows = [json.loads(line) for line in figures.read_text().splitlines() if line.startswith("{")]
    drawn = list(panels(rows))
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * len(drawn)}" height="{HEIGHT}" '
             'font-family="sans-serif" font-size="11"><style>.t{font-size:13px;text-anchor:middle}'
             '.m{text-anchor:middle}.e{text-anchor:end}.g{stroke:#ddd}</style>'
             '<rect width="100%" height="100%" fill="white"/>']  # fmt: skip
    for number, (title, along, base, series) in enumerate(drawn):
        parts += chart(number, title, along, base, {name: points for name, points in series.items() if points})
    target.write_text("\n".join([*parts, "</svg>", ""]))


if __name__ == "__main__":
    main()
