"""What can be done in a sandbox, and what comes back."""

from __future__ import annotations

import base64
import functools
import re
from enum import StrEnum
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from rock.protocol.sandbox import Inside, SandboxConfig, SandboxInfo, Wire

MAX_OUTPUT = 16 << 20
SESSION_PATTERN = r"^[A-Za-z0-9_.:@-]{1,128}$"

Check = Literal["raise", "silent", "ignore"]

# What a command that ROCK's clients put into the background prints of its process id.
BACKGROUND_PID = re.compile(r"PIDSTART(\d+)PIDEND")


class RunMode(StrEnum):
    """How `arun` waits: "normal" holds the call open, "nohup" runs in the background and polls."""

    NORMAL = "normal"
    NOHUP = "nohup"


RunModeType = Literal["normal", "nohup"]


class Command(Inside):
    """A one-shot program, apart from any session.

    command: a list is an argv and no shell is involved; a string is run by the image's shell.
    timeout: seconds, then the whole process tree is killed; None is no limit.
    env: added to the sandbox's environment. cwd, user: None is the image's.
    stdin: text for its standard input; without it /dev/null.
    max_output_bytes: cap of stdout and of stderr each; the head and the tail are kept and the rest is counted.
    entrypoint: the words of the image's ENTRYPOINT come before those of `command`, a list; where that is empty, the
        image's CMD is run.
    """

    texts: ClassVar[frozenset[str]] = frozenset({"stdin"})

    command: str | list[str]
    entrypoint: bool = False
    timeout: float | None = Field(default=1200.0, gt=0)
    env: dict[str, str] | None = None
    cwd: str | None = None
    user: str | None = None
    stdin: str | None = None
    max_output_bytes: int = Field(default=MAX_OUTPUT, ge=0, le=1 << 30)
    session_type: Literal["bash"] = "bash"
    shell: bool | None = None
    check: bool = False
    error_msg: str = ""

    @field_validator("command")
    @classmethod
    def _command(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list) and value and not value[0]:
            raise ValueError("the command is empty")
        return value

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.command and not self.entrypoint:
            raise ValueError("command: the command is empty")
        if self.entrypoint and isinstance(self.command, str):
            raise ValueError("command: with entrypoint it is a list")
        return self


class CreateBashSessionRequest(Inside):
    """A session to open. bash reads its user's ~/.bashrc first, as in a terminal; the session that is there without
    being created does not.

    startup_source: files that the shell sources first, as in `. FILE`; a missing one is an error.
    env_enable: ROCK's switch for `env`; an `env` that is given is used either way.
    remote_user: user inside. pty: (rows, columns) of a real terminal; None is pipes.
    shell: "bash", "sh" or a path; None is bash, or sh where there is no bash.
    """

    session: str = Field(default="default", pattern=SESSION_PATTERN)
    startup_source: list[str] = Field(default_factory=list)
    env_enable: bool = False
    env: dict[str, str] | None = None
    cwd: str | None = None
    remote_user: str | None = None
    pty: tuple[int, int] | None = None
    shell: str | None = None
    session_type: Literal["bash"] = "bash"
    startup_timeout: float = Field(default=10.0, gt=0)
    max_read_size: int = Field(default=2000, ge=0, le=1 << 30)


class BashAction(Inside):
    """A command for a session.

    timeout: seconds, then what the command started is killed and the session stays; None is no limit.
    check: "raise" makes an exit status other than 0 an error, "silent" and "ignore" only tell it.
    separate: keep stdout and stderr apart in the observation (pipes only).
    """

    command: str
    session: str = Field(default="default", pattern=SESSION_PATTERN)
    timeout: float | None = Field(default=None, gt=0)
    check: Check = "raise"
    separate: bool = False
    max_output_bytes: int = Field(default=MAX_OUTPUT, ge=0, le=1 << 30)
    action_type: Literal["bash"] = "bash"
    is_interactive_command: bool = False
    is_interactive_quit: bool = False
    error_msg: str = ""
    expect: list[str] = Field(default_factory=list)


Action = BashAction


class CloseBashSessionRequest(Wire):
    """A session to close: its shell and what it started are killed."""

    session: str = Field(default="default", pattern=SESSION_PATTERN)
    session_type: Literal["bash"] = "bash"


CloseSessionRequest = CloseBashSessionRequest


class ReadFileRequest(Inside):
    """A text file to read whole; `encoding` and `errors` as of bytes.decode."""

    path: str
    encoding: str | None = None
    errors: str | None = None


class WriteFileRequest(Inside):
    """A text file to write; missing parent folders are made, an old file is replaced at once."""

    texts: ClassVar[frozenset[str]] = frozenset({"content"})

    content: str
    path: str


