"""Writes docs/reference/helm.md from the chart's values.yaml; `--check` only compares, and fails when it differs.

A comment above a key, or after its value, becomes its description.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TOP = Path(__file__).parent.parent
VALUES = TOP / "deploy" / "helm" / "rock" / "values.yaml"
TARGET = TOP / "docs" / "reference" / "helm.md"
HEAD = """# Helm values

`python tools/helm_reference.py` generates this page from `deploy/helm/rock/values.yaml`.
[Kubernetes](../guides/kubernetes.md) describes the installation, the levels and the modes.

| value | default | meaning |
|---|---|---|
"""
_KEY = re.compile(r"^(?P<indent> *)(?P<key>[A-Za-z][\w./-]*):(?: (?P<value>[^#]*?))?(?:\s+# (?P<comment>.*))?$")


class Value(NamedTuple):
    """One row. default: as YAML; empty for a section."""

    name: str
    default: str
    meaning: str


def values(text: str) -> Iterator[Value]:
    """All keys with a value, and all commented sections, in order."""
    path: list[tuple[int, str]] = []
    above: list[str] = []
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            above.append(line.strip().lstrip("# "))
            continue
        found = _KEY.match(line)
        if found is None:
            above = []
            continue
        indent = len(found["indent"])
        path = [(depth, key) for depth, key in path if depth < indent] + [(indent, found["key"])]
        meaning = " ".join([*above, found["comment"] or ""]).strip()
        above = []
        if found["value"] or meaning:
            yield Value(".".join(key for _, key in path), (found["value"] or "").strip(), meaning)


def page() -> str:
    rows = [f"| `{value.name}` | {f'`{value.default}`' if value.default else ''} | {value.meaning.replace('|', '/')} |"
            for value in values(VALUES.read_text(encoding="utf-8"))]
    return HEAD + "\n".join(rows) + "\n"


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        if TARGET.read_text(encoding="utf-8") == text:
            return 0
        print(f"{TARGET} differs from {VALUES.name}: run `python tools/helm_reference.py`", file=sys.stderr)
        return 1
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
