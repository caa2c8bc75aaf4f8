"""`rock port-forward`: local ports to ports in a sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys

import click

from rock.cli.connection import connected
from rock.cli.output import fail, short
from rock.cli.parsing import INTERRUPTED, command, sandbox_argument
from rock.errors import InvalidConfig, NotFound, RockError, SandboxError
from rock.protocol.routes import ROUTES
from rock.sdk.forward import PortForward
from rock.sdk.sandbox.link import headers_of

_PORTS = re.compile(r"(?:(\d{1,5}):)?(\d{1,5})")


def port_pairs(texts: tuple[str, ...], option: str = "") -> list[tuple[int, int]]:
    """(local, remote) of each [LOCAL:]REMOTE; local is 0 for any free port. InvalidConfig."""
    pairs = []
    for text in texts:
        match = _PORTS.fullmatch(text)
        local, remote = (int(match[1] or match[2]), int(match[2])) if match else (-1, -1)
        if not (0 <= local < 65536 and 0 < remote < 65536):
            raise InvalidConfig(f"{option} {text!r} is not [LOCAL:]REMOTE".strip(),
                                hint="write two ports like 8080:80, or one")
        pairs.append((local, remote))
    return pairs


@command("port-forward", example="rock port-forward web 8080:80\nrock port-forward web 5432 0:6379")
@sandbox_argument
@click.argument("ports", metavar="[LOCAL:]REMOTE...", nargs=-1, required=True)
def port_forward(sandbox: str, ports: tuple[str, ...]) -> int:
    """Forward local ports to a sandbox.

    Listens on 127.0.0.1 until Ctrl-C. LOCAL 0 selects a free port; without LOCAL it is the same port.
    """
    pairs = port_pairs(ports)
    target = connected(sandbox)
    sandbox_id = target.sandbox_id or ""
    wanted = []
    for local, remote in pairs:
        path = ROUTES["tunnel"].url(sandbox_id=sandbox_id, port=str(remote))
        wanted.append((PortForward(target.url, path, headers_of(target.config), local), remote))
    return asyncio.run(_attend(sandbox_id, wanted))


async def _attend(sandbox_id: str, wanted: list[tuple[PortForward, int]]) -> int:
    """Forward until a signal, or until the sandbox has ended."""
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
            print(f"{forward.address} -> {short(sandbox_id)}:{remote}", flush=True)
        with contextlib.suppress(NotImplementedError):  # on Windows Ctrl-C comes as KeyboardInterrupt
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, enough)
        await ended
    print("forwarding stopped", file=sys.stderr)
    return INTERRUPTED
