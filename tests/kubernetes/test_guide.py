"""The generated table of docs/guides/kubernetes.md."""

from __future__ import annotations

from pathlib import Path

from rock.runtime.namespace import pod

GUIDE = Path(__file__).parent.parent.parent / "docs" / "guides" / "kubernetes.md"


def test_the_table_of_levels_is_the_one_of_the_code() -> None:
    assert pod.table() in GUIDE.read_text(), "python -m rock.runtime.namespace.pod prints it"
