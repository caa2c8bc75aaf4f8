"""The records of the sandboxes: read, amended, and changed by steps of the lifecycle.

Every change of a state goes through `apply`: the pure lifecycle decides, the store saves over the version that was
read, and only then the effects begin. After a crash in between, the reconciler completes the effects.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from rock.admin.sandboxes import lifecycle
from rock.admin.sandboxes.lifecycle import Effect, Event, step
from rock.errors import RockError, no_such_sandbox
from rock.protocol.keys import Quota
from rock.protocol.sandbox import State
from rock.store.base import Record, Store, VersionConflict
from rock.telemetry.metrics import REGISTRY

log = logging.getLogger("rock.admin")

ENDS = REGISTRY.counter("rock_sandbox_ends_total", "Sandboxes that ended, by why", "cause")

_ENDS = (Event.LAUNCH_FAILED, Event.STOP, Event.ENDED, Event.DESTROYED)
_MOST_RECENT = 10_000


class Records:
    """The records in a store.

    on_effect: called with the saved record, by effect; they begin the effect in the background. on_withdrawn: called
    with the id of a pending sandbox that is no longer to be started. on_unfinished: called with the id of a sandbox
    whose step could not be completed. on_step: called with the records before and after a saved step.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.on_effect: dict[Effect, list[Callable[[Record], object]]] = {effect: [] for effect in Effect}
        self.on_withdrawn: list[Callable[[str], None]] = []
        self.on_unfinished: list[Callable[[str], None]] = []
        self.on_step: list[Callable[[Record, Record], None]] = []
        self._recent: dict[str, Record] = {}  # as this process saved them last

    def unfinished(self, sandbox_id: str) -> None:
        """A step could not be completed; the reconciler has to continue it."""
        for listener in self.on_unfinished:
            listener(sandbox_id)

    async def load(self, sandbox_id: str) -> Record:
        """The record of a sandbox. NotFound."""
        record = await self.store.get(sandbox_id)
        if record is None:
            raise no_such_sandbox(sandbox_id)
        return record

    async def amend(self, sandbox_id: str, when: State | None = None, **fields: Any) -> Record:
        """Change fields of the record, in any state or only in state `when`."""
        while True:
            record = await self.load(sandbox_id)
            if when is not None and record.state is not when:
                return record
            try:
                new = await self.store.put(record.changed(**fields))
            except VersionConflict:
                continue
            self._recent.pop(sandbox_id, None)
            return new

    async def apply(
        self,
        sandbox_id: str,
        event: Event,
        known: Record | None = None,
        *,
        key: str | None = None,
        check: Callable[[Record], None] | None = None,
        quota: Quota | None = None,
        **fields: Any,
    ) -> Record:
        """One step of the lifecycle, saved; then its effects. The first recorded reason of an end stays.

        known: the record as it was read last; when it has changed since, it is read again. key: of the request. check:
        raises where the record, in its state, does not allow this. quota: of its tenant, for a step that starts it
        again.
        """
        guess = known or self._recent.pop(sandbox_id, None)
        while True:
            record = guess or await self.load(sandbox_id)
            try:
                state, effects = step(record.state, event, sandbox_id)
                if check is not None:
                    check(record)
            except RockError:
                if guess is None:
                    raise
                guess = None
                continue
            if state is record.state and event is not Event.LAUNCHED:
                if guess is not None:  # only the saved record determines whether that is correct
                    guess = None
                    continue
                new = record
                break
            guess = None
            said = fields
            if record.info.cause is not None and event in _ENDS:
                said = {k: v for k, v in fields.items() if k not in ("cause", "reason", "error")}
            try:
                new = await self.store.put(lifecycle.stamped(record, event, state, key, said), quota)
                break
            except VersionConflict:
                continue
            except BaseException:
                self.unfinished(sandbox_id)  # a store that failed may have saved it: its effects are due all the same
                raise
        if state is not record.state:
            about = {"sandbox_id": sandbox_id}
            log.info("sandbox %s is %s (%s)", sandbox_id, state.value, event.value, extra=about)
            if record.state is State.PENDING and event is not Event.LAUNCHED:
                for listener in self.on_withdrawn:
                    listener(sandbox_id)
            if new.info.cause is not None and record.info.cause is None:
                ENDS.of(new.info.cause.value).add()
            for note in self.on_step:
                note(record, new)
        self._keep(new)
        for effect in effects:
            for begin in self.on_effect[effect]:
                begin(new)
        return new

    def _keep(self, record: Record) -> None:
        """Cache a record for its next step: `put` detects a concurrent change."""
        self._recent.pop(record.id, None)  # ended sandboxes are not cached: ten thousand of them would be 80 MB
        if record.state is not State.STOPPED:
            self._recent[record.id] = record
            while len(self._recent) > _MOST_RECENT:
                del self._recent[next(iter(self._recent))]
