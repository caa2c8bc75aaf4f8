"""The result in the output of an agent: the final text, and the usage that it reports itself. The run has the calls;
this is a fallback for agents that ran without one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rock.agents.recipe import Log

LONGEST = 1 << 20  # characters of a final text


@dataclass(frozen=True)
class Parsed:
    """What the output says. None: it does not say it."""

    text: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


def parse(log: Log, output: str) -> Parsed:
    """The result in `output`. An output in another form than the recipe says has no result; nothing is raised."""
    if log.format == "text":
        return Parsed(output.strip()[-LONGEST:] or None)
    documents = list(_lines(output) if log.format == "jsonl" else _whole(output))
    text = _last(documents, log.text)
    return Parsed(text[-LONGEST:] if isinstance(text, str) else None, _number(documents, log.input_tokens),
                  _number(documents, log.output_tokens))  # fmt: skip


def _whole(output: str) -> Iterator[Any]:
    """The document, which warnings may precede."""
    start = 0
    while (start := output.find("{", start)) >= 0:
        try:
            yield json.JSONDecoder().raw_decode(output, start)[0]
            return
        except (ValueError, RecursionError):
            start = output.find("\n", start)
            if start < 0:
                return


def _lines(output: str) -> Iterator[Any]:
    for line in output.splitlines():
        if line.lstrip().startswith("{"):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                continue


def _last(documents: list[Any], path: str) -> Any:
    """The value at `path` in the last document that has one."""
    if path:
        for document in reversed(documents):
            value = document
            for part in path.split("."):
                if isinstance(value, dict):
                    value = value.get(part)
                elif isinstance(value, list) and part.lstrip("-").isdigit() and -len(value) <= int(part) < len(value):
                    value = value[int(part)]
                else:
                    value = None
            if value is not None:
                return value
    return None


def _number(documents: list[Any], path: str) -> int | None:
    value = _last(documents, path)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
