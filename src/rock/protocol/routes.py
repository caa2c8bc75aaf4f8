"""One table of the native wire, for server, client and docs.

Bodies are JSON unless a row says "raw". An answer that is not 2xx is `RockError.to_wire()`. Every mutating call may
carry `Idempotency-Key`; the same key gets the same answer. API keys travel as `Authorization: Bearer KEY`; what a row
takes of them is its `access`.

Times to wait (`wait`) are seconds: the server answers as soon as there is something to say, at the latest then.

Streams (`?stream=1`) are frames: one byte of kind, four bytes of big-endian length, the payload. Kinds: see `Frame`.
The files of a sandbox travel between admin and rocklet so too: STDOUT frames with the tar, and one RESULT frame, an
ArchivedFiles at the end of `node_pack`, a NodeFiles at the beginning of `node_unpack`.

`env_frames` takes and answers frames as guest/frames.py has them, values as in guest/values.py, both without JSON where
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
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal
from urllib.parse import quote

from rock.protocol.keys import Access

IDEMPOTENCY_KEY = "idempotency-key"
STREAM_TYPE = "application/x-rock-stream"
FRAMES_TYPE = "application/x-rock-frames"
ERROR_CODE = "x-rock-error"  # on every error of ours: what tells it from the answer of a program inside
ANSWER_WITHIN = "x-rock-timeout"  # seconds that a program behind a port has for the head of its answer; 120
EPOCH = "x-rock-epoch"  # on commands to a rocklet that joined: NAME/EPOCH, as whoever commands it knows it
FENCE = "x-rock-fence"  # on commands to a rocklet: the token of the lease by which they are given
OTHER_KEY = "x-rock-api-key"  # the key, for requests whose Authorization is meant for a program inside
RESUMES = {"resumes": True}  # in the details of an Unavailable: asked again with its key, the request goes on
LOG_START, LOG_NEXT, LOG_RUNNING = "x-rock-start", "x-rock-next", "x-rock-running"

Plane = Literal["control", "data", "node"]


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


@dataclass(frozen=True)
class Route:
    """A row: `plane` control is the admin's, data goes through the proxy to the rocklet, node is admin to rocklet.

    method: ANY is each of METHODS. tail: the last variable is the whole rest of the path, which may be missing.
    access: what a key has to have for it; nobody but the server's owner has all, so what is forgotten is closed.
    """

    name: str
    method: str
    path: str
    plane: Plane
    summary: str
    request: str = ""  # model, or raw, or query names
    answer: str = ""
    mutates: bool = False
    tail: bool = False
    access: Access = Access.ADMIN

    def url(self, **values: str) -> str:
        """The path with its variables filled in and percent-encoded."""
        return self.path.format(**{k: quote(v, safe="") for k, v in values.items()})


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_S = "/v1/sandboxes/{sandbox_id}"
_ACCESS = {  # of rows whose plane and method do not tell
    "health": Access.OPEN,
    "metrics": Access.ADMIN,
    "commit_sandbox": Access.IMAGES,
    "add_env": Access.IMAGES,
    "build_env": Access.IMAGES,
    "build_image": Access.IMAGES,
    "create_key": Access.ADMIN,
    "list_keys": Access.ADMIN,
    "revoke_key": Access.ADMIN,
    "join_worker": Access.WORKER,
    "beat_worker": Access.WORKER,
    "list_workers": Access.ADMIN,
    "drain_worker": Access.ADMIN,
    "undrain_worker": Access.ADMIN,
    "remove_worker": Access.ADMIN,
}


def _access(name: str, method: str, plane: Plane) -> Access:
    if name in _ACCESS or plane == "node":
        return _ACCESS.get(name, Access.ADMIN)
    if method == "GET":
        return Access.READ
    return Access.RUN if plane == "data" else Access.CREATE


def _rows() -> Iterator[Route]:
    def row(
        name: str, method: str, path: str, plane: Plane, summary: str, request: str = "", answer: str = ""
    ) -> Route:
        mutates = method in ("POST", "PUT", "DELETE")
        access = _access(name, method, plane)
        return Route(name, method, path, plane, summary, request, answer, mutates, access=access)

    # control plane
    yield row(
        "create_sandbox",
        "POST",
        "/v1/sandboxes",
        "control",
        "Create; ?wait= until it runs or failed",
        "SandboxConfig ?wait",
        "SandboxInfo",
    )
    yield row(
        "list_sandboxes",
        "GET",
        "/v1/sandboxes",
        "control",
        "List, newest first",
        "?state ?user_id ?experiment_id ?namespace ?image ?label=k=v ?limit ?after ?history",
        "SandboxList",
    )
    yield row(
        "get_sandbox",
        "GET",
        _S,
        "control",
        "Status; ?wait= while pending; ?touch=1 counts as activity",
        "?wait ?touch ?usage",
        "SandboxInfo",
    )
    yield row("stop_sandbox", "POST", _S + "/stop", "control", "Stop; leaves a tombstone", "", "SandboxInfo")
    yield row(
        "restart_sandbox",
        "POST",
        _S + "/restart",
        "control",
        "Start a stopped or archived one again over its kept files; ?wait= until it runs or failed",
        "?wait",
        "SandboxInfo",
    )
    yield row(
        "archive_sandbox",
        "POST",
        _S + "/archive",
        "control",
        "Bring the kept files of a stopped one to the archive; ?wait= until they are there or that failed",
        "?wait",
        "SandboxInfo",
    )
    yield row(
        "commit_sandbox",
        "POST",
        _S + "/commit",
        "control",
        "Begin to make an image of a running one, or of one whose files are kept; ?wait= until that is over",
        "CommitRequest ?wait",
        "CommitStatus",
    )
    yield row(
        "get_commit",
        "GET",
        _S + "/commit",
        "control",
        "What became of the last image that was made of it; ?wait= while it is under way",
        "?wait",
        "CommitStatus",
    )
    yield row(
        "list_connections",
        "GET",
        _S + "/connections",
        "control",
        "What it connected to or tried to, oldest first; of a stopped one too",
        "",
        "ConnectionList",
    )
    yield row(
        "delete_sandbox",
        "DELETE",
        _S,
        "control",
        "Forget a stopped or archived one and its kept files; ?force=1 stops it first",
        "?force",
        "SandboxInfo",
    )
    yield row("create_group", "POST", "/v1/groups", "control",
              "Create many, all or as many as fit; ?wait= until they run or failed", "GroupRequest ?wait", "GroupInfo")
    yield row("get_group", "GET", "/v1/groups/{group_id}", "control", "Its sandboxes; ?wait= while some are pending",
              "?wait", "GroupInfo")
    yield row("stop_group", "POST", "/v1/groups/{group_id}/stop", "control", "Stop all of it", "", "GroupInfo")
    yield row(
        "open_env",
        "POST",
        "/v1/envs",
        "control",
        "A sandbox that hosts this environment; made when there is none",
        "OpenEnv ?wait",
        "SandboxInfo",
    )
    yield row("list_envs", "GET", "/v1/envs", "control", "Environments that can be made", "", "EnvList")
    yield row("about_env", "GET", "/v1/envs/about", "control", "What is known of an environment", "?id", "EnvAbout")
    yield row("add_env", "POST", "/v1/envs/add", "control", "Register one under a name", "AddEnv", "EnvAbout")
    yield row(
        "build_env", "POST", "/v1/envs/build", "control", "Install what it needs; waits", "BuildEnv ?wait", "EnvAbout"
    )
    yield row("server_info", "GET", "/v1/server", "control", "Version, isolation, capacity", "", "ServerInfo")
    yield row("health", "GET", "/healthz", "control", "Answers while the server serves")
    yield row("metrics", "GET", "/metrics", "control", "Metrics of this process, for Prometheus", "", "text")
    yield row("create_key", "POST", "/v1/keys", "control", "Make an API key, which is told once", "CreateKey", "NewKey")
    yield row("list_keys", "GET", "/v1/keys", "control", "API keys, without what they are made of", "", "KeyList")
    yield row("revoke_key", "DELETE", "/v1/keys/{key_id}", "control", "End a key; its sandboxes stay", "", "KeyInfo")
    # control plane: workers
    w = "/v1/workers/{worker}"
    yield row("join_worker", "POST", "/v1/workers", "control", "A rocklet joins", "JoinWorker", "WorkerLease")
    yield row("beat_worker", "POST", w + "/beat", "control", "Its heartbeat", "Beat", "WorkerLease")
    yield row("list_workers", "GET", "/v1/workers", "control", "Workers, lost ones too", "", "WorkerList")
    yield row("drain_worker", "POST", w + "/drain", "control", "It gets no more sandboxes", "", "WorkerInfo")
    yield row("undrain_worker", "POST", w + "/undrain", "control", "It gets sandboxes again", "", "WorkerInfo")
    yield row(
        "remove_worker",
        "DELETE",
        w,
        "control",
        "Forget a lost one; ?force=1 takes it for lost first: its sandboxes are over",
        "?force",
        "WorkerInfo",
    )
    # data plane: sessions
    yield row(
        "create_session",
        "POST",
        _S + "/sessions",
        "data",
        "Open a session",
        "CreateBashSessionRequest",
        "CreateBashSessionResponse",
    )
    yield row("list_sessions", "GET", _S + "/sessions", "data", "Open sessions", "", "SessionList")
    yield row(
        "close_session",
        "DELETE",
        _S + "/sessions/{session}",
        "data",
        "Close; kills what runs in it",
        "",
        "CloseBashSessionResponse",
    )
    yield row(
        "run",
        "POST",
        _S + "/sessions/{session}/run",
        "data",
        "Run a command; ?stream=1 for frames",
        "BashAction ?stream",
        "BashObservation",
    )
    yield row("interrupt", "POST", _S + "/sessions/{session}/interrupt", "data", "Ctrl-C", "", "SessionInfo")
    yield row(
        "session_input",
        "POST",
        _S + "/sessions/{session}/input",
        "data",
        "Type into a session with a pty",
        "raw",
        "SessionInfo",
    )
    yield row(
        "resize",
        "POST",
        _S + "/sessions/{session}/resize",
        "data",
        "Size of its terminal",
        '{"rows", "columns"}',
        "SessionInfo",
    )
    # data plane: programs
    yield row(
        "execute",
        "POST",
        _S + "/execute",
        "data",
        "Run one program to its end; ?stream=1 for frames",
        "Command ?stream",
        "CommandResponse",
    )
    yield row("start_process", "POST", _S + "/processes", "data", "Start in the background", "Command", "ProcessInfo")
    yield row("list_processes", "GET", _S + "/processes", "data", "Background processes", "", "ProcessList")
    yield row(
        "get_process",
        "GET",
        _S + "/processes/{process_id}",
        "data",
        "Status; ?wait= for its end",
        "?wait",
        "ProcessInfo",
    )
    yield row(
        "process_logs",
        "GET",
        _S + "/processes/{process_id}/logs",
        "data",
        "Bytes of a log from an offset; ?wait= for more when there is none",
        "?stream=stdout|stderr ?offset ?limit ?wait",
        "raw",
    )
    yield row(
        "signal_process",
        "POST",
        _S + "/processes/{process_id}/signal",
        "data",
        "Send a signal",
        '{"signal": 15, "tree": true}',
        "ProcessInfo",
    )
    yield row(
        "process_stdin",
        "POST",
        _S + "/processes/{process_id}/stdin",
        "data",
        "Write to its standard input; ?close=1 ends it",
        "raw ?close",
        "ProcessInfo",
    )
    yield row(
        "forget_process",
        "DELETE",
        _S + "/processes/{process_id}",
        "data",
        "Kill if it runs; drop its logs",
        "",
        "ProcessInfo",
    )
    yield row(
        "terminal",
        "WEBSOCKET",
        _S + "/terminal",
        "data",
        "An interactive program on a pty",
        "?rows ?columns ?command ?user ?cwd ?term",
    )
    # data plane: ports
    yield Route(
        "port",
        "ANY",
        _S + "/ports/{port}/{rest}",
        "data",
        "HTTP to a TCP port inside, streamed both ways",
        "raw",
        "raw",
        tail=True,
        access=Access.RUN,
    )
    yield Route(
        "port_socket", "WEBSOCKET", _S + "/ports/{port}/{rest}", "data", "A WebSocket of a port inside", tail=True,
        access=Access.RUN,
    )  # fmt: skip
    yield row("tunnel", "WEBSOCKET", _S + "/tcp/{port}", "data", "A connection to a TCP port inside")
    # data plane: files
    yield row(
        "read_file", "GET", _S + "/files/content", "data", "Bytes of a file", "?path ?offset ?length ?user", "raw"
    )
    yield row(
        "write_file",
        "PUT",
        _S + "/files/content",
        "data",
        "Replace at once, or append",
        "raw ?path ?append ?mode ?user",
        "FileInfo",
    )
    yield row("stat_file", "GET", _S + "/files/stat", "data", "One file", "?path ?follow", "FileInfo")
    yield row("list_files", "GET", _S + "/files/list", "data", "A folder", "?path ?offset ?limit", "FileList")
    yield row("remove_file", "DELETE", _S + "/files", "data", "Remove", "?path ?recursive")
    yield row("make_dir", "POST", _S + "/files/dir", "data", "Make a folder", '{"path", "parents", "mode"}', "FileInfo")
    yield row("move_file", "POST", _S + "/files/move", "data", "Rename", '{"source", "target"}', "FileInfo")
    yield row("chmod", "POST", _S + "/files/chmod", "data", "Change modes", "ChmodRequest", "ChmodResponse")
    yield row("chown", "POST", _S + "/files/chown", "data", "Change owners", "ChownRequest", "ChownResponse")
    yield row("download_dir", "GET", _S + "/files/archive", "data", "A folder or file as tar", "?path", "raw")
    yield row("upload_dir", "PUT", _S + "/files/archive", "data", "Unpack a tar into a folder", "raw ?path", "FileInfo")
    # data plane: environments
    yield row("make_env", "POST", _S + "/envs", "data", "Make an environment in its own process", "MakeEnv", "EnvInfo")
    yield row("reset_env", "POST", _S + "/envs/{env}/reset", "data", "Start an episode", "ResetEnv", "ResetResult")
    yield row("step_env", "POST", _S + "/envs/{env}/step", "data", "One step", "StepEnv", "StepResult")
    yield row("call_env", "POST", _S + "/envs/{env}/call", "data", "Ask for something else", "CallEnv", "CallResult")
    yield row(
        "env_frames",
        "POST",
        _S + "/envs/frames",
        "data",
        "Resets, steps and calls of any number of environments, in binary frames",
        "frames (application/x-rock-frames)",
        "frames",
    )
    yield row("close_env", "DELETE", _S + "/envs/{env}", "data", "End its process", "", "EnvInfo")
    # data plane: images
    yield row(
        "build_image",
        "POST",
        "/v1/images/build",
        "data",
        "Build a Dockerfile: a RESULT frame with a BuildRequest, then the tar of its context in STDOUT frames",
        "frames",
        "frames (BuiltImage)",
    )
    # node plane
    yield row(
        "node_create",
        "PUT",
        "/node/v1/sandboxes/{sandbox_id}",
        "node",
        "Make it here",
        "SandboxConfig ?check",
        "NodeSandbox",
    )
    yield row(
        "node_create_many",
        "PUT",
        "/node/v1/sandboxes",
        "node",
        "Make them here: a RESULT frame for each as it is done, or an ERROR frame that has its sandbox_id beside it",
        "NodeCreates",
        "frames (NodeSandbox)",
    )
    yield row("node_list", "GET", "/node/v1/sandboxes", "node", "What is here, with activity", "", "NodeInventory")
    yield row(
        "node_get",
        "GET",
        "/node/v1/sandboxes/{sandbox_id}",
        "node",
        "One of them; ?usage=1 measures",
        "?usage",
        "NodeSandbox",
    )
    yield row("node_destroy", "DELETE", "/node/v1/sandboxes/{sandbox_id}", "node", "Destroy", "?grace", "NodeSandbox")
    yield row(
        "node_connections",
        "GET",
        "/node/v1/sandboxes/{sandbox_id}/connections",
        "node",
        "What one connected to, whether it lives or not",
        "",
        "ConnectionList",
    )
    yield row(
        "node_rest",
        "POST",
        "/node/v1/sandboxes/{sandbox_id}/rest",
        "node",
        "End it and keep its files",
        "?grace",
        "NodeSandbox",
    )
    yield row(
        "node_wake",
        "POST",
        "/node/v1/sandboxes/{sandbox_id}/wake",
        "node",
        "Make it again over its kept files",
        "SandboxConfig",
        "NodeSandbox",
    )
    yield row(
        "node_pack",
        "GET",
        "/node/v1/sandboxes/{sandbox_id}/files",
        "node",
        "The files of one at rest, as a layer",
        "?limit",
        "frames",
    )
    yield row(
        "node_unpack",
        "PUT",
        "/node/v1/sandboxes/{sandbox_id}/files",
        "node",
        "Take in the files of an archived one, to be woken",
        "frames",
        "NodeSandbox",
    )
    yield row(
        "node_commit",
        "POST",
        "/node/v1/sandboxes/{sandbox_id}/commit",
        "node",
        "Make an image of it here, and push that; answers when it is done",
        "NodeCommit",
        "NodeImage",
    )
    yield row(
        "node_image",
        "POST",
        "/node/v1/images",
        "node",
        "An image; may build or pull it",
        "WorkerImage",
        "ImageState",
    )
    yield row("node_status", "GET", "/node/v1/status", "node", "Capacity, isolation, load", "", "NodeStatus")
    yield row(
        "node_events",
        "GET",
        "/node/v1/events",
        "node",
        "Ends of sandboxes since a number; waits for one",
        "?after ?wait",
        "NodeEvents",
    )


ROUTES: dict[str, Route] = {route.name: route for route in _rows()}


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
