"""The sandbox backend of LangChain's deepagents.

    from rock.integrations.deepagents import RockBackend

    with RockBackend("python:3.11") as backend:
        create_deep_agent(model, backend=backend).invoke(...)
"""

from __future__ import annotations

import posixpath
from typing import Any, Self

from deepagents.backends.protocol import ExecuteResponse, FileDownloadResponse, FileUploadResponse
from deepagents.backends.sandbox import BaseSandbox

from rock import errors
from rock.sync import Sandbox

LABELS = {"rock.integration": "deepagents"}  # of all sandboxes of this class
_TIMEOUT = 30 * 60  # seconds
_OUTPUT = 16 << 20  # bytes; the tools of deepagents read files by commands
_MOST_FILE = 100 << 20  # bytes of one file
_MERGED = 'exec "$@" 2>&1'  # both outputs in the order of arrival


class RockBackend(BaseSandbox):  # type: ignore[misc]
    """Files and commands of an agent in a sandbox, whose image has python3 and grep.

    image: of a new sandbox, which `close` stops. sandbox: a running one, which `close` leaves. timeout: seconds of a
    command. working_dir: of commands; None is that of the image. options: of `rock.Sandbox`.
    """

    def __init__(
        self,
        image: str | None = None,
        *,
        sandbox: Sandbox | None = None,
        timeout: float = _TIMEOUT,
        max_output_bytes: int = _OUTPUT,
        working_dir: str | None = None,
        **options: Any,
    ) -> None:
        if (sandbox is None) == (image is None) or (sandbox is not None and options):
            raise errors.InvalidConfig("RockBackend uses a new sandbox, or one that runs",
                                       hint="pass an image and options, or sandbox= alone")
        self._own = sandbox is None
        if sandbox is None:
            options["labels"] = {**LABELS, **options.get("labels", {})}
            options.setdefault("idle_timeout", 3600)
            sandbox = Sandbox(image, **options)
            sandbox.start()
        self.sandbox = sandbox
        self._timeout = timeout
        self._limit = max_output_bytes
        self._directory = working_dir

    @property
    def id(self) -> str:
        return str(self.sandbox.sandbox_id)

    def execute(self, command: str, *, timeout: int | None = None) -> ExecuteResponse:
        """Run a command by the image's shell. A timeout kills its process tree, and has the exit code 124."""
        limit = self._timeout if timeout is None else timeout
        argv = ["/bin/sh", "-c", _MERGED, "sh", "/bin/sh", "-c", command]
        done = self.sandbox.exec(argv, timeout=limit or None, cwd=self._directory, max_output_bytes=self._limit)
        text = done.stdout
        if done.timed_out:
            text += f"\n[the command took longer than {limit:g} s; its process tree was killed]"
        return ExecuteResponse(output=text, exit_code=124 if done.timed_out else done.exit_code,
                               truncated=done.stdout_dropped > 0)  # fmt: skip

    def upload_files(self, files: list[tuple[str, bytes]]) -> list[FileUploadResponse]:
        """Write files. An error of one is in its response."""
        return [FileUploadResponse(path=path, error=self._upload(path, data)) for path, data in files]

    def _upload(self, path: str, data: bytes) -> str | None:
        if not posixpath.isabs(path):
            return "invalid_path"
        try:
            self.sandbox.files.write(path, data)
        except errors.ClientError as error:
            return self._reason(error, path)
        return None

    def download_files(self, paths: list[str]) -> list[FileDownloadResponse]:
        """Read files. An error of one is in its response."""
        return [self._download(path) for path in paths]

    def _download(self, path: str) -> FileDownloadResponse:
        if not posixpath.isabs(path):
            return FileDownloadResponse(path=path, error="invalid_path")
        try:
            data = self.sandbox.files.read(path, length=_MOST_FILE + 1)
        except errors.ClientError as error:
            return FileDownloadResponse(path=path, error=self._reason(error, path))
        if len(data) > _MOST_FILE:
            return FileDownloadResponse(path=path, error=f"the file is over {_MOST_FILE >> 20} MiB")
        return FileDownloadResponse(path=path, content=data)

    def _reason(self, error: errors.ClientError, path: str) -> str:
        """The error of deepagents for an error of a file. An error that concerns the sandbox is raised."""
        if isinstance(error, errors.SandboxError | errors.Unauthorized | errors.Forbidden):
            raise error
        try:
            if self.sandbox.files.stat(path).kind == "directory":
                return "is_directory"
        except errors.NotFound:
            self.sandbox.exec(["/bin/sh", "-c", ":"], timeout=30)  # raises when the sandbox is what does not exist
        except errors.ClientError:
            pass
        if isinstance(error, errors.PermissionDenied):
            return "permission_denied"
        return "file_not_found" if isinstance(error, errors.NotFound) else "invalid_path"

    def close(self) -> None:
        """Stop a sandbox that this object has started. No effect when that was done."""
        if self._own:
            self.sandbox.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
