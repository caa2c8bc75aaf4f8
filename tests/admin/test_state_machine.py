"""The lifecycle is a table; its drawing and its code are the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rock.admin.sandboxes import lifecycle
from rock.admin.sandboxes.lifecycle import Effect, Event, step
from rock.errors import Conflict
from rock.protocol.sandbox import State

ORDER = [State.PENDING, State.RUNNING, State.STOPPING, State.STOPPED, State.ARCHIVING, State.ARCHIVED, State.DELETED]
BACK = {Event.RESTART, Event.RESTORE, Event.ARCHIVE_FAILED}


def test_the_drawing_is_the_code() -> None:
    lines = (lifecycle.__doc__ or "").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("From")) + 1
    drawn = {}
    for line in lines[start:]:
        if not line.strip():
            break
        source, event, target, *effects = line.split()
        names = tuple(Effect(e.strip(",")) for e in effects if e != "-")
        drawn[State(source), Event(event)] = (State(target), names)
    assert drawn == lifecycle.TRANSITIONS


@given(st.lists(st.sampled_from(Event), max_size=12))
def test_no_state_is_left_backwards_but_by_those_that_say_so(events: list[Event]) -> None:
    state = State.PENDING
    for event in events:
        try:
            new, _ = step(state, event)
        except Conflict:
            continue
        assert event in BACK or ORDER.index(new) >= ORDER.index(state)
        state = new


@given(st.lists(st.sampled_from(Event), max_size=20))
def test_what_is_deleted_stays_deleted(events: list[Event]) -> None:
    state = State.DELETED
    for event in events:
        try:
            state, _ = step(state, event)
        except Conflict:
            continue
        assert state is State.DELETED


def test_every_state_that_passes_can_be_finished() -> None:
    """Each state in which something is under way has an event for its success and one for its failure or end."""
    for state in (State.PENDING, State.STOPPING, State.ARCHIVING):
        targets = {target for (source, _), (target, _) in lifecycle.TRANSITIONS.items() if source is state}
        assert targets & {State.STOPPED, State.ARCHIVED}


@pytest.mark.parametrize("state", [State.PENDING, State.RUNNING, State.STOPPING, State.ARCHIVING])
def test_what_lives_cannot_be_deleted(state: State) -> None:
    with pytest.raises(Conflict, match="delete"):
        step(state, Event.DELETE, "x")


@pytest.mark.parametrize("state", [s for s in State if s is not State.STOPPED])
def test_only_what_is_stopped_can_be_restarted(state: State) -> None:
    with pytest.raises(Conflict, match="restart"):
        step(state, Event.RESTART, "x")
