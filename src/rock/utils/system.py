"""Facts of this machine, under ROCK's path."""

from __future__ import annotations

import asyncio
import socket

from rock.errors import InvalidConfig
from rock.protocol.action import BACKGROUND_PID

__all__ = ["extract_nohup_pid", "find_free_port", "get_host_ip"]


def extract_nohup_pid(nohup_output: str) -> int:
    """The process id that a command for the background printed. InvalidConfig where there is none."""
    found = BACKGROUND_PID.search(nohup_output)
    if found is None:
        hint = "the command has to print PIDSTART, $! and PIDEND"
        raise InvalidConfig(f"there is no process id in {nohup_output[:200]!r}", hint=hint)
    return int(found[1])


async def find_free_port(max_attempts: int = 10, sleep_between_attempts: float = 0.1) -> int:
    """A TCP port of this machine that was free a moment ago. OSError after `max_attempts`."""
    for attempt in range(max_attempts):
        try:
            with socket.socket() as probe:
                probe.bind(("", 0))
                return int(probe.getsockname()[1])
        except OSError:
            if attempt == max_attempts - 1:
                raise
            await asyncio.sleep(sleep_between_attempts)
    raise InvalidConfig(f"max_attempts={max_attempts} permits no attempt", hint="give max_attempts=1 or more")


def get_host_ip() -> str:
    """The address of this machine that its name leads to; 127.0.0.1 where it leads nowhere."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"
