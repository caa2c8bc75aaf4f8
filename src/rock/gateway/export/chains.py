"""Token chains for training: the tokens as the model read and wrote them, without tokenizing anything again.

    {"run": ID, "reward": 1.0, "rewards": {}, "reward_valid": true, "incomplete": false, "tags": {},
     "chains": [{"calls": [1, 2], "tokens": [T], "mask": [T], "logprobs": [T] or null, "prompt_length": P,
                 "segments": [{"call": 1, "start": S, "end": E, "finish_reason": "tool_calls",
                               "weight_version": "7"}, ...]}],
     "missing": [{"call": 3, "reason": "..."}]}

tokens: all token ids, T of them, prompt and completions in their order. mask: 1 for tokens that the model wrote in
these calls, else 0. logprobs: log probability of each token under the policy that wrote it, 0.0 where mask is 0; null
when one call of the chain has none. segments: tokens[start:end] is the completion of one call; the mask is 1 exactly there.
prompt_length: tokens before the first completion.

A call extends the chain of its parent if its prompt begins with all tokens of that chain. Otherwise it begins a new
chain, whose prompt has mask 0: a branch, a sub-agent, a compacted conversation, or a chat template that renders earlier
turns in another way. Each completion is trained on once. A call whose tokens are not completely known is in `missing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rock.gateway.call import RecordedCall
from rock.gateway.export.paths import answered, parents_of, response_of, run_fields
from rock.protocol.runs import RunInfo


@dataclass(slots=True)
class _Chain:
    tokens: list[int]
    calls: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] | None = field(default_factory=list)
    segments: list[dict[str, Any]] = field(default_factory=list)

    def extend(self, call: RecordedCall, prompt: list[int], ids: list[int]) -> None:
        """Append the part of the prompt that is new, and the completion."""
        response = response_of(call)
        self.tokens += prompt[len(self.tokens) :]
        gap = len(self.tokens) - len(self.mask)
        start = len(self.tokens)
        self.tokens += ids
        self.mask += [0] * gap + [1] * len(ids)
        if self.logprobs is not None and response.logprobs is not None:
            self.logprobs += [0.0] * gap + response.logprobs
        else:
            self.logprobs = None
        self.calls.append(call.number)
        self.segments.append({
            "call": call.number, "start": start, "end": len(self.tokens), "finish_reason": response.finish_reason,
            "weight_version": response.weight_version or call.weight_version,
        })  # fmt: skip

    def row(self) -> dict[str, Any]:
        return {"calls": self.calls, "tokens": self.tokens, "mask": self.mask, "logprobs": self.logprobs,
                "prompt_length": self.segments[0]["start"], "segments": self.segments}  # fmt: skip


def chains(calls: Sequence[RecordedCall], run: RunInfo) -> dict[str, Any]:
    """The token chains of a run."""
    parents = parents_of(calls)
    done = answered(calls)
    found: list[_Chain] = []
    of_call: dict[int, _Chain] = {}
    missing: list[dict[str, Any]] = []
    for call in calls:
        reason = _incomplete(call) if call.number in done else f"it is {call.status}: {call.error or 'no response'}"
        if reason is not None:
            missing.append({"call": call.number, "reason": reason})
            continue
        response = response_of(call)
        prompt, ids = response.prompt_token_ids or [], response.token_ids or []
        parent = parents[call.number]
        chain = of_call.get(parent) if parent is not None else None
        if chain is None or chain.calls[-1] != parent or prompt[: len(chain.tokens)] != chain.tokens:
            chain = _Chain([])
            found.append(chain)
        chain.extend(call, prompt, ids)
        of_call[call.number] = chain
    return {**run_fields(run), "chains": [chain.row() for chain in found], "missing": missing}


def _incomplete(call: RecordedCall) -> str | None:
    """Why a call cannot be trained on; None: it can."""
    response = response_of(call)
    if response.token_ids is None:
        return "the response has no token ids"
    if response.prompt_token_ids is None:
        return "the response has no prompt token ids"
    count, usage = len(response.token_ids), response.usage
    if usage.completion and usage.completion != count:
        return f"the response has {count} token ids, and its usage says {usage.completion}"
    if usage.prompt and usage.prompt != len(response.prompt_token_ids):
        return f"the response has {len(response.prompt_token_ids)} prompt token ids, and its usage says {usage.prompt}"
    return None
