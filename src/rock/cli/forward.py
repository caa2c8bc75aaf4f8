"""`rock port-forward`: ports of this machine that lead to ports in a sandbox."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from rock.cli.output import fail
from rock.errors import InvalidConfig, NotFound, RockError, SandboxError

if TYPE_CHECKING:
    from rock.sdk.forward import PortForward


def port_forward(
    target: Annotated[str, typer.Argument(metavar="ID", help="Id of a sandbox, or how it begins.")],
    ports: Annotated[
        list[str],
        typer.Argument(metavar="[LOCAL:]REMOTE...", help="A port inside, and the one here; 0 is one that is free."),
    ],
) -> None:
    """Listen on 127.0.0.1 and carry connections to ports in a sandbox, until Ctrl-C."""
    import asyncio

    from rock.cli.sandbox import attached
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
    """Forward until a signal, or until there is no sandbox any more."""
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
