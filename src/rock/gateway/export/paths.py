"""The answered calls of a run as paths from a root to a leaf, for the exports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rock.gateway.call import Message, ModelResponse, RecordedCall
from rock.gateway.tree import branches, message_key
from rock.protocol.runs import RunInfo


def answered(calls: Iterable[RecordedCall]) -> dict[int, RecordedCall]:
    """The calls with a response, by number. Each one's parent is its nearest ancestor with a response."""
    every = {call.number: call for call in calls}
    return {number: call for number, call in every.items() if call.status == "done" and call.response is not None}


def parents_of(calls: Iterable[RecordedCall]) -> dict[int, int | None]:
    """The nearest answered ancestor of each answered call."""
    every = {call.number: call for call in calls}
    done = answered(every.values())
    found: dict[int, int | None] = {}
    for number, call in done.items():
        at, steps = call.parent, 0
        while at is not None and at not in done and steps <= len(every):
            at, steps = every[at].parent if at in every else None, steps + 1
        found[number] = at if at != number else None
    return found


def paths(calls: Iterable[RecordedCall]) -> list[list[RecordedCall]]:
    """The paths of answered calls, the one with the most calls first."""
    every = list(calls)
    done = answered(every)
    found = [[done[number] for number in path] for path in branches(parents_of(every))]
    return sorted(found, key=len, reverse=True)


def response_of(call: RecordedCall) -> ModelResponse:
    assert call.response is not None
    return call.response


def new_messages(call: RecordedCall, before: RecordedCall | None) -> tuple[Message, ...]:
    """The messages that a call adds to those of the call before and its response."""
    messages = call.request.messages
    if before is None:
        return messages
    place = len(before.request.messages)
    repeated = place < len(messages) and message_key(messages[place]) == message_key(response_of(before).message)
    return messages[place + 1 :] if repeated else messages[place:]


def run_fields(run: RunInfo) -> Mapping[str, Any]:
    """What every export says about its run. reward: None when it has none, or no valid one."""
    return {
        "run": run.id, "reward": run.reward, "rewards": dict(run.rewards), "reward_valid": run.reward_valid,
        "incomplete": run.incomplete, "tags": dict(run.tags),
    }  # fmt: skip