class UploadMode(StrEnum):
    """ROCK's ways of uploading; all of them are a direct stream here, except "oss", which is refused."""

    AUTO = "auto"
    OSS = "oss"
    DIRECT = "direct"


class UploadRequest(Inside):
    """A local file or folder to copy in."""

    source_path: str
    target_path: str
    upload_mode: UploadMode = UploadMode.AUTO


class ChownRequest(Inside):
    """New owner of paths inside."""

    remote_user: str
    paths: list[str]
    recursive: bool = False


class ChmodRequest(Inside):
    """New mode of paths inside, in octal."""

    paths: list[str]
    mode: str = "755"
    recursive: bool = False


# ---- answers --------------------------------------------------------------------------------------------------------


class Answer(Wire):
    """Base of answers: a newer server's extra keys do not break an older client."""

    model_config = {"extra": "ignore"}

    @classmethod
    def made(cls, **values: Any) -> Self:
        """One of values that need no check, in a tenth of the time of pydantic's model_construct: an answer to each
        command is one."""
        model = cls.__new__(cls)
        set_to = object.__setattr__
        set_to(model, "__dict__", {**_defaults(cls), **values})
        set_to(model, "__pydantic_fields_set__", set(values))
        set_to(model, "__pydantic_extra__", None)
        set_to(model, "__pydantic_private__", None)
        return model


@functools.cache
def _defaults(kind: type[Answer]) -> dict[str, Any]:
    """Those that all models of a kind can share."""
    return {name: field.get_default() for name, field in kind.model_fields.items() if not field.is_required()}


class CommandResponse(Answer):
    """Outcome of a one-shot command. exit_code None: unknown. `stdout_b64`: the exact bytes when they are not UTF-8."""

    stdout: str = ""
    stderr: str = ""
    exit_code: int | None = None
    signal: int | None = None
    timed_out: bool = False
    failure_reason: str = ""
    stdout_dropped: int = 0
    stderr_dropped: int = 0
    stdout_b64: str | None = Field(default=None, repr=False)
    stderr_b64: str | None = Field(default=None, repr=False)
    duration: float = 0.0

    @property
    def stdout_bytes(self) -> bytes:
        """The exact bytes of stdout (without those that the cap dropped)."""
        return base64.b64decode(self.stdout_b64) if self.stdout_b64 is not None else self.stdout.encode()

    @property
    def stderr_bytes(self) -> bytes:
        """The exact bytes of stderr (without those that the cap dropped)."""
        return base64.b64decode(self.stderr_b64) if self.stderr_b64 is not None else self.stderr.encode()


class BashObservation(Answer):
    """Outcome of a command in a session.

    output: stdout and stderr as they came, or stdout alone when `separate` was asked for and `stderr` has the rest.
    exit_code: the real one; None is unknown. failure_reason: a sentence when it was not an ordinary end.
    dropped_bytes: how much the cap took out of the middle. session_closed: the shell is gone.
    """

    output: str = ""
    exit_code: int | None = None
    failure_reason: str = ""
    expect_string: str = ""
    stderr: str = ""
    timed_out: bool = False
    interrupted: bool = False
    session_closed: bool = False
    session_restarted: bool = False
    dropped_bytes: int = 0
    output_b64: str | None = Field(default=None, repr=False)
    stderr_b64: str | None = Field(default=None, repr=False)
    duration: float = 0.0
    session_type: Literal["bash"] = "bash"

    @property
    def output_bytes(self) -> bytes:
        """The exact bytes (without those that the cap dropped)."""
        return base64.b64decode(self.output_b64) if self.output_b64 is not None else self.output.encode()


Observation = BashObservation


class CreateBashSessionResponse(Answer):
    """`output`: what the start-up files printed."""

    output: str = ""
    session_type: Literal["bash"] = "bash"


class CloseBashSessionResponse(Answer):
    session_type: Literal["bash"] = "bash"


CloseSessionResponse = CloseBashSessionResponse


class SessionInfo(Answer):
    """An open session: `busy` while a command runs in it."""

    session: str
    shell: str = ""
    pid: int = 0
    busy: bool = False
    pty: bool = False
    user: str | None = None
    created_at: float = 0.0


class ProcessInfo(Answer):
    """A background process. exit_code None while `running`, or when nobody saw its end.

    stdout_size, stderr_size: bytes it has written so far: the offset at which its logs end.
    """

    process_id: str
    pid: int = 0
    command: str | list[str] = ""
    running: bool = True
    exit_code: int | None = None
    signal: int | None = None
    started_at: float = 0.0
    ended_at: float | None = None
    stdout_size: int = 0
    stderr_size: int = 0


