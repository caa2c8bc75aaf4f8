"""Exports of the recorded calls of a run: ATIF, OpenAI messages, token chains, ROCK's LLMTraj."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rock.gateway.call import RecordedCall
from rock.gateway.export.atif import atif
from rock.gateway.export.chains import chains
from rock.gateway.export.messages import openai, rock
from rock.protocol.runs import RunInfo

__all__ = ["FORMATS", "export"]

FORMATS: Mapping[str, Callable[[Sequence[RecordedCall], RunInfo], Any]] = {
    "atif": atif, "openai": openai, "chains": chains, "rock": rock,
}  # fmt: skip


def export(kind: str, calls: Sequence[RecordedCall], run: RunInfo) -> Any:
    """The calls of a run, in the order of their numbers, as JSON of a format of FORMATS."""
    return FORMATS[kind](calls, run)
