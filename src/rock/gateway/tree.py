"""The prefix tree of a run's calls."""

from __future__ import annotations

from hashlib import blake2b

import orjson

from rock.gateway.call import ModelRequest


class Prefixes:
    def __init__(self) -> None:
        self._ends: dict[bytes, int] = {}

    def add(self, number: int, request: ModelRequest) -> int | None:
        """Add a call; returns the call with the longest proper prefix of its messages."""
        at = blake2b(orjson.dumps(request.system), digest_size=16).digest()
        parent = None
        for message in request.messages[:-1]:
            at = blake2b(at + orjson.dumps(message), digest_size=16).digest()
            parent = self._ends.get(at, parent)
        if request.messages:
            at = blake2b(at + orjson.dumps(request.messages[-1]), digest_size=16).digest()
        self._ends[at] = number
        return parent