class FileInfo(Answer):
    """One file inside."""

    name: str
    path: str
    kind: Literal["file", "directory", "symlink", "fifo", "socket", "device"]
    size: int
    mode: int
    uid: int
    gid: int
    mtime: float
    target: str | None = None


class ReadFileResponse(Answer):
    content: str = ""


class WriteFileResponse(Answer):
    success: bool = True
    message: str = ""


class UploadResponse(Answer):
    success: bool = True
    message: str = ""
    file_name: str = ""


class DownloadFileResponse(Answer):
    success: bool = True
    message: str = ""


class ChownResponse(Answer):
    success: bool = True
    message: str = ""


class ChmodResponse(Answer):
    success: bool = True
    message: str = ""


class ExecuteBashSessionResponse(Answer):
    success: bool = True
    message: str = ""


class OssSetupResponse(Answer):
    success: bool = False
    message: str = "object storage is not used here"


class IsAliveResponse(Answer):
    is_alive: bool
    message: str = ""

    def __bool__(self) -> bool:
        return self.is_alive


class CloseResponse(Answer):
    success: bool = True
    message: str = ""


class SandboxResponse(Answer):
    code: int | None = None
    exit_code: int | None = None
    failure_reason: str | None = None


class StateTransitionRecord(Answer):
    """One step of a sandbox's life, in ROCK's shape. timestamp: ISO 8601, UTC."""

    from_state: str
    to_state: str
    event: str
    timestamp: str | None = None


class SandboxStatusResponse(SandboxResponse):
    """Status in ROCK's shape; `info` has ours. Times are ISO 8601, UTC; disk and accelerators are those that this
    client asked for, and None of a sandbox that another one started."""

    sandbox_id: str | None = None
    status: dict[str, Any] | None = None
    state: str | None = None
    is_alive: bool = False
    port_mapping: dict[str, int] = Field(default_factory=dict)
    host_name: str | None = None
    host_ip: str | None = None
    image: str | None = None
    cpus: float | None = None
    memory: str | None = None
    user_id: str | None = None
    experiment_id: str | None = None
    namespace: str | None = None
    num_gpus: float | None = None
    accelerator_type: str | None = None
    disk: str | None = None
    disk_limit_rootfs: str | None = None
    gateway_version: str | None = None
    swe_rex_version: str | None = None
    create_time: str | None = None
    start_time: str | None = None
    stop_time: str | None = None
    archive_time: str | None = None
    delete_time: str | None = None
    auto_stop_time: str | None = None
    auto_archive_time: str | None = None
    auto_delete_time: str | None = None
    state_history: list[StateTransitionRecord] = Field(default_factory=list)
    info: dict[str, Any] | None = None


# ---- network ----
#
# What a sandbox connected to, or tried to.

class Connection(Answer):
    """One connection, or one DNS question that was refused. Times are seconds since the epoch.

    number: counts up from 1. protocol: "tls" or "http" where a name was looked for, "dns", else "tcp". host: the name,
    as the client said it or as it was found by DNS last. address, port: where it was meant to go. allowed: whether the
    policy allowed it; reason: why not, or why it failed or broke. sent, received: bytes, as the sandbox sees it.
    ended_at: None while it is open.
    """

    number: int
    at: float
    ended_at: float | None = None
    protocol: str = "tcp"
    host: str | None = None
    address: str = ""
    port: int = 0
    allowed: bool = False
    reason: str | None = None
    sent: int = 0
    received: int = 0


class ConnectionList(Answer):
    """The last connections of a sandbox, oldest first. total: of all; dropped: how many are no longer known."""

    items: list[Connection] = Field(default_factory=list)
    total: int = 0
    dropped: int = 0


# ---- group ----
#
# Groups: many equal sandboxes in one request.

MOST = 10_000  # sandboxes of one group


class GroupRequest(Wire):
    """`size` sandboxes of one config. Where that has a `sandbox_id`, it is the group's id, else the server chooses one;
    the sandboxes are named after it: ID-0, ID-1, ...

    mode: "gang" is all or none: those that started are stopped when one cannot. "best_effort" is as many as there is
    room and quota for. placement: "spread" puts few on each worker, "pack" uses few workers.
    """

    config: SandboxConfig
    size: int = Field(ge=1, le=MOST)
    mode: Literal["gang", "best_effort"] = "gang"
    placement: Literal["spread", "pack"] = "spread"


class GroupInfo(Answer):
    """A group, its sandboxes in order, without their histories. missing: how many of the request were not made, by
    best effort; error: why, as it travels, with the answer to the request alone."""

    group_id: str
    sandboxes: list[SandboxInfo]
    missing: int = 0
    error: dict[str, Any] | None = None
