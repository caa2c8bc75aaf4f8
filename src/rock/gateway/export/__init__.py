"""Exports of recorded calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rock.gateway.call import RecordedCall
from rock.protocol.runs import RunInfo


def export(kind: str, calls: Sequence[RecordedCall], run: RunInfo) -> Any:
    """OpenAI messages of the calls."""
    return {"run": run.id, "calls": [{"number": c.number, "request": dict(c.request.raw)} for c in calls]}
