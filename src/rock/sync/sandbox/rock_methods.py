# GENERATED from src/rock/sdk/sandbox/rock_methods.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""The methods of the original ROCK on `Sandbox`. Each forwards to a method of this SDK; use those in new code."""

from __future__ import annotations

from abc import abstractmethod
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, Unpack

from rock import errors
from rock.protocol.action import (
    BashAction,
    BashObservation,
    Check,
    CloseBashSessionRequest,
    CloseBashSessionResponse,
    CloseResponse,
    Command,
    CommandResponse,
    CreateBashSessionRequest,
    CreateBashSessionResponse,
    ExecuteBashSessionResponse,
    IsAliveResponse,
    ReadFileRequest,
    ReadFileResponse,
    SandboxStatusResponse,
    StateTransitionRecord,
    UploadMode,
    UploadRequest,
    UploadResponse,
    WriteFileRequest,
    WriteFileResponse,
)
from rock.protocol.sandbox import CommitStatus, SandboxConfig, SandboxInfo, State
from rock.sync.sandbox.deploy import Deploy
from rock.sync.sandbox.files import Files
from rock.sync.sandbox.link import Link, list_sandboxes, parse
from rock.sync.sandbox.model_service.base import ModelService
from rock.sync.sandbox.options import ProgramOptions
from rock.sync.sandbox.processes import TIMEOUT, Processes, raise_if_failed
from rock.sync.sandbox.remote_user import RemoteUser
from rock.sync.sandbox.scripts import Scripts, output_of_session, run_nohup, start_in_session, wait_in_session
from rock.sync.sandbox.sessions import DEFAULT, Sessions
from rock.sync.sandbox.speedup import Network

PORTION = 1 << 20  # bytes of one read
_PHASES = {"image": "image_pull", "sandbox": "docker_run"}  # ROCK's names


