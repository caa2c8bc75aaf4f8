"""Recorded responses as the source of a run: by order of the calls, or by the messages of a request."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rock.errors import InvalidConfig
from rock.gateway.call import ModelRequest, ModelResponse
from rock.gateway.dialects import DIALECTS, DialectError
from rock.gateway.exchange import Exchange
from rock.gateway.runs import REPLAY_FILE, Run
from rock.gateway.tree import prefix_keys
from rock.protocol.runs import Replay


class Recorded:
    """The responses of one recording."""

    def __init__(self, rows: Iterable[tuple[ModelRequest | None, ModelResponse]], by: str) -> None:
        self._by = by
        self._ordered: list[ModelResponse] = []
        self._by_prefix: dict[bytes, deque[ModelResponse]] = {}
        for request, response in rows:
            self._ordered.append(response)
            if request is not None and by == "prefix":
                self._by_prefix.setdefault(prefix_keys(request)[-1], deque()).append(response)

    @classmethod
    def of_run(cls, run: Run, by: str) -> Recorded:
        """The completed calls of a recorded run."""
        return cls(((call.request, call.response) for call in run.recorded() if call.response is not None), by)

    @classmethod
    def of_records(cls, spec: Replay, folder: Path | None = None) -> Recorded:
        """Records of a request, or of the file of a run. InvalidConfig names a wrong one."""
        rows = spec.records if folder is None else json.loads((folder / REPLAY_FILE).read_text())
        dialect = DIALECTS[spec.dialect]
        found: list[tuple[ModelRequest | None, ModelResponse]] = []
        for place, row in enumerate(rows or ()):
            try:
                request = _request(dialect, row.get("request"), spec.by)
                found.append((request, dialect.parse_response(row["response"])))
            except DialectError as error:
                raise InvalidConfig(f"replay.records[{place}] is no call of dialect {spec.dialect}: {error}",
                                    hint="give bodies of requests and responses of that dialect") from None
        return cls(found, spec.by)

    def find(self, exchange: Exchange, place: int) -> ModelResponse | None:
        """The response of a call; place: its place among the calls, from 0."""
        if self._by == "order":
            return self._ordered[place] if place < len(self._ordered) else None
        found = self._by_prefix.get(prefix_keys(exchange.request)[-1])
        if not found:
            return None
        return found.popleft() if len(found) > 1 else found[0]


def _request(dialect: Any, body: Any, by: str) -> ModelRequest | None:
    if by == "order":
        return None
    if not isinstance(body, dict):
        raise DialectError('it has no "request", which by="prefix" needs')
    return dialect.parse_request(body, body.get("model"), bool(body.get("stream")))  # type: ignore[no-any-return]


async def from_recording(exchange: Exchange, recorded: Recorded) -> None:
    """Answer a call with its recorded response."""
    answered = sum(1 for call in exchange.run.calls[: exchange.call.number - 1] if call.state != "failed")
    found = recorded.find(exchange, answered)
    if found is None:
        exchange.fail("bad_request", f"the recording has no response for call {exchange.call.number}")
        return
    await exchange.respond(found)
