"""Orders the deltas of a stream for dialects whose streams have one part after the other.

A part that begins closes the one before. While a tool call is open, parts that begin later are held until the end,
because calls in parallel can be interleaved: their arguments would be lost otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rock.gateway.call import Delta

_KINDS = {"text": "text", "reasoning": "reasoning", "refusal": "refusal", "tool": "tool", "signature": "reasoning"}


@dataclass(slots=True)
class Block:
    """One part. place: its number in the response, from 0. kind: text, reasoning, refusal or tool. opened_by: the text
    of the delta that began it."""

    place: int
    index: int
    kind: str
    id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    signature: str = ""
    opened_by: str = ""

    @property
    def text(self) -> str:
        return "".join(self.pieces)


Step = tuple[Literal["open", "piece", "signature", "close"], Block, str]


class Blocks:
    """`feed` and `finish` return the steps to render. blocks: all that were opened."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._current: Block | None = None
        self._held: dict[int, Block] = {}

    def feed(self, delta: Delta) -> list[Step]:
        if delta.kind == "start":
            return []
        current, steps = self._current, list[Step]()
        if current is not None and delta.index == current.index:
            self._add(current, delta, steps)
            return steps
        held = self._held.get(delta.index)
        if held is not None:
            self._add(held, delta, [])
            return steps
        if delta.kind == "arguments":
            return steps  # of a call that did not begin
        block = Block(len(self.blocks), delta.index, _KINDS[delta.kind], delta.id, delta.name, opened_by=delta.text)
        if current is not None and current.kind == "tool":
            self._held[delta.index] = block
            self._add(block, delta, [])
            return steps
        if current is not None:
            steps.append(("close", current, ""))
        self._open(block, steps)
        self._add(block, delta, steps)
        return steps

    def finish(self) -> list[Step]:
        steps: list[Step] = []
        if self._current is not None:
            steps.append(("close", self._current, ""))
            self._current = None
        for block in self._held.values():
            block.place = len(self.blocks)
            self._open(block, steps)
            if block.pieces:
                steps.append(("piece", block, block.text))
            if block.signature:
                steps.append(("signature", block, block.signature))
            steps.append(("close", block, ""))
        self._held, self._current = {}, None
        return steps

    def _open(self, block: Block, steps: list[Step]) -> None:
        self.blocks.append(block)
        self._current = block
        steps.append(("open", block, ""))

    def _add(self, block: Block, delta: Delta, steps: list[Step]) -> None:
        if delta.kind == "signature":
            block.signature += delta.text
            steps.append(("signature", block, delta.text))
        elif delta.kind != "tool" and delta.text:
            block.pieces.append(delta.text)
            steps.append(("piece", block, delta.text))