class RockMethods(Link):
    """ROCK's flat methods, and its parts.

    fs: `files`. process: scripts. remote_user: users inside. deploy: a local folder as the working folder inside.
    network: mirrors of package managers. runtime_envs: installed Python and Node.js, by `runtime_env_id`.
    model_service: ROCK's model service, once an agent has one or you set one.
    """

    def __init__(self, config: SandboxConfig) -> None:
        super().__init__(config)
        self.files = Files(self)
        self.sessions = Sessions(self)
        self.processes = Processes(self)
        self.fs = self.files
        self.process = Scripts(self.files, self)
        self.remote_user = RemoteUser(self.processes)
        self.deploy = Deploy(self.files)
        self.network = Network(self.files, self.processes)
        self.runtime_envs: dict[str, Any] = {}
        self.model_service: ModelService | None = None

    @abstractmethod
    def stop(self) -> None:
        """Stop it."""

    def _get(self, wait: float | None = None, usage: bool = False) -> SandboxInfo:
        target = self._path("get_sandbox", wait=wait and round(wait, 3), usage=usage or None)
        return self._info("get_sandbox", target, wait=wait or 0.0)

    # ---- life

    def attach(self, sandbox_id: str) -> Self:
        """`Sandbox.connect` for this object. NotFound."""
        before, self.sandbox_id = self.sandbox_id, sandbox_id
        try:
            self.sandbox_id = (self._get()).sandbox_id
        except errors.NotFound:
            self.sandbox_id = before
            found = list_sandboxes(self._transport, None, None, {"name": sandbox_id})
            if not found:
                raise
            live = [info for info in found if info.state in (State.PENDING, State.RUNNING, State.STOPPING)]
            self.sandbox_id = [*live, *found][0].sandbox_id  # the only one that has not ended, else the newest
        except BaseException:
            self.sandbox_id = before
            raise
        return self

    def get_status(self, include_all_states: bool = False) -> SandboxStatusResponse:
        """`info` in ROCK's format."""
        info = self._get()
        return SandboxStatusResponse(
            sandbox_id=info.sandbox_id,
            status={
                _PHASES.get(name, name): {"status": phase.status, "message": phase.message}
                for name, phase in info.phases.items()
            },
            state=info.state.value,
            is_alive=info.is_alive,
            host_name=info.host_name,
            host_ip=info.host_ip,
            image=info.image,
            cpus=info.cpus,
            memory=info.memory,
            user_id=info.user_id,
            experiment_id=info.experiment_id,
            namespace=info.namespace,
            num_gpus=self.config.num_gpus,
            accelerator_type=self.config.accelerator_type,
            disk=self.config.disk,
            disk_limit_rootfs=self.config.disk,
            create_time=_iso(info.created_at),
            start_time=_iso(info.started_at),
            stop_time=_iso(info.stopped_at),
            archive_time=_iso(info.archived_at),
            delete_time=_iso(info.deleted_at),
            auto_stop_time=_iso(info.auto_stop_at),
            auto_archive_time=_iso(info.auto_archive_at),
            auto_delete_time=_iso(info.auto_delete_at),
            state_history=[
                StateTransitionRecord(
                    from_state=step.from_state.value,
                    to_state=step.to_state.value,
                    event=step.event,
                    timestamp=_iso(step.timestamp),
                )
                for step in info.state_history
            ],
            info=info.model_dump(mode="json"),
        )

    def is_alive(self) -> IsAliveResponse:
        """Whether it runs; the result is truthy if it does. A sandbox that does not exist is not alive."""
        try:
            info = self._get()
        except errors.NotFound as error:
            return IsAliveResponse(is_alive=False, message=error.message)
        return IsAliveResponse(is_alive=info.is_alive, message=(info.host_name if info.is_alive else info.reason) or "")

    def close(self) -> CloseResponse:
        """`stop`; `success` is False after an error."""
        try:
            self.stop()
        except errors.RockError as error:
            return CloseResponse(success=False, message=str(error))
        return CloseResponse()

    def commit_async(
        self,
        image_tag: str,
        username: str | None = None,
        password: str | None = None,
        *,
        push: bool | None = None,
    ) -> CommitStatus:
        """Begin a `commit`; `get_commit_status` returns its progress."""
        spec = {"image_tag": image_tag, "registry_username": username or None, "registry_password": password or None,
                "push": bool(username) if push is None else push}  # fmt: skip
        answer = self._call("commit_sandbox", self._path("commit_sandbox"), spec)
        return parse(CommitStatus, answer)

    def get_commit_status(self, wait: float | None = None) -> CommitStatus:
        """The last commit, after at most `wait` seconds while it is in progress. NotFound: there was none."""
        target = self._path("get_commit", wait=wait and round(wait, 3))
        return parse(CommitStatus, self._call("get_commit", target, wait=wait or 0.0))

    # ---- programs

    def execute(
        self,
        command: Command | str | list[str],
        *,
        timeout: float | None = TIMEOUT,
        check: bool = False,
        **options: Unpack[ProgramOptions],
    ) -> CommandResponse:
        """`exec`."""
        if isinstance(command, Command):
            return self.processes.execute(command, check)
        return self.processes.run(command, timeout=timeout, check=check, **options)

    def create_session(
        self, request: CreateBashSessionRequest | None = None, **fields: Any
    ) -> CreateBashSessionResponse:
        """`sessions.create` with a request, or with its fields."""
        return self.sessions.open(request or CreateBashSessionRequest(**fields))

    def close_session(self, request: CloseBashSessionRequest | str) -> CloseBashSessionResponse:
        """`sessions.close`."""
        return self.sessions.close(request if isinstance(request, str) else request.session)

    def arun(
        self,
        cmd: str,
        session: str | None = None,
        wait_timeout: float | None = 300,
        wait_interval: float = 10,
        mode: str = "normal",
        response_limited_bytes_in_nohup: int | None = None,
        ignore_output: bool = False,
        output_file: str | None = None,
        *,
        check: Check = "silent",
        timeout: float | None = None,
        separate: bool = False,
        max_output_bytes: int | None = None,
    ) -> BashObservation:
        """Run a command line in a session ("default" when None) and give what was seen, with its true exit status.

        wait_timeout, timeout: two names for the limit in seconds; after it the command is killed and the observation
            says `timed_out`; the session stays usable. None for wait_timeout is no limit.
        check: "raise" makes a status other than 0 CommandFailed, and a timeout CommandTimeout.
        separate: stdout in `output`, stderr in `stderr`. max_output_bytes: more is cut out of the middle, and counted.
        mode: "nohup" runs it in the background, in the session's folder and environment; a timeout then leaves it
            running. output_file: a file inside that gets all of its output. response_limited_bytes_in_nohup: no more
            than so much is sent back. ignore_output: nothing is; `output` says where it is and how large. wait_interval
            has no effect: the end of the command is told when it comes.
        """
        limit = wait_timeout if timeout is None else timeout
        if check not in ("raise", "silent", "ignore"):
            raise errors.InvalidConfig(f"check is {check!r}", hint='use "raise", "silent" or "ignore"')
        if mode == "normal":
            body: dict[str, Any] = {"command": cmd, "timeout": limit, "check": "silent"}
            if separate:
                body["separate"] = True
            if max_output_bytes is not None:
                body["max_output_bytes"] = max_output_bytes
            seen = self.sessions.send(session or DEFAULT, body, limit)
        elif mode == "nohup":
            seen = run_nohup(
                self, cmd, session, limit, output_file, response_limited_bytes_in_nohup, ignore_output
            )
        else:
            raise errors.InvalidConfig(f"Unsupported arun mode: {mode}", hint='use "normal" or "nohup"')
        if check == "raise":
            raise_if_failed(cmd, seen, seen.output, "", self.sandbox_id)
        return seen

    def run_nohup_and_wait(
        self,
        cmd: str,
        redirect_file_path: str = "/dev/null",
        wait_timeout: float | None = 300,
        wait_interval: float = 10,
    ) -> ExecuteBashSessionResponse:
        """ROCK's older form of `arun(mode="nohup")`, with the output in a file: `success` is an end with status 0."""
        try:
            seen = self.arun(
                cmd, None, wait_timeout, wait_interval, "nohup", ignore_output=True, output_file=redirect_file_path
            )
        except errors.RockError as error:
            return ExecuteBashSessionResponse(success=False, message=str(error))
        return ExecuteBashSessionResponse(
            success=seen.exit_code == 0, message=seen.failure_reason or f"exit code {seen.exit_code}"
        )

    def start_nohup_process(
        self, cmd: str, tmp_file: str, session: str
    ) -> tuple[int | None, BashObservation | None]:
        """Start a command in the background of a session, its output to `tmp_file`: (pid, None), or (None, what the
        session saw) where that failed. `arun(mode="nohup")` does the whole and gives the true exit status."""
        return start_in_session(self, cmd, tmp_file, session)

    def wait_for_process_completion(
        self, pid: int, session: str, wait_timeout: float, wait_interval: float = 10
    ) -> tuple[bool, str]:
        """Wait for the end of such a process: (whether it ended within `wait_timeout` seconds, a sentence about it).
        wait_interval has no effect: it is looked at once a second or more often."""
        return wait_in_session(self, pid, session, wait_timeout)

    def handle_nohup_output(
        self,
        tmp_file: str,
        session: str,
        success: bool,
        message: str,
        ignore_output: bool = False,
        response_limited_bytes_in_nohup: int | None = None,
    ) -> BashObservation:
        """What such a process wrote, as an observation; `success` and `message` are of `wait_for_process_completion`.
        As in ROCK its exit_code is 0 after every end: the status of the process is not known."""
        return output_of_session(self, tmp_file, success, message, ignore_output, response_limited_bytes_in_nohup)

    def run_in_session(self, action: BashAction) -> BashObservation:
        """`run` with a request; its `check` is "raise" by default."""
        return self.sessions.act(action)

    # ---- files

    def read_file(self, request: ReadFileRequest | str) -> ReadFileResponse:
        """`files.read_text`. InvalidConfig: it is not text in the encoding of the request (UTF-8 by default)."""
        spec = request if isinstance(request, ReadFileRequest) else ReadFileRequest(path=request)
        data = self.files.read(spec.path)
        try:
            return ReadFileResponse(content=data.decode(spec.encoding or "utf-8", spec.errors or "strict"))
        except (UnicodeDecodeError, LookupError) as error:
            raise errors.InvalidConfig(
                f"{spec.path} cannot be read as text: {error}", hint="sandbox.files.read returns bytes"
            ) from None

    def read_file_by_line_range(
        self,
        file_path: str,
        start_line: int | None = None,
        end_line: int | None = None,
        lines_per_request: int = 1000,
        session: str | None = None,
    ) -> ReadFileResponse:
        """Lines `start_line` to `end_line` of a text file, counted from 1; None is the first or the last line.

        `lines_per_request` and `session` have no effect.
        """
        first = 1 if start_line is None else start_line
        if first < 1:
            raise errors.InvalidConfig(f"start_line({first}) must be positive", hint="lines are counted from 1")
        if end_line is not None and end_line < first:
            raise errors.InvalidConfig(
                f"end_line({end_line}) must be greater than start_line({first})", hint="swap both"
            )
        if not 1 <= lines_per_request <= 10_000:
            raise errors.InvalidConfig(
                f"lines_per_request({lines_per_request}) must be between 1 and 10000", hint="omit it"
            )
        kept: list[bytes] = []
        offset = before = 0  # bytes that were read, and line ends among them
        while end_line is None or before < end_line:
            part = self.files.read(file_path, offset, PORTION)
            if not part:
                break
            lines = part.split(b"\n")
            skip = max(0, first - 1 - before)
            wanted = lines[skip : None if end_line is None else end_line - before]
            if wanted:  # each has its line end, but the last of the part
                kept.append(b"\n".join(wanted) + (b"\n" if skip + len(wanted) < len(lines) else b""))
            before += len(lines) - 1
            offset += len(part)
        return ReadFileResponse(content=b"".join(kept).decode("utf-8", "replace"))

    def write_file(self, request: WriteFileRequest) -> WriteFileResponse:
        """`files.write`."""
        info = self.files.write(request.path, request.content)
        return WriteFileResponse(message=f"{info.size} bytes written to {info.path}")

    def write_file_by_path(self, content: str, path: str) -> WriteFileResponse:
        """`write_file` without a request."""
        return self.write_file(WriteFileRequest(content=content, path=path))

    def upload(self, request: UploadRequest) -> UploadResponse:
        """`files.upload`; `success` is False if the local file is missing, as in ROCK."""
        source = Path(request.source_path)
        if request.upload_mode is UploadMode.OSS:
            message = 'the server has no object storage: use upload_mode "auto" or "direct"'
            return UploadResponse(success=False, message=message)
        if source.is_dir():
            self.files.upload_dir(source, request.target_path, merge=True, check="raise")
        elif source.is_file():
            self.files.upload_file(source, request.target_path)
        else:
            return UploadResponse(success=False, message=f"File not found: {request.source_path}")
        return UploadResponse(message=f"uploaded to {request.target_path}", file_name=source.name)

    def upload_by_path(
        self, file_path: str, target_path: str, upload_mode: UploadMode | str = UploadMode.AUTO
    ) -> UploadResponse:
        """`upload` without a request."""
        mode = UploadMode(upload_mode)
        return self.upload(UploadRequest(source_path=file_path, target_path=target_path, upload_mode=mode))


def _iso(seconds: float | None) -> str | None:
    """A time of the epoch as ROCK has it: ISO 8601 to the second, in UTC."""
    return None if not seconds else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
