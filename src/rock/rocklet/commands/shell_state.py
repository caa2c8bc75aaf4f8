"""The state of a bash as a script that gives it to another one: variables, functions, aliases, options, traps, working
directory, umask and limits.

Not carried: background jobs, open descriptors, history, the directory stack, `$!`, the sequence of `$RANDOM`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets

from rock.errors import RockError
from rock.protocol.action import BashAction
from rock.rocklet.commands.session import Session
from rock.rocklet.commands.shell_protocol import exports
from rock.runtime.base import Files, Handle, Runtime
from rock.runtime.pools import TakesFiles

NOT_CARRIED = "background jobs, open descriptors, history, directory stack, $!, sequence of $RANDOM"
_MOST = 4 << 20  # bytes
_PATIENCE = 10.0  # seconds
_SIGNALS = "HUP INT QUIT USR1 USR2 PIPE ALRM TERM CHLD CONT TSTP TTIN TTOU WINCH DEBUG ERR RETURN"
_LIMITS = "c d f n s t v"

# In a subshell, so that `set -e`, `set -x` and read-only variables have no effect on the shell itself. The options are
# written first, because the subshell changes them, and applied last. Built-in commands without substitutions: the
# subshell is the only fork.
_DUMP = """{{ ( set +o; printf '%s\n' {mark}; set +eux; declare -p; declare -f; alias -p; shopt -p
trap -p {signals}; umask -p
for l in {limits}; do printf 'ulimit -S%s ' $l; ulimit -S$l; done
printf 'builtin cd -- %q\n%s\n' "$PWD" {mark} ) > {path}; }} 2>/dev/null"""


def carries(session: Session) -> bool:
    """Whether the state of a session's shell can be carried."""
    return session.shell.dialect.is_bash and session.spec.pty is None and session.closed is None


async def read(session: Session, runtime: Runtime, handle: Handle) -> str | None:
    """The state of the shell; its caller holds `between_commands`. None when it cannot be read."""
    if not carries(session) or not isinstance(runtime, Files):
        return None
    path = f"/tmp/.rock-state-{secrets.token_hex(8)}"
    mark = f"rock-{secrets.token_hex(16)}"
    command = _DUMP.format(signals=_SIGNALS, limits=_LIMITS, path=path, mark=mark)
    try:
        await session.run_aside(BashAction(session=session.spec.session, command=command, timeout=_PATIENCE))
        taken = runtime.take_file(handle, path, _MOST + 1) if isinstance(runtime, TakesFiles) else None
        data = await _read(runtime, handle, path) if taken is None else taken
    except RockError:
        await _remove(runtime, handle, path)
        return None
    options, found, rest = data.decode("utf-8", "surrogateescape").partition(f"{mark}\n")
    if not found or len(data) > _MOST or not rest.endswith(f"\n{mark}\n"):
        return None
    return rest.removesuffix(f"{mark}\n") + options


async def give(session: Session, state: str, env: dict[str, str], runtime: Runtime, handle: Handle) -> None:
    """Give a new shell the state of another one. env: variables that its sandbox sets to other values. RockError."""
    assert isinstance(runtime, Files)
    path = f"/tmp/.rock-state-{secrets.token_hex(8)}"
    fd, token = await runtime.open_write(handle, path, mode=0o644)  # its user need not be root
    try:
        await asyncio.to_thread(_write, fd, state.encode("utf-8", "surrogateescape") + exports(env))
        await runtime.commit_write(handle, token)
        # From a file, because each line is then a command of its own: what a shell refuses, such as its own read-only
        # variables, is skipped.
        command = f"{{ . {path}; }} >/dev/null 2>/dev/null"
        await session.run_aside(BashAction(session=session.spec.session, command=command, timeout=_PATIENCE))
    finally:
        await _remove(runtime, handle, path)


async def _read(runtime: Files, handle: Handle, path: str) -> bytes:
    """The content of a file, which is removed. RockError, also where it stays."""
    fd = await runtime.open_read(handle, path)
    with os.fdopen(fd, "rb") as file:
        data = file.read(_MOST + 1)
    await _remove(runtime, handle, path)
    return data


async def _remove(runtime: Files, handle: Handle, path: str) -> None:
    with contextlib.suppress(RockError):
        await runtime.remove(handle, path)


def _write(fd: int, data: bytes) -> None:
    with os.fdopen(fd, "wb") as file:
        file.write(data)
