"""`rock cp` and `rock port-forward`: files and folders into and out of a sandbox, and local ports to ports in a
sandbox."""

from __future__ import annotations

import os
import posixpath
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rock.cli.output import fail, transfer
from rock.errors import InvalidConfig, NotFound, RockError, SandboxError

if TYPE_CHECKING:
    from rock.sdk.forward import PortForward
    from rock.sync import Sandbox


def cp(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A path here, or ID:PATH.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="A path here, or ID:PATH.")],
) -> None:
    """Copy a file or a folder into a sandbox or out of it; one side is ID:PATH.

    As with `cp -r`, what is copied to an existing folder, or to a name that ends in a slash, is put into it.
    """
    from rock.cli.commands.sandbox import attached

    there, here = _remote(source), _remote(target)
    if (there is None) == (here is None):
        raise typer.BadParameter("one of the two sides is ID:PATH, and the other a path here", param_hint="SRC DST")
    if there is not None:
        _download(attached(there[0]), there[1], Path(target), target.endswith(("/", os.sep)))
    elif here is not None:
        _upload(attached(here[0]), Path(source), here[1])


def _remote(text: str) -> tuple[str, str] | None:
    """(id, path) of "id:path"; None for a local path, with a drive letter or a separator before the colon."""
    name, colon, path = text.partition(":")
    if not colon or len(name) < 2 or "/" in name or "\\" in name:
        return None
    if not path.startswith("/"):
        raise InvalidConfig(f"{text}: the path inside has to be absolute, like {name}:/tmp/file")
    return name, path


def _upload(sandbox: Sandbox, source: Path, target: str) -> None:
    if not source.exists():
        raise NotFound(f"{source} does not exist here")
    if target.endswith("/") or _kind(sandbox, target) == "directory":
        target = posixpath.join(target, source.resolve().name)
    folder = source.is_dir()
    total = _size_of(source) if folder else source.stat().st_size
    with transfer(f"{source.name} ->", total) as advance:
        if folder:
            sandbox.fs.upload_dir(source, target, merge=True, check="raise", progress=advance)
        else:
            sandbox.fs.upload_file(source, target, progress=advance)


def _download(sandbox: Sandbox, source: str, target: Path, into: bool) -> None:
    info = sandbox.fs.stat(source)
    name = posixpath.basename(source.rstrip("/"))
    if (into or target.is_dir()) and name:
        target = target / name
    if info.kind == "directory":
        with transfer(f"{name} ->", None) as advance:
            left_out = sandbox.fs.download_dir(source, target, progress=advance)
        for member in left_out:
            print(f"left out: {member} (a link that leads out, or no file)", file=sys.stderr)
        return
    with transfer(f"{name} ->", info.size) as advance:
        sandbox.fs.download_file(source, target, progress=advance)


def _kind(sandbox: Sandbox, path: str) -> str | None:
    try:
        return sandbox.fs.stat(path).kind
    except NotFound:
        return None


def _size_of(folder: Path) -> int:
    return sum(entry.lstat().st_size for entry in folder.rglob("*") if entry.is_file() and not entry.is_symlink())


# ---- rock port-forward ----

def port_forward(
    target: Annotated[str, typer.Argument(metavar="ID", help="Id of a sandbox, or how it begins.")],
    ports: Annotated[
        list[str],
        typer.Argument(metavar="[LOCAL:]REMOTE...", help="A port inside, and the one here; 0 is one that is free."),
    ],
) -> None:
    """Listen on 127.0.0.1 and carry connections to ports in a sandbox, until Ctrl-C."""
    import asyncio

    from rock.cli.commands.sandbox import attached
    from rock.protocol.routes import ROUTES
    from rock.sdk.forward import PortForward
    from rock.sdk.sandbox.link import headers_of

    pairs = [_pair(text) for text in ports]
    sandbox = attached(target)
    sandbox_id = sandbox.sandbox_id or ""
    wanted = []
    for local, remote in pairs:
        path = ROUTES["tunnel"].url(sandbox_id=sandbox_id, port=str(remote))
        wanted.append((PortForward(sandbox.url, path, headers_of(sandbox.config), local), remote))
    asyncio.run(_attend(sandbox_id, wanted))


def _pair(text: str) -> tuple[int, int]:
    """(local, remote)."""
    local, colon, remote = text.rpartition(":")
    numbers = [int(part) if part.isascii() and part.isdigit() else -1 for part in (local if colon else remote, remote)]
    if not (0 <= numbers[0] < 65536 and 0 < numbers[1] < 65536):
        raise InvalidConfig(f"{text!r} is not [LOCAL:]REMOTE", hint="two ports, like 8080:80, or one")
    return numbers[0], numbers[1]


async def _attend(sandbox_id: str, wanted: list[tuple[PortForward, int]]) -> None:
    """Forward until a signal, or until the sandbox has ended."""
    import asyncio
    import contextlib
    import signal

    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def failed(error: RockError) -> None:
        if not isinstance(error, SandboxError | NotFound):
            fail(error)
        elif not ended.done():
            ended.set_exception(error)

    def enough() -> None:
        if not ended.done():
            ended.set_result(None)

    async with contextlib.AsyncExitStack() as stack:
        for forward, remote in wanted:
            forward.failed = failed
            await stack.enter_async_context(forward.listening())
            print(f"{forward.address} -> {sandbox_id}:{remote}", flush=True)
        with contextlib.suppress(NotImplementedError):  # on Windows Ctrl-C comes as KeyboardInterrupt
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, enough)
        await ended
    print("no longer forwarded", file=sys.stderr)
