"""The life of a sandbox as a pure function: (state, event) -> (state, effects).

From       Event             To         Effects
pending    launched          running    schedule
pending    launch_failed     stopped    release, schedule
pending    restore_failed    archived   release, schedule
pending    stop              stopping   release
pending    ended             stopped    release, schedule
running    launched          running    schedule
running    stop              stopping   release
running    ended             stopped    release, schedule
stopping   stop              stopping   release
stopping   launched          stopping   release
stopping   launch_failed     stopped    release, schedule
stopping   restore_failed    archived   release, schedule
stopping   ended             stopped    release, schedule
stopping   destroyed         stopped    schedule
stopped    stop              stopped    -
stopped    ended             stopped    -
stopped    launched          stopped    release
stopped    launch_failed     stopped    -
stopped    destroyed         stopped    -
stopped    restart           pending    launch
stopped    archive           archiving  archive
stopped    delete            deleted    forget
archiving  stop              archiving  -
archiving  ended             archiving  -
archiving  destroyed         archiving  -
archiving  archive           archiving  archive
archiving  archive_done      archived   release, schedule
archiving  archive_failed    stopped    schedule
archived   stop              archived   -
archived   ended             archived   -
archived   destroyed         archived   -
archived   launched          archived   release
archived   restore_failed    archived   -
archived   archive           archived   -
archived   restore           pending    launch
archived   delete            deleted    forget
deleted    stop              deleted    -
deleted    ended             deleted    -
deleted    destroyed         deleted    -
deleted    delete            deleted    forget

Everything else is a Conflict. A state is left backwards by restart, restore and what failed, and by nothing else: a
sandbox that was stopped while it started is released when the start completes. Releasing ends what there is on the
worker; its files stay where they are to be kept. A test holds this table and the code together.
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
    RESTART = "restart"
    ARCHIVE = "archive"
    ARCHIVE_DONE = "archive_done"
    ARCHIVE_FAILED = "archive_failed"
    RESTORE = "restore"
    RESTORE_FAILED = "restore_failed"
    DELETE = "delete"


class Effect(StrEnum):
    """What has to be done outside, after the new state is saved. Each may be repeated without harm."""

    LAUNCH = "launch"
    SCHEDULE = "schedule"
    RELEASE = "release"
    ARCHIVE = "archive"
    FORGET = "forget"


_S, _E, _F = State, Event, Effect
_ENDED = (_F.RELEASE, _F.SCHEDULE)

TRANSITIONS: dict[tuple[State, Event], tuple[State, tuple[Effect, ...]]] = {
    (_S.PENDING, _E.LAUNCHED): (_S.RUNNING, (_F.SCHEDULE,)),
    (_S.PENDING, _E.LAUNCH_FAILED): (_S.STOPPED, _ENDED),
    (_S.PENDING, _E.RESTORE_FAILED): (_S.ARCHIVED, _ENDED),
    (_S.PENDING, _E.STOP): (_S.STOPPING, (_F.RELEASE,)),
    (_S.PENDING, _E.ENDED): (_S.STOPPED, _ENDED),
    (_S.RUNNING, _E.LAUNCHED): (_S.RUNNING, (_F.SCHEDULE,)),
    (_S.RUNNING, _E.STOP): (_S.STOPPING, (_F.RELEASE,)),
    (_S.RUNNING, _E.ENDED): (_S.STOPPED, _ENDED),
    (_S.STOPPING, _E.STOP): (_S.STOPPING, (_F.RELEASE,)),
    (_S.STOPPING, _E.LAUNCHED): (_S.STOPPING, (_F.RELEASE,)),
    (_S.STOPPING, _E.LAUNCH_FAILED): (_S.STOPPED, _ENDED),
    (_S.STOPPING, _E.RESTORE_FAILED): (_S.ARCHIVED, _ENDED),
    (_S.STOPPING, _E.ENDED): (_S.STOPPED, _ENDED),
    (_S.STOPPING, _E.DESTROYED): (_S.STOPPED, (_F.SCHEDULE,)),
    (_S.STOPPED, _E.STOP): (_S.STOPPED, ()),
    (_S.STOPPED, _E.ENDED): (_S.STOPPED, ()),
    (_S.STOPPED, _E.LAUNCHED): (_S.STOPPED, (_F.RELEASE,)),
    (_S.STOPPED, _E.LAUNCH_FAILED): (_S.STOPPED, ()),
    (_S.STOPPED, _E.DESTROYED): (_S.STOPPED, ()),
    (_S.STOPPED, _E.RESTART): (_S.PENDING, (_F.LAUNCH,)),
    (_S.STOPPED, _E.ARCHIVE): (_S.ARCHIVING, (_F.ARCHIVE,)),
    (_S.STOPPED, _E.DELETE): (_S.DELETED, (_F.FORGET,)),
    (_S.ARCHIVING, _E.STOP): (_S.ARCHIVING, ()),
    (_S.ARCHIVING, _E.ENDED): (_S.ARCHIVING, ()),
    (_S.ARCHIVING, _E.DESTROYED): (_S.ARCHIVING, ()),
    (_S.ARCHIVING, _E.ARCHIVE): (_S.ARCHIVING, (_F.ARCHIVE,)),
    (_S.ARCHIVING, _E.ARCHIVE_DONE): (_S.ARCHIVED, _ENDED),
    (_S.ARCHIVING, _E.ARCHIVE_FAILED): (_S.STOPPED, (_F.SCHEDULE,)),
    (_S.ARCHIVED, _E.STOP): (_S.ARCHIVED, ()),
    (_S.ARCHIVED, _E.ENDED): (_S.ARCHIVED, ()),
    (_S.ARCHIVED, _E.DESTROYED): (_S.ARCHIVED, ()),
    (_S.ARCHIVED, _E.LAUNCHED): (_S.ARCHIVED, (_F.RELEASE,)),
    (_S.ARCHIVED, _E.RESTORE_FAILED): (_S.ARCHIVED, ()),
    (_S.ARCHIVED, _E.ARCHIVE): (_S.ARCHIVED, ()),
    (_S.ARCHIVED, _E.RESTORE): (_S.PENDING, (_F.LAUNCH,)),
    (_S.ARCHIVED, _E.DELETE): (_S.DELETED, (_F.FORGET,)),
    (_S.DELETED, _E.STOP): (_S.DELETED, ()),
    (_S.DELETED, _E.ENDED): (_S.DELETED, ()),
    (_S.DELETED, _E.DESTROYED): (_S.DELETED, ()),
    (_S.DELETED, _E.DELETE): (_S.DELETED, (_F.FORGET,)),
}

_HINTS = {Event.DELETE: "stop it first", Event.RESTART: "stop it first", Event.ARCHIVE: "stop it first"}


def step(state: State, event: Event, sandbox_id: str = "") -> tuple[State, tuple[Effect, ...]]:
    """The next state and what it takes. Raises Conflict for an event that this state does not know."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        hint = _HINTS.get(event) if state in (State.PENDING, State.RUNNING) else None
        raise Conflict(
            f"sandbox {sandbox_id} cannot take {event.value!r}: its state is {state.value!r}",
            sandbox_id=sandbox_id or None,
            hint=hint,
        ) from None
