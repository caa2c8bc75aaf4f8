"""Draw the figures of the report from its committed data: `python bench/report.py [--check]`.

Each docs/report/NAME.json has a title, the values of x and one list of values for each series. NAME.svg is drawn from
it; `--check` only compares.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "report"
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 640, 300, 56, 36, 24, 64
_COLORS = ("#c62828", "#1565c0", "#2e7d32", "#6a1b9a")


def drawn(data: dict[str, Any]) -> str:
    """The figure as SVG: a line for each series, from zero to the highest value."""
    xs = data["x"]
    top = max(max(values) for values in data["series"].values()) * 1.1

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - min(xs)) / (max(xs) - min(xs))
        return (_LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - y / top * (_HEIGHT - _TOP - _BOTTOM))

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
             f'font-size="12"><rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>'
             f'<text x="{_WIDTH / 2}" y="20" text-anchor="middle" font-size="13">{data["title"]}</text>']
    for step in range(5):
        value = top * step / 4
        _, y = place(min(xs), value)
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" stroke="#ddd"/>'
                     f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.1f}</text>')
    for x in xs:
        across, y = place(x, 0)
        parts.append(f'<text x="{across:.1f}" y="{y + 16:.1f}" text-anchor="middle">{x:g}</text>')
    for number, (name, values) in enumerate(data["series"].items()):
        color = _COLORS[number % len(_COLORS)]
        points = " ".join(f"{across:.1f},{y:.1f}" for across, y in map(place, xs, values))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{across:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>'
                  for across, y in map(place, xs, values)]
        parts.append(f'<text x="{_LEFT + 190 * number}" y="{_HEIGHT - 16}" fill="{color}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> int:
    different = []
    for source in sorted(FOLDER.glob("*.json")):
        picture = drawn(json.loads(source.read_text(encoding="utf-8")))
        target = source.with_suffix(".svg")
        if "--check" not in sys.argv[1:]:
            target.write_text(picture, encoding="utf-8")
        elif not target.exists() or target.read_text(encoding="utf-8") != picture:
            different.append(target.name)
    if different:
        print(f"run `python bench/report.py`: {', '.join(different)} differ from their data", file=sys.stderr)
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
