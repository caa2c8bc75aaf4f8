"""The route table of the native wire protocol, shared by server, client and docs, and its headers and frames. Its rows
are in rows.py and node_rows.py.

Bodies are JSON unless a row says "raw". A response that is not 2xx is `RockError.to_wire()`. Every mutating request may
have an `Idempotency-Key`; the same key gets the same response. API keys are sent as `Authorization: Bearer KEY`; the
access right that a row requires is its `access`.

Wait times (`wait`) are seconds: the server responds as soon as there is a result, at the latest after that time.

Streams (`?stream=1`) are frames: one byte of kind, four bytes of big-endian length, the payload. Kinds: see `Frame`.
The files of a sandbox are transferred between admin and rocklet in the same way: STDOUT frames with the tar, and one
RESULT frame, an ArchivedFiles at the end of `node_pack`, a NodeFiles at the beginning of `node_unpack`.

`env_frames` takes and returns frames as guest/environments/frames.py defines them, values as in
guest/environments/values.py, both without JSON where there are arrays. A response has the id of its request; the
payload of an ERROR is `to_wire`.

The terminal is a WebSocket: binary messages are bytes of the terminal in both directions; text messages are JSON: from
the client {"resize": [rows, columns]}, from the server {"exit": code} as the last one, or {"error": ...} as in
`to_wire`.

A tunnel to a port is a WebSocket too: binary messages are the connection's bytes in both directions, an empty one is
the end of its direction; it is closed with 1000 once both have ended. The HTTP and WebSocket rows of ports return the
response of the program, unless the header X-ROCK-Error has the code of a ROCK error.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Literal

from rock.protocol.node_rows import node_rows
from rock.protocol.route import Route
from rock.protocol.rows import ENDPOINT, control_rows, data_rows, gateway_rows

IDEMPOTENCY_KEY = "idempotency-key"
STREAM_TYPE = "application/x-rock-stream"
FRAMES_TYPE = "application/x-rock-frames"
ERROR_CODE = "x-rock-error"  # on every ROCK error: distinguishes it from the response of a program inside
ANSWER_WITHIN = "x-rock-timeout"  # seconds that a program behind a port has for the head of its response; 120
EPOCH = "x-rock-epoch"  # on commands to a rocklet that joined: NAME/EPOCH, as the sender knows it
FENCE = "x-rock-fence"  # on commands to a rocklet: the fencing token of the lease of the sender
OTHER_KEY = "x-rock-api-key"  # the API key, for requests whose Authorization is meant for a program inside
RESUMES = {"resumes": True}  # details of an Unavailable: a retry with its key resumes the request
UNSENT = {"unsent": True}  # details of an Unavailable: there was no connection, and no data was sent
# the connection broke: the request may have begun; a retry with its key joins it or gets its response
SENT = {"sent": True}
OUTAGE = {"outage": True}  # a dependency of the server is unreachable for a while; the request was not begun
REFUSED = {"refused": True}  # rejected by a worker with another lease or epoch; the request was not begun
NOTHING_BEGUN = (*UNSENT, *OUTAGE)  # the request may be sent elsewhere
LOST_CONTACT = (*SENT, *RESUMES, *NOTHING_BEGUN)  # the same request may succeed a moment later
CALL = "x-rock-call"  # on relayed requests: the id by which the server cancels one whose client has left
HANDED_ON = "x-rock-handed-on"  # set by a server of the other role, so that a request is forwarded only once
LOG_START, LOG_NEXT, LOG_RUNNING = "x-rock-start", "x-rock-next", "x-rock-running"

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Frame(IntEnum):
    """Kinds of frames of a stream."""

    STDOUT = 1
    STDERR = 2
    RESULT = 3  # JSON: CommandResponse or BashObservation, without the output that was streamed
    ERROR = 4  # JSON: RockError.to_wire()


_HEAD = struct.Struct(">BI")


def pack_frame(kind: Frame, payload: bytes) -> bytes:
    return _HEAD.pack(kind, len(payload)) + payload


class FrameParser:
    """Parses bytes in any portions to complete frames. `limit`: largest payload in bytes; ValueError beyond it."""

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
    route.name: route for rows in (control_rows, gateway_rows, data_rows, node_rows) for route in rows()
}


def name_of(method: str, path: str) -> str:
    """The name of the row that matches a request; "" when there is none. Not for the hot path: it tries each row."""
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


# ---- server roles ----
#
# The role that serves a request follows from its method and path alone. A writer creates, stops, archives and deletes;
# a reader serves all requests into a sandbox, at its worker. Both serve requests that only read records, and both
# accept heartbeats, so that workers stay available while one role is down.

Role = Literal["write", "read"]

FRAMES_OFFERED = "x-rock-frames"  # 1 in HTTP responses of a server that upgrades connections
DIRECT = "x-rock-direct"  # the proof of a worker, in responses to direct requests
PREFIX = "/v1/sandboxes/"
PAGE = "/ui"  # the web page; the API below it accepts its sessions
PAGE_API = PAGE + "/v1/"
BUILD = ROUTES["build_image"].path
CONNECTION = ROUTES["connection"].path
_CALLS = ROUTES["cancel_call"].path.partition("{")[0]
_CONTROL = {"stop", "pause", "resume", "restart", "archive", "commit", "connections", "checkpoint", "rollback", "fork",
            "forkable", "direct"}
_ROCK, _GEM, _TRAINING = "/apis/envs/sandbox/v1/", "/apis/v1/envs/gem/", "/apis/training/"
_E2B, _E2B_WRITES = "/e2b/", ("v2/sandboxes", "sandboxes", "templates", "v2/templates", "v3/templates")
_ROCK_WRITES = {"start", "start_async", "stop", "delete", "restart", "commit"}
_ROCK_EITHER = {"sandboxes/batch"}
_DIALECTS = ("/mcp", "/openenv/", "/agentscope/")  # dialects that create sandboxes
_SWEREX = "/swerex/"


def is_data(path: str) -> bool:
    """Whether a path belongs to the data plane: a path below a sandbox that is not the admin's, or a build."""
    if path == BUILD:
        return True
    if not path.startswith(PREFIX):
        return False
    _, _, rest = path[len(PREFIX) :].partition("/")
    return bool(rest) and rest not in _CONTROL


