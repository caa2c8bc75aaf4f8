"""The lifecycle is a table; its drawing and its code are the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rock.admin import lifecycle
from rock.admin.lifecycle import Effect, Event, step
from rock.errors import Conflict
from rock.protocol.sandbox import State

ORDER = [State.PENDING, State.RUNNING, State.STOPPING, State.STOPPED, State.DELETED]


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
def test_no_state_is_left_backwards(events: list[Event]) -> None:
    state = State.PENDING
    for event in events:
        try:
            new, _ = step(state, event)
        except Conflict:
            continue
        assert ORDER.index(new) >= ORDER.index(state)
        state = new


@pytest.mark.parametrize("state", [State.PENDING, State.RUNNING, State.STOPPING])
def test_what_lives_cannot_be_deleted(state: State) -> None:
    with pytest.raises(Conflict, match="delete"):
        step(state, Event.DELETE, "x")
