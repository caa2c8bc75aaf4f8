"""Replay of a recording: a new sandbox with the state that a recorded one had (decision 58)."""

from __future__ import annotations

from base64 import b64decode
from dataclasses import dataclass, field

from rock import errors
from rock.protocol.recordings import (
    CHECKPOINT,
    OPAQUE,
    REPLAYED,
    RecordedEntries,
    RecordedEntry,
    RecordingInfo,
    Start,
    canonical,
    effective,
    outcome,
    replay_key,
    starts,
    without_id,
)
from rock.protocol.routes import PREFIX, ROUTES
from rock.protocol.sandbox import SandboxConfig
from rock.sdk.http import query_string
from rock.sdk.sandbox.link import parse
from rock.sdk.transport import Transport

_LONGEST = 24 * 3600.0  # seconds for one replayed request
_MOST_SOURCES = 100
NO_START = (errors.NotFound, errors.Unavailable, errors.StartFailed, errors.Conflict, errors.NoCapacity,
             errors.Unsupported, errors.ImageError)  # fmt: skip


@dataclass
class Replayed:
    """What a replay did. snapshot: where it began; None is the image. replayed: number of requests sent again.
    diverged_at: number of the first entry with another outcome, or that could not be sent again. left_out: what is not
    replayed, one sentence each."""

    run_id: str
    snapshot: str | None = None
    replayed: int = 0
    diverged_at: int | None = None
    left_out: list[str] = field(default_factory=list)


@dataclass
class _Step:
    """An entry, and the sandbox of which it is."""

    sandbox_id: str
    entry: RecordedEntry


class Recording:
    """The recording of a sandbox, with those of the sandboxes from whose snapshots it started."""

    def __init__(self, transport: Transport, run_id: str) -> None:
        self._transport = transport
        self.run_id = run_id
        self.config = SandboxConfig()
        self._steps: list[_Step] = []
        self._begins: list[tuple[Start, int]] = []  # with the number of steps that it skips

    async def load(self) -> None:
        """Read the entries. NotFound; Conflict for a recording that cannot be replayed."""
        info, entries = await self._read(self.run_id)
        self.config = info.config
        steps = [_Step(self.run_id, entry) for entry in self._effective(info, entries)]
        while steps and steps[-1].entry.finished_at is None and steps[-1].entry.route not in OPAQUE:
            steps.pop()  # in progress at the end of the sandbox: its client repeats it
        begins = [(one, one.skip) for one in starts([step.entry for step in steps])]
        for _ in range(_MOST_SOURCES):
            snapshot = info.config.snapshot
            if snapshot is None:
                break
            begins[-1] = Start(snapshot=snapshot, kind="snapshot"), begins[-1][1]
            if info.source is None:
                break
            try:
                info, entries = await self._read(info.source)
            except errors.NotFound:  # it was not recorded
                break
            place = next((at for at, entry in enumerate(entries) if entry.snapshot == snapshot
                          and entry.route == CHECKPOINT), None)  # fmt: skip
            if place is None:
                break
            before = [_Step(info.sandbox_id, entry) for entry in self._effective(info, entries[:place])]
            steps = before + steps
            begins = [(one, skip + len(before)) for one, skip in begins]
            begins += [(one, one.skip) for one in starts([step.entry for step in before])]
        self._steps, self._begins = steps, begins

    @staticmethod
    def _effective(info: RecordingInfo, entries: list[RecordedEntry]) -> list[RecordedEntry]:
        if info.full:
            raise errors.Conflict(f"the recording of sandbox {info.sandbox_id} reached its limit: its end is missing",
                                  sandbox_id=info.sandbox_id, hint="take snapshots of long runs")  # fmt: skip
        try:
            return effective(entries)
        except ValueError as error:
            raise errors.Conflict(f"the recording of sandbox {info.sandbox_id} cannot be replayed: {error}",
                                  sandbox_id=info.sandbox_id, hint="start from the snapshot") from None  # fmt: skip

    async def _read(self, run_id: str) -> tuple[RecordingInfo, list[RecordedEntry]]:
        target = ROUTES["get_recording"].url(sandbox_id=run_id)
        info = parse(RecordingInfo, await self._transport.json("GET", target))
        return info, await read_entries(self._transport, run_id)

    def begins(self) -> list[tuple[SandboxConfig, int]]:
        """The configs from which a replay can begin, the nearest first, and the number of entries that each skips."""
        return [(self.config.model_copy(update={"sandbox_id": None, "name": None, "snapshot": one.snapshot,
                                                "snapshot_worker": None}), skip)
                for one, skip in self._begins]  # fmt: skip

    # ---- replay ----

    async def replay(self, sandbox_id: str, skip: int, report: Replayed) -> None:
        """Send the entries after the first `skip` ones to a new sandbox, in order, and compare the outcomes."""
        for step in self._steps[skip:]:
            entry = step.entry
            if entry.route in OPAQUE:
                report.left_out.append(f"entry {entry.number}: the content of {entry.target[:200]} is not recorded")
            if entry.route not in REPLAYED:
                continue
            if entry.request is None:
                report.left_out.append(f"entry {entry.number}: the request {entry.method} {entry.target[:200]} of "
                                       f"{entry.request_bytes} bytes is larger than what is recorded")  # fmt: skip
                same = False
            else:
                same = await self._send(sandbox_id, step, b64decode(entry.request))
                report.replayed += 1
            if not same and report.diverged_at is None:
                report.diverged_at = entry.number

    async def _send(self, sandbox_id: str, step: _Step, request: bytes) -> bool:
        """Send an entry again; returns whether its outcome is the recorded one, as far as that is known."""
        entry = step.entry
        target = f"{PREFIX}{sandbox_id}/{without_id(entry.target)}"
        body = canonical(entry.route, request)
        status, answer = 200, b""
        try:
            answer = await self._transport.call(
                entry.method, target, body, timeout=_LONGEST, key=replay_key(step.sandbox_id, entry.number),
                content_type=entry.request_type or "application/json")  # fmt: skip
        except errors.Unavailable:
            raise
        except errors.RockError as error:
            status = error.status
        if entry.finished_at is None:
            return True
        recorded = None if entry.response is None else b64decode(entry.response)
        known = 200 if entry.status is not None and entry.status < 300 else entry.status
        return outcome(entry.route, known, recorded, entry.response_type) == \
            outcome(entry.route, status, None if recorded is None else answer, entry.response_type)


async def read_entries(transport: Transport, run_id: str) -> list[RecordedEntry]:
    """All entries of a recording. NotFound."""
    found: list[RecordedEntry] = []
    after: int | None = 0
    while after is not None:
        target = ROUTES["list_recorded"].url(sandbox_id=run_id) + query_string({"after": after})
        page = parse(RecordedEntries, await transport.json("GET", target))
        found += page.items
        after = page.next
    return found
