"""A command by a file in the sandbox: a shell reads its pipe byte by byte, so long ones do not go by it."""

from __future__ import annotations

import asyncio

from rock.errors import NotFound, StorageFull
from rock.protocol.action import CreateBashSessionRequest
from rock.rocklet import shell
from rock.runtime.base import Files, Handle, Runtime

LONG = 16 << 10  # characters from which on a command goes by a file


def _path(spec: CreateBashSessionRequest, token: int) -> str:
    return f"/tmp/.rock-{spec.session}-{token}"


async def write(runtime: Files, handle: Handle, spec: CreateBashSessionRequest, token: int, command: str) -> str:
    """Write a command of a session to its file; what the shell is told instead of it. StorageFull."""
    path = _path(spec, token)
    fd, commit = await runtime.open_write(handle, path, mode=0o600, user=spec.remote_user)
    try:
        await asyncio.to_thread(_write_and_close, fd, shell.encode(command))
    except OSError as error:
        await runtime.abort_write(handle, commit)
        raise StorageFull(
            f"there is no room for a command of {len(command)} characters: {error.strerror or error}",
            sandbox_id=handle.id,
            hint="free some space in the sandbox's /tmp, or on the server's disk",
        ) from None
    except BaseException:
        await runtime.abort_write(handle, commit)
        raise
    await runtime.commit_write(handle, commit)
    return f'eval "$(<{shell.quote(path)})"'


async def remove(runtime: Runtime, handle: Handle, spec: CreateBashSessionRequest, token: int) -> None:
    """Remove the file of a command, if it has one."""
    if isinstance(runtime, Files):
        try:
            await runtime.remove(handle, _path(spec, token))
        except NotFound:
            pass


def _write_and_close(fd: int, data: bytes) -> None:
    with open(fd, "wb") as file:
        file.write(data)
