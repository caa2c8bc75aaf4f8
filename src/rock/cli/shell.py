"""`rock shell`: an interactive terminal in a sandbox."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from rock.cli.output import busy
from rock.errors import NotFound


def shell(
    target: Annotated[str, typer.Argument(metavar="ID|IMAGE", help="A running sandbox, or an image for a new one.")],
    command: Annotated[str | None, typer.Option("--command", help="Run this instead of a shell.")] = None,
    user: Annotated[str | None, typer.Option("--user", "-u", help="User inside.")] = None,
    cwd: Annotated[str | None, typer.Option("--cwd", "-w", help="Folder to begin in.")] = None,
    memory: Annotated[str, typer.Option("--memory", "-m", help="Memory limit of a new one.")] = "2g",
    cpus: Annotated[float, typer.Option("--cpus", "-c", help="CPU limit of a new one.")] = 2.0,
    network: Annotated[str | None, typer.Option(help="none, nat or host, of a new one.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave a new one running.")] = False,
) -> None:
    """Open a terminal in a sandbox. Given an image, a new sandbox is started and stopped afterwards."""
    import asyncio

    from rock.cli.sandbox import attached, new_sandbox
    from rock.cli.terminal import attend

    fresh = False
    try:
        sandbox = attached(target)
    except NotFound:
        sandbox, fresh = new_sandbox(target, memory=memory, cpus=cpus, network=network), True
        with busy(f"starting a sandbox of {target}"):
            sandbox.start()
    try:
        status = asyncio.run(attend(sandbox, {"command": command, "user": user, "cwd": cwd}))
    finally:
        if fresh and not keep:
            sandbox.close()
    if fresh and keep:
        print(sandbox.sandbox_id, file=sys.stderr)
    raise typer.Exit(status)
