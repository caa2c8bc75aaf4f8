"""Request and response models of operations in a sandbox: commands, sessions, processes, files, network, groups."""

from __future__ import annotations

import base64
import re
from enum import StrEnum
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from rock.protocol.sandbox import SandboxConfig, SandboxInfo
from rock.protocol.wire import Inside, Wire, html_table

MAX_OUTPUT = 16 << 20
MAX_STDIN_BASE64 = 16 << 20  # characters; a longer input is streamed to a background process
SESSION_PATTERN = r"^[A-Za-z0-9_.:@-]{1,128}$"

Check = Literal["raise", "silent", "ignore"]

# The process id line that background commands of ROCK's clients print.
BACKGROUND_PID = re.compile(r"PIDSTART(\d+)PIDEND")


class RunMode(StrEnum):
    """How `arun` waits: "normal" keeps the request open, "nohup" runs in the background and polls."""

    NORMAL = "normal"
    NOHUP = "nohup"


RunModeType = Literal["normal", "nohup"]


class Command(Inside):
    """A one-shot program, independent of sessions.

    command: a list is an argv without a shell; a string is run by the image's shell.
    timeout: seconds, after which the whole process tree is killed; None is no limit.
    env: added to the sandbox's environment. cwd, user: None is the image's.
    stdin: text for its standard input; without it /dev/null. stdin_base64: the same for bytes, in base64.
    max_output_bytes: limit of stdout and of stderr each; the head and the tail are retained and the rest is counted.
    entrypoint: prefix the words of `command`, a list, with the image's ENTRYPOINT; an empty list runs the image's CMD.
    """

    texts: ClassVar[frozenset[str]] = frozenset({"stdin"})

    command: str | list[str]
    entrypoint: bool = False
    timeout: float | None = Field(default=1200.0, gt=0)
    env: dict[str, str] | None = None
    cwd: str | None = None
    user: str | None = None
    stdin: str | None = None
    stdin_base64: str | None = Field(default=None, max_length=MAX_STDIN_BASE64, repr=False)
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

    @field_validator("stdin_base64")
    @classmethod
    def _base64(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                base64.b64decode(value, validate=True)
            except ValueError:
                raise ValueError("it is not base64") from None
        return value

    @property
    def input(self) -> bytes | None:
        """The bytes for its standard input; None is /dev/null."""
        if self.stdin_base64 is not None:
            return base64.b64decode(self.stdin_base64)
        return None if self.stdin is None else self.stdin.encode("utf-8", "surrogateescape")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.stdin is not None and self.stdin_base64 is not None:
            raise ValueError("stdin and stdin_base64 exclude each other")
        if not self.command and not self.entrypoint:
            raise ValueError("command: the command is empty")
        if self.entrypoint and isinstance(self.command, str):
            raise ValueError("command: with entrypoint it is a list")
        return self


class CreateBashSessionRequest(Inside):
    """A session to open. bash reads its user's ~/.bashrc first, as in a terminal, except in the default session, which
    exists without being created.

    startup_source: files that the shell sources first, as in `. FILE`; a missing one is an error.
    env_enable: ROCK's switch for `env`; a given `env` is used in any case.
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

    timeout: seconds, after which the processes of the command are killed and the session stays; None is no limit.
    check: "raise" makes an exit status other than 0 an error; "silent" and "ignore" only report it.
    separate: separate stdout and stderr in the observation (pipes only).
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
    """A session to close: its shell and its process tree are killed."""

    session: str = Field(default="default", pattern=SESSION_PATTERN)
    session_type: Literal["bash"] = "bash"


CloseSessionRequest = CloseBashSessionRequest


class ReadFileRequest(Inside):
    """A text file to read completely; `encoding` and `errors` as of bytes.decode."""

    path: str
    encoding: str | None = None
    errors: str | None = None


class WriteFileRequest(Inside):
    """A text file to write; missing parent folders are created, an existing file is replaced atomically."""

    texts: ClassVar[frozenset[str]] = frozenset({"content"})

    content: str
    path: str


class UploadMode(StrEnum):
    """ROCK's upload modes; all of them are a direct stream here, except "oss", which is rejected."""

    AUTO = "auto"
    OSS = "oss"
    DIRECT = "direct"


class UploadRequest(Inside):
    """A local file or folder to upload."""

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


# ---- responses ----


class Answer(Wire):
    """Base of responses: unknown fields of a newer server are ignored, so that an older client works."""

    model_config = {"extra": "ignore"}


class CommandResponse(Answer):
    """Result of a one-shot command. exit_code None: unknown. `stdout_b64`: the exact bytes when they are not UTF-8."""

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
        """The exact bytes of stdout (without those that the limit dropped)."""
        return base64.b64decode(self.stdout_b64) if self.stdout_b64 is not None else self.stdout.encode()

    @property
    def stderr_bytes(self) -> bytes:
        """The exact bytes of stderr (without those that the limit dropped)."""
        return base64.b64decode(self.stderr_b64) if self.stderr_b64 is not None else self.stderr.encode()

    def _repr_html_(self) -> str:
        return html_table({"exit code": self.exit_code, "stdout": self.stdout, "stderr": self.stderr,
                           "failure": self.failure_reason})  # fmt: skip

    @property
    def output(self) -> str:
        """stdout, then stderr."""
        return self.stdout + self.stderr

    @property
    def output_bytes(self) -> bytes:
        """The exact bytes of stdout, then of stderr."""
        return self.stdout_bytes + self.stderr_bytes


class BashObservation(Answer):
    """Result of a command in a session.

    output: stdout and stderr in the order of arrival, or stdout alone when `separate` was set; `stderr` then has the
    rest.
    exit_code: the exit status; None is unknown. failure_reason: a sentence when the command did not end normally.
    dropped_bytes: bytes that the limit removed from the middle. session_closed: the shell has ended.
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
        """The exact bytes (without those that the limit dropped)."""
        return base64.b64decode(self.output_b64) if self.output_b64 is not None else self.output.encode()

    def _repr_html_(self) -> str:
        return html_table({"exit code": self.exit_code, "output": self.output, "stderr": self.stderr,
                           "failure": self.failure_reason})  # fmt: skip

    @property
    def stdout(self) -> str:
        """`output`: stdout alone if `separate` was set, else both in the order of arrival."""
        return self.output

    @property
    def stdout_bytes(self) -> bytes:
        """`output_bytes`."""
        return self.output_bytes

    @property
    def stderr_bytes(self) -> bytes:
        """The exact bytes of `stderr`."""
        return base64.b64decode(self.stderr_b64) if self.stderr_b64 is not None else self.stderr.encode()


Observation = BashObservation


class CreateBashSessionResponse(Answer):
    """`output`: the output of the start-up files."""

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
    """A background process. exit_code: None while `running`, or when its end was not observed.

    stdout_size, stderr_size: bytes written so far: the offset at which its logs end.
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
    """One state change of a sandbox, in ROCK's format. timestamp: ISO 8601, UTC."""

    from_state: str
    to_state: str
    event: str
    timestamp: str | None = None


class SandboxStatusResponse(SandboxResponse):
    """Status in ROCK's format; `info` has ours. Times are ISO 8601, UTC; disk and accelerators are those that this
    client requested, and None for a sandbox that another client started."""

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
# Connections and connection attempts of a sandbox.


class Connection(Answer):
    """One connection, or one rejected DNS query. Times are seconds since the epoch.

    number: counts up from 1. protocol: "tls" or "http" where a name was detected, "dns", else "tcp". host: the name, as
    sent by the client or as last resolved by DNS. address, port: the requested destination. allowed: whether the policy
    allowed it; reason: why it was rejected, or why it failed or broke. sent, received: bytes, as seen by the sandbox.
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


class DirectAccess(Answer):
    """Where a client sends requests of the data plane of one sandbox. url: of its worker; "" for one on the machine of
    the server: path is its Unix socket, for clients of the same user on that machine, and port its port, 0 for none.
    token: sent as `Authorization: Bearer TOKEN`. proof: the header X-ROCK-Direct of each response, by which a client
    recognizes the worker. seconds: for which the token is valid."""

    url: str = ""
    path: str = ""
    port: int = 0
    token: str = Field(repr=False)
    proof: str = Field(repr=False)
    seconds: float


class ConnectionList(Answer):
    """The last connections of a sandbox, oldest first. total: number of all; dropped: number of those no longer
    stored."""

    items: list[Connection] = Field(default_factory=list)
    total: int = 0
    dropped: int = 0


# ---- groups ----
#
# A group consists of many equal sandboxes that one request creates.

MOST = 10_000  # sandboxes of one group


class GroupRequest(Wire):
    """`size` sandboxes of one config. Its `sandbox_id`, if set, is the group's id, else the server chooses one; the
    sandboxes are named after it: ID-0, ID-1, ...

    mode: "gang" is all or none: the started ones are stopped when one cannot start. "best_effort" starts as many as
    capacity and quota allow. placement: "spread" places few on each worker, "pack" uses few workers.
    """

    config: SandboxConfig
    size: int = Field(ge=1, le=MOST)
    mode: Literal["gang", "best_effort"] = "gang"
    placement: Literal["spread", "pack"] = "spread"


class GroupInfo(Answer):
    """A group, its sandboxes in order, without their histories. missing: number of sandboxes that best effort did not
    start; error: the reason, in wire format, only in the response to the request."""

    group_id: str
    sandboxes: list[SandboxInfo]
    missing: int = 0
    error: dict[str, Any] | None = None
