"""Rows of the route table: the control plane (admin), the data plane (proxy to rocklet) and the node plane."""

from __future__ import annotations

from collections.abc import Iterator

from rock.protocol.keys import Access
from rock.protocol.route import SANDBOX as _S
from rock.protocol.route import Route, row


def control_rows() -> Iterator[Route]:
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
    yield row("stop_sandbox", "POST", _S + "/stop", "control", "Stop; its record stays", "", "SandboxInfo")
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
    # workers
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


# ---- data plane ----
#
# Requests through the proxy to the rocklet: into sandboxes, and builds.

def data_rows() -> Iterator[Route]:
    # sessions
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
    # programs
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
    # ports
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
    # files
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
    # environments
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
    yield row(
        "renew_envs", "POST", _S + "/envs/owners/{owner}", "data", "Renew the lease of a client's environments", "",
        "EnvOwner",
    )  # fmt: skip
    yield row(
        "release_envs", "DELETE", _S + "/envs/owners/{owner}", "data", "Close a client's environments", "", "EnvOwner"
    )
    yield row("close_env", "DELETE", _S + "/envs/{env}", "data", "End its process", "", "EnvInfo")
    # images
    yield row(
        "build_image",
        "POST",
        "/v1/images/build",
        "data",
        "Build a Dockerfile: a RESULT frame with a BuildRequest, then the tar of its context in STDOUT frames",
        "frames",
        "frames (BuiltImage)",
    )


# ---- node plane ----
#
# Requests of an admin to a rocklet.

def node_rows() -> Iterator[Route]:
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
    yield row(
        "cancel_call",
        "DELETE",
        "/node/v1/calls/{call}",
        "node",
        "The client of a relayed request has left: what it asked for ends",
    )
