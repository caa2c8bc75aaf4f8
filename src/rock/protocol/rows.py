"""Rows of the route table: the control plane (admin), the data plane (proxy to rocklet) and the model gateway."""

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
        "Create a sandbox; ?wait= until it runs or failed",
        "SandboxConfig ?wait",
        "SandboxInfo",
    )
    yield row(
        "list_sandboxes",
        "GET",
        "/v1/sandboxes",
        "control",
        "List sandboxes, newest first",
        "?state ?user_id ?experiment_id ?namespace ?image ?name ?label=k=v ?limit ?after ?history",
        "SandboxList",
    )
    yield row(
        "get_sandbox",
        "GET",
        _S,
        "control",
        "Status of a sandbox; ?wait= while it is pending; ?touch=1 counts as activity",
        "?wait ?touch ?usage",
        "SandboxInfo",
    )
    yield row(
        "update_sandbox",
        "PATCH",
        _S,
        "control",
        "Change the name or the labels of a sandbox",
        "UpdateSandbox",
        "SandboxInfo",
    )
    yield row("stop_sandbox", "POST", _S + "/stop", "control", "Stop a sandbox; its record stays", "", "SandboxInfo")
    yield row(
        "restart_sandbox",
        "POST",
        _S + "/restart",
        "control",
        "Restart a stopped or archived sandbox with its retained files; ?wait= until it runs or failed",
        "?wait",
        "SandboxInfo",
    )
    yield row(
        "pause_sandbox",
        "POST",
        _S + "/pause",
        "control",
        "Stop all processes of a running sandbox until it is resumed; it has no idle timeout meanwhile",
        "",
        "SandboxInfo",
    )
    yield row("checkpoint_sandbox", "POST", _S + "/checkpoint", "control", "Take a snapshot of a running sandbox",
              "CheckpointRequest", "SnapshotInfo")  # fmt: skip
    yield row("rollback_sandbox", "POST", _S + "/rollback", "control", "Return a running sandbox to a snapshot",
              "RollbackRequest", "SandboxInfo")  # fmt: skip
    yield row("direct_access", "GET", _S + "/direct", "control",
              "The address of its worker and a token, for requests of the data plane without the proxy", "",
              "DirectAccess")  # fmt: skip
    yield row("forkable_sandbox", "GET", _S + "/forkable", "control",
              "The level that a checkpoint would have now, and why", "", "Forkable")  # fmt: skip
    yield row("fork_sandbox", "POST", _S + "/fork", "control", "Take a snapshot, and start sandboxes from it",
              "ForkRequest", "ForkResult")  # fmt: skip
    yield row("resume_sandbox", "POST", _S + "/resume", "control", "Continue a paused sandbox", "", "SandboxInfo")
    yield row(
        "archive_sandbox",
        "POST",
        _S + "/archive",
        "control",
        "Upload the retained files of a stopped sandbox to archive storage; ?wait= until that ended",
        "?wait",
        "SandboxInfo",
    )
    yield row(
        "commit_sandbox",
        "POST",
        _S + "/commit",
        "control",
        "Start to make an image of a sandbox that runs or has retained files; ?wait= until that ended",
        "CommitRequest ?wait",
        "CommitStatus",
    )
    yield row(
        "get_commit",
        "GET",
        _S + "/commit",
        "control",
        "Status of the last commit of a sandbox; ?wait= while it is in progress",
        "?wait",
        "CommitStatus",
    )
    yield row(
        "list_connections",
        "GET",
        _S + "/connections",
        "control",
        "Egress log: connections and attempts, oldest first; also of a stopped sandbox",
        "",
        "ConnectionList",
    )
    yield row(
        "delete_sandbox",
        "DELETE",
        _S,
        "control",
        "Delete a stopped or archived sandbox and its retained files; ?force=1 stops it first",
        "?force",
        "SandboxInfo",
    )
    yield row(
        "create_group",
        "POST",
        "/v1/groups",
        "control",
        "Create a group of sandboxes, all or as many as fit; ?wait= until they run or failed",
        "GroupRequest ?wait",
        "GroupInfo",
    )
    yield row(
        "get_group",
        "GET",
        "/v1/groups/{group_id}",
        "control",
        "Sandboxes of a group; ?wait= while some are pending",
        "?wait",
        "GroupInfo",
    )
    yield row(
        "stop_group", "POST", "/v1/groups/{group_id}/stop", "control", "Stop all sandboxes of a group", "", "GroupInfo"
    )
    yield row(
        "open_env",
        "POST",
        "/v1/envs",
        "control",
        "Get or create the sandbox that hosts an environment",
        "OpenEnv ?wait",
        "SandboxInfo",
    )
    yield row("list_envs", "GET", "/v1/envs", "control", "List environments", "", "EnvList")
    yield row("about_env", "GET", "/v1/envs/about", "control", "Describe an environment", "?id", "EnvAbout")
    yield row(
        "add_env", "POST", "/v1/envs/add", "control", "Register an environment under a name", "AddEnv", "EnvAbout"
    )
    yield row(
        "build_env",
        "POST",
        "/v1/envs/build",
        "control",
        "Install the packages of an environment; ?wait= until that ended",
        "BuildEnv ?wait",
        "EnvAbout",
    )
    yield row(
        "server_info", "GET", "/v1/server", "control", "Version, isolation and capacity of the server", "", "ServerInfo"
    )
    yield row("connection", "GET", "/v1/connection", "control",
              "Upgrade the connection to rock-frames/1, which carries many requests at once")
    yield row("health", "GET", "/healthz", "control", "Responds while the server serves")
    yield row("metrics", "GET", "/metrics", "control", "Metrics of this process, for Prometheus", "", "text")
    yield row(
        "create_key",
        "POST",
        "/v1/keys",
        "control",
        "Create an API key; only this response contains it",
        "CreateKey",
        "NewKey",
    )
    yield row("list_keys", "GET", "/v1/keys", "control", "List API keys, without the secret part", "", "KeyList")
    yield row(
        "revoke_key",
        "DELETE",
        "/v1/keys/{key_id}",
        "control",
        "Revoke an API key; sandboxes of its tenant stay",
        "",
        "KeyInfo",
    )
    yield row(
        "list_audit",
        "GET",
        "/v1/audit",
        "control",
        "Audit log: calls that changed something, newest first",
        "?tenant ?key_id ?action ?target ?since ?until ?limit ?before",
        "AuditList",
    )
    # live configuration
    c = "/v1/configuration"
    yield row("get_configuration", "GET", c, "control", "The live configuration that the server applies", "",
              "ConfigurationStatus")  # fmt: skip
    yield row("list_configurations", "GET", c + "/history", "control", "Versions of the live configuration",
              "?limit ?before", "ConfigurationHistory")  # fmt: skip
    yield row("set_configuration", "PUT", c, "control", "Replace the live configuration", "SetConfiguration",
              "ConfigurationStatus")  # fmt: skip
    # snapshots
    n = "/v1/snapshots/{snapshot}"
    yield row("list_snapshots", "GET", "/v1/snapshots", "control", "Snapshots by age", "?sandbox", "SnapshotList")
    yield row("get_snapshot", "GET", n, "control", "A snapshot by its id or name", "?tenant", "SnapshotInfo")
    yield row("export_snapshot", "GET", n + "/export", "control",
              "A snapshot as a tar: its files, and the state of its shells", "?tenant", "raw")  # fmt: skip
    yield row("import_snapshot", "POST", "/v1/snapshots/import", "control",
              "Create a snapshot from an exported one, also of another server", "raw ?name ?worker ?ttl_seconds",
              "SnapshotInfo")  # fmt: skip
    yield row("delete_snapshot", "DELETE", n, "control",
              "Delete a snapshot; its files stay while sandboxes or other snapshots use them", "?tenant",
              "SnapshotInfo")  # fmt: skip
    # recordings
    r = "/v1/recordings/{sandbox_id}"
    yield row("get_recording", "GET", r, "control", "The recording of a sandbox, also of an ended one", "",
              "RecordingInfo")  # fmt: skip
    yield row("list_recorded", "GET", r + "/entries", "control", "Recorded requests with their responses", "?after",
              "RecordedEntries")  # fmt: skip
    yield row("repeat_recording", "PUT", r + "/repeat", "control",
              "Answer the clients of a sandbox with the entries of a recording", "RepeatRecording",
              "RecordingInfo")  # fmt: skip
    # warm pools
    p = "/v1/pools/{pool}"
    yield row("list_pools", "GET", "/v1/pools", "control", "Warm pools, with their states", "", "PoolList")
    yield row("set_pool", "PUT", p, "control", "Define a warm pool, or replace its definition", "SetPool ?tenant",
              "PoolInfo")  # fmt: skip
    yield row("delete_pool", "DELETE", p, "control", "Delete a warm pool and its unclaimed sandboxes", "?tenant",
              "PoolInfo")  # fmt: skip
    # volumes
    v = "/v1/volumes/{volume}"
    yield row("create_volume", "POST", "/v1/volumes", "control", "Create a volume on a worker", "CreateVolume",
              "VolumeInfo")  # fmt: skip
    yield row("list_volumes", "GET", "/v1/volumes", "control", "List volumes, oldest first", "", "VolumeList")
    yield row("get_volume", "GET", v, "control", "A volume by its name", "?tenant", "VolumeInfo")
    yield row("delete_volume", "DELETE", v, "control", "Delete a volume that no sandbox uses, and its files", "?tenant",
              "VolumeInfo")  # fmt: skip
    # jobs
    j = "/v1/jobs/{job_id}"
    yield row("create_job", "POST", "/v1/jobs", "control", "Create a job with its trials", "CreateJob", "JobInfo")
    yield row("list_jobs", "GET", "/v1/jobs", "control", "List jobs, newest first", "?label=k=v ?limit", "JobList")
    yield row("get_job", "GET", j, "control", "A job; ?tasks=0 without its configuration and tasks", "?tasks",
              "JobDetail")  # fmt: skip
    yield row("list_trials", "GET", j + "/trials", "control", "List trials of a job by number", "?after ?limit",
              "TrialList")  # fmt: skip
    yield row("claim_trials", "POST", j + "/claim", "control", "Lease trials of a job to a runner", "ClaimTrials",
              "ClaimedTrials")  # fmt: skip
    yield row("beat_trials", "POST", j + "/heartbeat", "control", "Renew the leases of a runner", "BeatTrials",
              "BeatenTrials")  # fmt: skip
    yield row("finish_trial", "POST", j + "/trials/{number}/finish", "control", "Store the end of a try of a trial",
              "FinishTrial", "TrialInfo")  # fmt: skip
    yield row("cancel_job", "POST", j + "/cancel", "control", "Cancel the trials of a job", "", "JobInfo")
    yield row("delete_job", "DELETE", j, "control", "Delete a job that no runner runs", "", "JobInfo")
    # workers
    w = "/v1/workers/{worker}"
    yield row(
        "join_worker", "POST", "/v1/workers", "control", "Join as a worker (rocklets only)", "JoinWorker", "WorkerLease"
    )
    yield row(
        "beat_worker", "POST", w + "/beat", "control", "Heartbeat of a worker (rocklets only)", "Beat", "WorkerLease"
    )
    yield row("worker_tunnel", "WEBSOCKET", w + "/tunnel", "control",
              "Connection in the reverse direction, of a worker without inbound ports (rocklets only)")  # fmt: skip
    yield row("list_workers", "GET", "/v1/workers", "control", "List workers, including lost ones", "", "WorkerList")
    yield row(
        "drain_worker",
        "POST",
        w + "/drain",
        "control",
        "Drain a worker: it gets no more sandboxes; ?archive=1 stops and archives those that retain their files",
        "?archive",
        "WorkerInfo",
    )
    yield row(
        "undrain_worker",
        "POST",
        w + "/undrain",
        "control",
        "Undrain a worker: it gets sandboxes again",
        "",
        "WorkerInfo",
    )
    yield row(
        "remove_worker",
        "DELETE",
        w,
        "control",
        "Remove a lost worker without volumes; ?force=1 declares it lost first, which ends its sandboxes and volumes",
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
    yield row("list_sessions", "GET", _S + "/sessions", "data", "List open sessions", "", "SessionList")
    yield row(
        "close_session",
        "DELETE",
        _S + "/sessions/{session}",
        "data",
        "Close a session and kill its processes",
        "",
        "CloseBashSessionResponse",
    )
    yield row(
        "run",
        "POST",
        _S + "/sessions/{session}/run",
        "data",
        "Run a command in a session; ?stream=1 for frames",
        "BashAction ?stream",
        "BashObservation",
    )
    yield row(
        "interrupt", "POST", _S + "/sessions/{session}/interrupt", "data", "Send Ctrl-C to a session", "", "SessionInfo"
    )
    yield row(
        "session_input",
        "POST",
        _S + "/sessions/{session}/input",
        "data",
        "Send input to a session with a terminal",
        "raw",
        "SessionInfo",
    )
    yield row(
        "resize",
        "POST",
        _S + "/sessions/{session}/resize",
        "data",
        "Resize the terminal of a session",
        '{"rows", "columns"}',
        "SessionInfo",
    )
    # programs
    yield row(
        "execute",
        "POST",
        _S + "/execute",
        "data",
        "Run one program until it ends; ?stream=1 for frames",
        "Command ?stream",
        "CommandResponse",
    )
    yield row(
        "start_process", "POST", _S + "/processes", "data", "Start a background process", "Command", "ProcessInfo"
    )
    yield row("list_processes", "GET", _S + "/processes", "data", "List background processes", "", "ProcessList")
    yield row(
        "get_process",
        "GET",
        _S + "/processes/{process_id}",
        "data",
        "Status of a background process; ?wait= until it ends",
        "?wait",
        "ProcessInfo",
    )
    yield row(
        "process_logs",
        "GET",
        _S + "/processes/{process_id}/logs",
        "data",
        "Output of a background process from an offset; ?wait= for new output",
        "?stream=stdout|stderr ?offset ?limit ?wait",
        "raw",
    )
    yield row(
        "signal_process",
        "POST",
        _S + "/processes/{process_id}/signal",
        "data",
        "Send a signal to a background process",
        '{"signal": 15, "tree": true}',
        "ProcessInfo",
    )
    yield row(
        "process_stdin",
        "POST",
        _S + "/processes/{process_id}/stdin",
        "data",
        "Write to the standard input of a background process; ?close=1 closes it",
        "raw ?close",
        "ProcessInfo",
    )
    yield row(
        "forget_process",
        "DELETE",
        _S + "/processes/{process_id}",
        "data",
        "Kill a background process and delete its logs",
        "",
        "ProcessInfo",
    )
    yield row(
        "terminal",
        "WEBSOCKET",
        _S + "/terminal",
        "data",
        "Interactive program with a terminal",
        "?rows ?columns ?command ?user ?cwd ?term ?pid",
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
        "port_socket", "WEBSOCKET", _S + "/ports/{port}/{rest}", "data", "WebSocket to a port inside", tail=True,
        access=Access.RUN,
    )  # fmt: skip
    yield row("tunnel", "WEBSOCKET", _S + "/tcp/{port}", "data", "Connection to a TCP port inside")
    # files
    yield row("read_file", "GET", _S + "/files/content", "data", "Read a file", "?path ?offset ?length ?user", "raw")
    yield row(
        "write_file",
        "PUT",
        _S + "/files/content",
        "data",
        "Write a file: atomic replacement, or append",
        "raw ?path ?append ?mode ?user",
        "FileInfo",
    )
    yield row("stat_file", "GET", _S + "/files/stat", "data", "Status of a file", "?path ?follow", "FileInfo")
    yield row("list_files", "GET", _S + "/files/list", "data", "List a folder", "?path ?offset ?limit", "FileList")
    yield row("remove_file", "DELETE", _S + "/files", "data", "Remove a file or a folder", "?path ?recursive")
    yield row(
        "make_dir", "POST", _S + "/files/dir", "data", "Create a folder", '{"path", "parents", "mode"}', "FileInfo"
    )
    yield row("move_file", "POST", _S + "/files/move", "data", "Move or rename", '{"source", "target"}', "FileInfo")
    yield row("chmod", "POST", _S + "/files/chmod", "data", "Change modes", "ChmodRequest", "ChmodResponse")
    yield row("chown", "POST", _S + "/files/chown", "data", "Change owners", "ChownRequest", "ChownResponse")
    yield row(
        "download_dir", "GET", _S + "/files/archive", "data", "Download a folder or a file as tar", "?path", "raw"
    )
    yield row("upload_dir", "PUT", _S + "/files/archive", "data", "Unpack a tar into a folder", "raw ?path", "FileInfo")
    # environments
    yield row(
        "make_env", "POST", _S + "/envs", "data", "Create an environment in a process of its own", "MakeEnv", "EnvInfo"
    )
    yield row("reset_env", "POST", _S + "/envs/{env}/reset", "data", "Start an episode", "ResetEnv", "ResetResult")
    yield row("step_env", "POST", _S + "/envs/{env}/step", "data", "Step an environment", "StepEnv", "StepResult")
    yield row(
        "call_env",
        "POST",
        _S + "/envs/{env}/call",
        "data",
        "Call another method of an environment",
        "CallEnv",
        "CallResult",
    )
    yield row(
        "fork_env", "POST", _S + "/envs/{env}/fork", "data", "Copy an environment with its state", "ForkEnv",
        "ForkedEnvs",
    )  # fmt: skip
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
    yield row(
        "close_env", "DELETE", _S + "/envs/{env}", "data", "Close an environment and end its process", "", "EnvInfo"
    )
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


# ---- model gateway ----
#
# Its management is in the control plane; the endpoint of agents is not in the table, because its paths and errors are
# those of the dialects:
#
#     /gateway/v1/chat/completions, /gateway/v1/responses, /gateway/v1/messages, /gateway/v1/messages/count_tokens,
#     /gateway/v1/models, /gateway/v1beta/models/MODEL:METHOD
#
# Its only credential is the secret of a run. Messages: runs.py.

ENDPOINT = "/gateway"  # the prefix of the endpoint of agents
NDJSON = "application/x-ndjson"  # content type of a streamed answer of a call
_UPSTREAMS = "/v1/gateway/upstreams"
_RUN = "/v1/runs/{run}"


def gateway_rows() -> Iterator[Route]:
    yield row("put_upstream", "PUT", _UPSTREAMS + "/{upstream}", "control",
              "Define an upstream: a model server, its dialect and key", "UpstreamSpec", "UpstreamInfo")
    yield row("list_upstreams", "GET", _UPSTREAMS, "control", "List upstreams, without keys", "", "UpstreamList")
    yield row("delete_upstream", "DELETE", _UPSTREAMS + "/{upstream}", "control",
              "Delete an upstream; later calls of its runs fail", "?tenant", "UpstreamInfo")
    yield row("create_run", "POST", "/v1/runs", "control",
              "Create a run: an agent on a task, with a secret for the model endpoint", "RunSpec", "RunInfo")
    yield row("list_runs", "GET", "/v1/runs", "control", "List runs, newest first",
              "?state ?sandbox ?upstream ?tag=k=v ?name ?limit ?after", "RunList")
    yield row("get_run", "GET", _RUN, "control", "A run", "", "RunInfo")
    yield row("update_run", "PATCH", _RUN, "control", "Change tags or the weight version of an active run", "UpdateRun",
              "RunInfo")
    yield row("list_calls", "GET", _RUN + "/calls", "control",
              "Recorded calls in order of arrival; ?bodies=1 with requests and responses",
              "?after ?limit ?bodies ?dialect", "CallList")
    yield row("get_call", "GET", _RUN + "/calls/{number}", "control",
              "A recorded call; ?wait= until it has ended, ?dialect= for its bodies", "?wait ?dialect", "CallInfo")
    yield row("next_call", "GET", _RUN + "/next", "control",
              "Pull mode: the first unanswered call with a number above ?after; ?wait= for one",
              "?after ?wait ?dialect", "NextCall")
    yield row("answer_call", "POST", _RUN + "/calls/{number}/answer", "control",
              "Pull mode: answer a call, in any order; ndjson for a stream", "AnswerCall ?dialect", "CallInfo")
    yield row("end_run", "POST", _RUN + "/end", "control",
              "End a run with an optional reward; cancels running calls, refuses later ones", "EndRun", "RunInfo")
    yield row("get_trajectory", "GET", _RUN + "/trajectory", "control",
              "The calls of a run as ?format=atif|openai|chains|rock", "?format", "object")
    yield row("delete_run", "DELETE", _RUN, "control", "Delete a run and its calls; ?force=1 ends it first", "?force",
              "RunInfo")
    # data plane: requests of the gateway to the worker of a sandbox
    port = _S + "/gateway"
    yield Route("open_gateway_port", "PUT", port, "data", "Open the loopback port to the gateway (server only)",
                "GatewayPort", "GatewayPortInfo", True, access=Access.ADMIN)
    yield Route("close_gateway_port", "DELETE", port, "data", "Close the loopback port to the gateway (server only)",
                "", "GatewayPortInfo", True, access=Access.ADMIN)
