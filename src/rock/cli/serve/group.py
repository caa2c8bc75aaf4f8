"""Several rocklet processes on a machine that joins a server: `rocklet --join URL --workers N`.

    this process    home, its lock, restarts; no sandboxes and no requests
      │ settings on standard input, whose end is the end of this process
      ▼
    process K       a worker of its own: NAME for 0, else NAME-K, at port PORT + K

Each process joins the server, with a lease and an epoch, and has its own event loop, launcher, sandboxes, warm pool and
spool. Images, logins and logs are shared. docs/decisions/0075-processes-of-a-machine.md
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import urlsplit

from rock.cli.serve.home import Home, make_private
from rock.cli.serve.processes import Members, check_left
from rock.errors import InvalidConfig, Unsupported
from rock.rocklet.membership import IDENTITY
from rock.settings import NOTE, OWNER_KEY, PROCESSES, Settings

log = logging.getLogger("rock.server")

_LAST_PORT = 65535


def settings_of(settings: Settings, count: int) -> list[Settings]:
    """The settings of each process. Unsupported without a server to join; InvalidConfig for ports and names that
    cannot be derived."""
    if not settings.join:
        raise Unsupported(f"--workers {count}: several processes are workers of a server, and this rocklet joins none",
                          hint="add --join URL, or start one rocklet for each ROCK_HOME and port")  # fmt: skip
    if settings.port + count - 1 > _LAST_PORT:
        raise InvalidConfig(f"--workers {count} needs the ports {settings.port} to {settings.port + count - 1}",
                            hint=f"choose a --port below {_LAST_PORT - count + 2}, or 0 for free ports")  # fmt: skip
    name = settings.worker_name or re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[: 63 - len(f"-{count}")]
    folder = settings.home / PROCESSES
    return [
        replace(
            settings, home=folder / str(number) if number else settings.home, server_home=settings.home,
            process=number, processes=1, share=count, port=settings.port + number if settings.port else 0,
            worker_name=f"{name}-{number}" if number else name, advertise=_advertised(settings.advertise, number),
            sandbox_limit=-(-settings.sandbox_limit // count), pool_size=-(-settings.pool_size // count),
        )
        for number in range(count)
    ]  # fmt: skip


def _advertised(url: str, number: int) -> str:
    if not url:
        return ""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        port = None
    if port is None or port + number > _LAST_PORT:
        raise InvalidConfig(f"--advertise {url} has no port to which the number of a process can be added",
                            hint="--advertise http://HOST:PORT; process K is reached at PORT + K")  # fmt: skip
    return parts._replace(netloc=f"{parts.netloc.rpartition(':')[0]}:{port + number}").geturl()


async def serve(settings: Settings) -> None:
    """Run the processes until SIGTERM or SIGINT. The error of one that does not start; Conflict while a process that
    would not run has sandboxes."""
    each = settings_of(settings, settings.processes)
    home = Home(settings.home)
    home.take()
    try:
        check_left(settings, settings.processes)
        _move_identity(settings, to_process=True)
        members = Members(each)
        stop = asyncio.Event()
        with _signals(members, stop):
            opening = asyncio.create_task(members.open(), name="processes")
            stopping = asyncio.create_task(stop.wait(), name="stop")
            try:
                await asyncio.wait({opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if opening.done():
                    opening.result()
                    _write_note(home, settings)
                    log.info("%d rocklet processes, home %s, pid %d", len(each), settings.home, os.getpid())
                    print(f"{len(each)} rocklet processes serve (home {settings.home})", flush=True)
                    await stopping
            finally:
                for task in (opening, stopping):
                    task.cancel()
                await asyncio.gather(opening, stopping, return_exceptions=True)
                await members.close()
    finally:
        home.release()


def _write_note(home: Home, settings: Settings) -> None:
    """The address and the key of the first process, for clients with this home."""
    first = settings.home / PROCESSES / "0"
    home.owner_key = (first / OWNER_KEY).read_text().strip()
    home.write(settings.host, int(json.loads((first / NOTE).read_text())["port"]), settings.tls_cert, joins=True)


@contextlib.contextmanager
def _signals(members: Members, stop: asyncio.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set `stop`; the signals of `rock worker drain --self` are passed to all processes."""
    loop = asyncio.get_running_loop()
    ends, drains = (signal.SIGTERM, signal.SIGINT), (signal.SIGUSR1, signal.SIGUSR2)
    for number in ends:
        loop.add_signal_handler(number, stop.set)
    for number in drains:
        loop.add_signal_handler(number, members.signal, number)
    try:
        yield
    finally:
        for number in (*ends, *drains):
            loop.remove_signal_handler(number)


def settle(settings: Settings) -> None:
    """Prepare a locked home for one rocklet, where several processes may have run before. Conflict while one that would
    not run has sandboxes, files, volumes or snapshots."""
    folder = settings.home / PROCESSES
    if not folder.exists():
        return
    check_left(settings, 1)
    _move_identity(settings, to_process=False)
    shutil.rmtree(folder, ignore_errors=True)


def _move_identity(settings: Settings, *, to_process: bool) -> None:
    """Keep the identity of the first worker when the number of processes changes from or to one."""
    sole, first = settings.home / IDENTITY, settings.home / PROCESSES / "0" / IDENTITY
    source, target = (sole, first) if to_process else (first, sole)
    if to_process:
        make_private(settings.home / PROCESSES)
        make_private(first.parent)
    if source.exists():
        os.replace(source, target)
