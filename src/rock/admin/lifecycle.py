"""The life of a sandbox as a pure function: (state, event) -> (state, effects).

From       Event             To         Effects
pending    launched          running    schedule
pending    launch_failed     stopped    destroy
pending    stop              stopping   destroy
pending    ended             stopped    destroy
running    launched          running    schedule
running    stop              stopping   destroy
running    ended             stopped    destroy
stopping   stop              stopping   destroy
stopping   launched          stopping   destroy
stopping   launch_failed     stopped    destroy
stopping   ended             stopped    destroy
stopping   destroyed         stopped    -
stopped    stop              stopped    -
stopped    ended             stopped    -
stopped    launched          stopped    destroy
stopped    launch_failed     stopped    -
stopped    destroyed         stopped    -
stopped    delete            deleted    forget

Everything else is a Conflict. A state is never left backwards: a sandbox that was stopped while it started is destroyed
when the start completes. A test holds this table and the code together.
"""

from __future__ import annotations

from enum import StrEnum

from rock.errors import Conflict
from rock.protocol.sandbox import State


class Event(StrEnum):
    LAUNCHED = "launched"
    LAUNCH_FAILED = "launch_failed"
    STOP = "stop"
    ENDED = "ended"
    DESTROYED = "destroyed"
    DELETE = "delete"


class Effect(StrEnum):
    """What has to be done outside, after the new state is saved. Each may be repeated without harm."""

    SCHEDULE = "schedule"
    DESTROY = "destroy"
    FORGET = "forget"


_S, _E, _F = State, Event, Effect

TRANSITIONS: dict[tuple[State, Event], tuple[State, tuple[Effect, ...]]] = {
    (_S.PENDING, _E.LAUNCHED): (_S.RUNNING, (_F.SCHEDULE,)),
    (_S.PENDING, _E.LAUNCH_FAILED): (_S.STOPPED, (_F.DESTROY,)),
    (_S.PENDING, _E.STOP): (_S.STOPPING, (_F.DESTROY,)),
    (_S.PENDING, _E.ENDED): (_S.STOPPED, (_F.DESTROY,)),
    (_S.RUNNING, _E.LAUNCHED): (_S.RUNNING, (_F.SCHEDULE,)),
    (_S.RUNNING, _E.STOP): (_S.STOPPING, (_F.DESTROY,)),
    (_S.RUNNING, _E.ENDED): (_S.STOPPED, (_F.DESTROY,)),
    (_S.STOPPING, _E.STOP): (_S.STOPPING, (_F.DESTROY,)),
    (_S.STOPPING, _E.LAUNCHED): (_S.STOPPING, (_F.DESTROY,)),
    (_S.STOPPING, _E.LAUNCH_FAILED): (_S.STOPPED, (_F.DESTROY,)),
    (_S.STOPPING, _E.ENDED): (_S.STOPPED, (_F.DESTROY,)),
    (_S.STOPPING, _E.DESTROYED): (_S.STOPPED, ()),
    (_S.STOPPED, _E.STOP): (_S.STOPPED, ()),
    (_S.STOPPED, _E.ENDED): (_S.STOPPED, ()),
    (_S.STOPPED, _E.LAUNCHED): (_S.STOPPED, (_F.DESTROY,)),
    (_S.STOPPED, _E.LAUNCH_FAILED): (_S.STOPPED, ()),
    (_S.STOPPED, _E.DESTROYED): (_S.STOPPED, ()),
    (_S.STOPPED, _E.DELETE): (_S.DELETED, (_F.FORGET,)),
}


def step(state: State, event: Event, sandbox_id: str = "") -> tuple[State, tuple[Effect, ...]]:
    """The next state and what it takes. Raises Conflict for an event that this state does not know."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        hint = "stop it first" if event is Event.DELETE else None
        raise Conflict(
            f"sandbox {sandbox_id} cannot take {event.value!r}: its state is {state.value!r}",
            sandbox_id=sandbox_id or None,
            hint=hint,
        ) from None
