"""Rows of the data plane, through the proxy to the rocklet: what is inside of sandboxes, and builds."""

from __future__ import annotations

from collections.abc import Iterator

from rock.protocol.keys import Access
from rock.protocol.route import SANDBOX as _S
from rock.protocol.route import Route, row


def rows() -> Iterator[Route]:
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
