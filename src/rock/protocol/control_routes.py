"""Rows of the control plane, which the admin answers: sandboxes, groups, environments, keys, workers."""

from __future__ import annotations

from collections.abc import Iterator

from rock.protocol.route import SANDBOX as _S
from rock.protocol.route import Route, row


def rows() -> Iterator[Route]:
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
