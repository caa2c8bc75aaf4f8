"""One table of the native wire, for server, client and docs. Its rows are in rows.py.

Bodies are JSON unless a row says "raw". An answer that is not 2xx is `RockError.to_wire()`. Every mutating call may
carry `Idempotency-Key`; the same key gets the same answer. API keys travel as `Authorization: Bearer KEY`; what a row
takes of them is its `access`.

Times to wait (`wait`) are seconds: the server answers as soon as there is something to say, at the latest then.

Streams (`?stream=1`) are frames: one byte of kind, four bytes of big-endian length, the payload. Kinds: see `Frame`.
The files of a sandbox travel between admin and rocklet so too: STDOUT frames with the tar, and one RESULT frame, an
ArchivedFiles at the end of `node_pack`, a NodeFiles at the beginning of `node_unpack`.

`env_frames` takes and answers frames as guest/environments/frames.py has them, values as in
guest/environments/values.py, both without JSON where
there are arrays. An answer has the id of its request; the payload of an ERROR is `to_wire`.

The terminal is a WebSocket: binary messages are bytes of the terminal both ways; text messages are JSON: from the
client {"resize": [rows, columns]}, from the server {"exit": code} as the last one, or {"error": ...} as in `to_wire`.

A tunnel to a port is a WebSocket too: binary messages are the connection's bytes both ways, an empty one is the end of
its direction; it is closed with 1000 once both have ended. What the HTTP and WebSocket rows of ports answer is the
program's own, except where a header X-ROCK-Error has the code of an error of ours.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Literal

from rock.protocol.route import Route
from rock.protocol.rows import control_rows, data_rows, node_rows

IDEMPOTENCY_KEY = "idempotency-key"
STREAM_TYPE = "application/x-rock-stream"
FRAMES_TYPE = "application/x-rock-frames"
ERROR_CODE = "x-rock-error"  # on every error of ours: what tells it from the answer of a program inside
ANSWER_WITHIN = "x-rock-timeout"  # seconds that a program behind a port has for the head of its answer; 120
EPOCH = "x-rock-epoch"  # on commands to a rocklet that joined: NAME/EPOCH, as whoever commands it knows it
FENCE = "x-rock-fence"  # on commands to a rocklet: the token of the lease by which they are given
OTHER_KEY = "x-rock-api-key"  # the key, for requests whose Authorization is meant for a program inside
RESUMES = {"resumes": True}  # in the details of an Unavailable: asked again with its key, the request goes on
UNSENT = {"unsent": True}  # in the details of an Unavailable: no connection was had, and nothing was sent
SENT = {"sent": True}  # the connection broke: the request may have been begun; its key joins it or gets its answer
OUTAGE = {"outage": True}  # something behind the server is not reached for a while; nothing was begun
REFUSED = {"refused": True}  # by a worker whose lease or epoch is another one: nothing was begun
NOTHING_BEGUN = (*UNSENT, *OUTAGE)  # the call may be sent elsewhere
LOST_CONTACT = (*SENT, *RESUMES, *NOTHING_BEGUN)  # the same call may succeed a moment later
CALL = "x-rock-call"  # on relayed requests: the id by which the server cancels one whose client has left
HANDED_ON = "x-rock-handed-on"  # by a server of the other role: once is enough
LOG_START, LOG_NEXT, LOG_RUNNING = "x-rock-start", "x-rock-next", "x-rock-running"

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Frame(IntEnum):
    """Kind of a frame of a stream."""

    STDOUT = 1
    STDERR = 2
    RESULT = 3  # JSON: CommandResponse or BashObservation, without the output that was streamed
    ERROR = 4  # JSON: RockError.to_wire()


_HEAD = struct.Struct(">BI")


def pack_frame(kind: Frame, payload: bytes) -> bytes:
    return _HEAD.pack(kind, len(payload)) + payload


class FrameParser:
    """Bytes in any portions -> whole frames. `limit`: largest payload accepted, in bytes; ValueError beyond it."""

    def __init__(self, limit: int = 64 << 20) -> None:
        self._buffer = bytearray()
        self._limit = limit

    def feed(self, data: bytes) -> Iterator[tuple[Frame, bytes]]:
        self._buffer += data
        while len(self._buffer) >= _HEAD.size:
            kind, length = _HEAD.unpack_from(self._buffer)
            if length > self._limit:
                raise ValueError(f"a frame of {length} bytes is over the limit of {self._limit}")
            end = _HEAD.size + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[_HEAD.size : end])
            del self._buffer[:end]
            yield Frame(kind), payload


ROUTES: dict[str, Route] = {
    route.name: route for rows in (control_rows, data_rows, node_rows) for route in rows()
}


def name_of(method: str, path: str) -> str:
    """The name of the row that a request is of; "" when there is none. Not for the hot path: it looks at each."""
    given = path.split("/")
    for route in ROUTES.values():
        parts = route.path.split("/")
        have = given
        if route.tail:
            parts, have = parts[:-1], given[: len(parts) - 1]
        fits = len(parts) == len(have) and route.method in (method, "ANY")
        if fits and all(part == value or part[:1] == "{" for part, value in zip(parts, have, strict=True)):
            return route.name
    return ""


# ---- planes ----
#
# Which requests a writer serves, which a reader, and which both: by method and path, before anything else is known.
#
# A writer makes, stops, keeps and forgets; a reader serves everything inside a sandbox, at the worker that has it. What
# only looks at records both do, and both take heartbeats, so that workers stay while one of them is away.

Role = Literal["write", "read"]

PREFIX = "/v1/sandboxes/"
BUILD = ROUTES["build_image"].path
_CALLS = ROUTES["cancel_call"].path.partition("{")[0]
_CONTROL = {"stop", "restart", "archive", "commit", "connections"}
_ROCK, _GEM, _TRAINING = "/apis/envs/sandbox/v1/", "/apis/v1/envs/gem/", "/apis/training/"
_ROCK_WRITES = {"start", "start_async", "stop", "delete", "restart", "commit"}
_ROCK_EITHER = {"sandboxes/batch"}


def is_data(path: str) -> bool:
    """Whether a path belongs to the data plane: something below a sandbox that is not the admin's, or a build."""
    if path == BUILD:
        return True
    if not path.startswith(PREFIX):
        return False
    _, _, rest = path[len(PREFIX) :].partition("/")
    return bool(rest) and rest not in _CONTROL


def role_for(method: str, path: str) -> Role | None:
    """Who serves a request; None is anybody. A WebSocket's method is GET."""
    if is_data(path):
        return "read"
    if path.startswith(_ROCK):
        return _of_rock(method, path.removeprefix(_ROCK))
    if path.startswith(_GEM):
        return "write" if path.endswith("/make") else "read"
    if path.startswith((_TRAINING, "/env/", "/v1/envs")):
        return "write"  # they may make a sandbox, or ask the writer's catalogue
    if path.startswith(_CALLS):
        return None
    if path == "/v1/workers" or (path.startswith("/v1/workers/") and path.endswith("/beat")):
        return None
    return None if method in ("GET", "HEAD", "OPTIONS") else "write"


def _of_rock(method: str, rest: str) -> Role | None:
    if rest.startswith("sandboxes/") and rest.count("/") >= 2:
        last = rest.rpartition("/")[2]
        return "write" if method == "POST" and rest.count("/") == 2 and last in ("restart", "archive") else "read"
    if method == "POST":
        return "write" if rest in _ROCK_WRITES else None if rest in _ROCK_EITHER else "read"
    known = ("get_status", "is_alive", "get_sandbox_statistics", "sandboxes", "get_token")
    return None if rest in known or rest.startswith("commit/") else "read"