def role_for(method: str, path: str) -> Role | None:
    """The role that serves a request; None is any. A WebSocket's method is GET."""
    path = path.removeprefix(PAGE) if path.startswith(PAGE_API) else path
    if is_data(path):
        return "read"
    if path.startswith(_ROCK):
        return _of_rock(method, path.removeprefix(_ROCK))
    if path.startswith(_E2B):
        return _of_e2b(method, path.removeprefix(_E2B))
    if path == "/files":
        return "read"  # a signed URL of E2B
    if path.startswith(_GEM):
        return "write" if path.endswith("/make") else "read"
    if path.startswith(_SWEREX):
        return "read"
    if path.startswith((_TRAINING, "/env/", "/v1/envs", *_DIALECTS)):
        return "write"  # they may create a sandbox, or read the writer's catalog
    if path.startswith((ENDPOINT + "/", "/v1/runs", "/v1/gateway/")):
        return "write"  # the gateway is in the process of the writer
    if path.startswith(_CALLS):
        return None
    if path == "/v1/workers" or (path.startswith("/v1/workers/") and path.endswith("/beat")):
        return None
    return None if method in ("GET", "HEAD", "OPTIONS") else "write"


def _of_e2b(method: str, rest: str) -> Role | None:
    """A request of the E2B dialect: changes of sandboxes are for the writer, requests into them for the reader."""
    if method in ("GET", "HEAD", "OPTIONS") and rest not in ("files", "contexts"):
        return None
    return "write" if rest.startswith(_E2B_WRITES) else "read"


def _of_rock(method: str, rest: str) -> Role | None:
    if rest.startswith("sandboxes/") and rest.count("/") >= 2:
        last = rest.rpartition("/")[2]
        return "write" if method == "POST" and rest.count("/") == 2 and last in ("restart", "archive") else "read"
    if method == "POST":
        return "write" if rest in _ROCK_WRITES else None if rest in _ROCK_EITHER else "read"
    known = ("get_status", "is_alive", "get_sandbox_statistics", "sandboxes", "get_token")
    return None if rest in known or rest.startswith("commit/") else "read"
