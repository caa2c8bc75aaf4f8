"""Recordings of sandboxes on the wire: every request that changed a sandbox, with its response (decision 58)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import orjson
from pydantic import Field

from rock.protocol.action import Answer
from rock.protocol.routes import PREFIX, STREAM_TYPE, Frame, FrameParser
from rock.protocol.sandbox import SandboxConfig
from rock.protocol.wire import Wire

MOST_ENTRIES = 100_000  # of one recording
MOST_BYTES = 256 << 20  # of one recording, requests and responses
LARGEST_REQUEST = 1 << 20
LARGEST_RESPONSE = 256 << 10
PAGE = 100  # entries of one response

# Requests of the data plane that change a sandbox, and are sent again by a replay.
REPLAYED = frozenset({
    "create_session", "close_session", "run", "interrupt", "session_input", "resize", "execute", "start_process",
    "signal_process", "process_stdin", "forget_process", "write_file", "remove_file", "make_dir", "move_file", "chmod",
    "chown", "upload_dir", "make_env", "reset_env", "step_env", "call_env", "fork_env", "env_frames", "close_env",
})  # fmt: skip
# Requests whose responses are recorded for clients that repeat their calls; a replay does not send them.
READS = frozenset({"read_file", "stat_file", "list_files", "list_sessions"})
# Connections whose content is not recorded; the entry states that there was one.
OPAQUE = frozenset({"terminal", "port", "port_socket", "tunnel"})
CHECKPOINT, ROLLBACK = "checkpoint_sandbox", "rollback_sandbox"


class RecordedEntry(Answer):
    """A request and its response.

    number: from 1, in the order in which the requests began. route: name in the route table. target: path and query.
    finished_at: None if the response is unknown. request, response: base64; None if they were larger than the limit.
    request_bytes, response_bytes: their sizes. snapshot: of a checkpoint or a rollback. exact: of a checkpoint, whether
    no request was in progress, so that the snapshot has the effects of all entries before it and of no later one.
    memory: the level of the snapshot.
    """

    number: int
    at: float
    finished_at: float | None = None
    route: str
    method: str = ""
    target: str = ""
    request: str | None = None
    request_type: str = ""
    request_bytes: int = 0
    status: int | None = None
    response: str | None = None
    response_type: str = ""
    response_bytes: int = 0
    snapshot: str | None = None
    exact: bool = False
    memory: str = ""

    @property
    def complete(self) -> bool:
        """Whether it can be sent again."""
        return self.request is not None


class RecordingInfo(Answer):
    """The recording of a sandbox. full: it reached its limit, and later requests are not in it. source: the
    sandbox of the snapshot from which this one started. repeats,
    repeated: the recording that answers its clients, and how many entries have. diverged_at: entry of `repeats` that
    a client did not repeat; the requests from there on are executed."""

    sandbox_id: str
    config: SandboxConfig
    state: str = ""
    entries: int = 0
    bytes: int = 0
    full: bool = False
    source: str | None = None
    repeats: str | None = None
    repeated: int = 0
    diverged_at: int | None = None


class RecordedEntries(Answer):
    """Entries in order. next: pass it as `after`; None at the end."""

    items: list[RecordedEntry]
    next: int | None = None


class RepeatRecording(Wire):
    """Answer the clients of a sandbox with the entries of a recording, as long as they repeat its requests in order."""

    source: str = Field(min_length=1, max_length=128)


class Start(Wire):
    """Where a replay begins. snapshot: None is the image. skip: entries whose effects the snapshot has."""

    snapshot: str | None = None
    skip: int = 0
    kind: Literal["image", "snapshot"] = "image"


def effective(entries: Sequence[RecordedEntry]) -> list[RecordedEntry]:
    """The entries whose effects the sandbox has at the end: without those that a rollback undid. ValueError for a
    rollback to a snapshot that is not of this recording."""
    kept: list[RecordedEntry] = []
    prefixes: dict[str, list[RecordedEntry]] = {}
    for entry in entries:
        if entry.route == ROLLBACK and entry.status == 200:
            if entry.snapshot not in prefixes:
                raise ValueError(f"entry {entry.number} is a rollback to snapshot {entry.snapshot} of another sandbox")
            kept = list(prefixes[entry.snapshot])
        elif entry.route == CHECKPOINT and entry.snapshot is not None:
            kept.append(entry)
            prefixes[entry.snapshot] = list(kept)
        else:
            kept.append(entry)
    return kept


def starts(entries: Sequence[RecordedEntry]) -> list[Start]:
    """The places at which a replay of effective entries can begin, the nearest to the end first."""
    found = [Start(snapshot=entry.snapshot, skip=place + 1, kind="snapshot") for place, entry in enumerate(entries)
             if entry.route == CHECKPOINT and entry.exact and entry.memory in ("session", "processes")]  # fmt: skip
    return [*reversed(found), Start()]


def without_id(target: str) -> str:
    """The part of a target behind the id of the sandbox."""
    return target.removeprefix(PREFIX).partition("/")[2]


def replay_key(sandbox_id: str, number: int) -> str:
    """The idempotency key with which a replay sends an entry."""
    return f"replay {sandbox_id} {number}"


_OWNED = ("make_env", "fork_env")


def canonical(route: str, request: bytes) -> bytes:
    """A request without the id of the client process that sent it. A replayed environment has no lease."""
    if route not in _OWNED:
        return request
    try:
        body = orjson.loads(request)
    except ValueError:
        return request
    if not isinstance(body, dict):
        return request
    body.pop("owner", None)
    return orjson.dumps(body, option=orjson.OPT_SORT_KEYS)


_COMPARED = {
    "run": ("output", "stderr", "exit_code", "timed_out", "interrupted", "session_closed"),
    "execute": ("stdout", "stderr", "exit_code", "signal", "timed_out"),
    "reset_env": ("observation", "info"),
    "step_env": ("observation", "reward", "terminated", "truncated", "info"),
    "call_env": ("result",),
}


def outcome(route: str, status: int | None, response: bytes | None, response_type: str = "") -> object:
    """What two executions of a request have in common if they did the same. Times and ids are not in it."""
    if response is None or status != 200:
        return status
    if STREAM_TYPE in response_type:
        return status, _streamed(route, response)
    if route == "env_frames":
        return status, response
    names = _COMPARED.get(route, ())
    try:
        body = orjson.loads(response) if names else {}
    except ValueError:
        return status, response
    return status, tuple(body.get(name) for name in names) if isinstance(body, dict) else response


def _streamed(route: str, response: bytes) -> object:
    """The output of a stream in one piece, and its result."""
    parts: dict[Frame, bytes] = {}
    result: object = None
    try:
        for kind, payload in FrameParser().feed(response):
            if kind in (Frame.STDOUT, Frame.STDERR):
                parts[kind] = parts.get(kind, b"") + payload
            elif kind is Frame.RESULT:
                result = orjson.loads(payload).get("exit_code")
            else:
                result = orjson.loads(payload).get("error", {}).get("code")
    except (ValueError, AttributeError):
        return response
    return sorted(parts.items()), result
