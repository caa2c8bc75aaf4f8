"""HTTP connections, of which those of a client that waits in a line are not even read until it is their turn.

A flood costs the loop what it takes to read its requests, dozens of which come in one pass; what is done with them once
they are read has turns already (turns.py). A connection is known by what its last request was.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from rock.wire.turns import PLACE, Place

_HELD = 64 << 10  # bytes of a request that waits; then nothing more is taken from its connection


class Intake(HttpToolsProtocol):
    """One connection. What comes between two requests of a client with a line waits in that line, as bytes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._place = Place()
        self._held: bytes | None = None
        self._whole = True  # no request has come in part

    def data_received(self, data: bytes) -> None:
        if self._held is not None:
            self._held += data
            if len(self._held) > _HELD:
                self.flow.pause_reading()
        elif self._is_between and self._place.wait(self._go_on):
            self._unset_keepalive_if_required()
            self._held = data
        else:
            super().data_received(data)

    @property
    def _is_between(self) -> bool:
        return self._whole and self.cycle is not None and self.cycle.response_complete

    def _go_on(self) -> None:
        """Its turn has come."""
        data, self._held = self._held, None
        if data is None or self.parser is None or self.transport.is_closing():
            return
        self.flow.resume_reading()
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._whole = False
        super().on_message_begin()
        self.scope[PLACE] = self._place  # type: ignore[literal-required]

    def on_message_complete(self) -> None:
        self._whole = True
        super().on_message_complete()

    def shutdown(self) -> None:
        """The server stops: what waits is told so, by an answer."""
        self._place.line = ""
        self._go_on()
        super().shutdown()
