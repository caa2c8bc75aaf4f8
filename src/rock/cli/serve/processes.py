"""Several rocklet processes of one machine: each has its own event loop, launcher, sandboxes, warm pool and spool.

    server      control plane, proxy, the one port; starts the processes, and restarts one that ends
      │ home/processes/server.sock: each process joins here, and sends heartbeats
      │ home/processes/K/SECRET.sock: commands, and requests to sandboxes
      ▼
    process K   a worker: "local" for 0, else "local-K"; it ends when the server ends, its sandboxes continue

A process joins as any other worker does, with a lease and an epoch, so recovery, fencing and placement are those of a
cluster. Images, layers, logins and logs are shared. docs/decisions/0075-processes-of-a-machine.md
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
from asyncio.subprocess import Process as Child
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from urllib.parse import quote

from rock.admin.preflight import role_of
from rock.cli.serve.home import make_private
from rock.errors import Conflict, NotFound, RockError, Unavailable, Unsupported, from_wire
from rock.http import unix
from rock.protocol.node import PROCESS, RESERVED
from rock.settings import PROCESSES, Settings
from rock.store.base import Workers

log = logging.getLogger("rock.server")

SERVER_SOCKET = "server.sock"
_READY_WITHIN = 60.0  # seconds for the first start of a process
_END_WITHIN = 15.0  # seconds for a process to end after SIGTERM
_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds before a restart
_STABLE = 10.0  # seconds of service after which a process that ends is restarted without a longer pause
_MOST = 32
_LINE = 1 << 16


def has_sandboxes(settings: Settings) -> bool:
    """Whether a server has sandboxes on its own machine."""
    outside = settings.workers or settings.scheduler in ("ray", "kubernetes")
    return not outside and role_of(settings.role) == "all"


def count_of(settings: Settings) -> int:
    """The number of rocklet processes. Unsupported for several where this server has no sandboxes."""
    alone = has_sandboxes(settings)
    if settings.processes > 1 and not alone:
        raise Unsupported(f"--workers {settings.processes}: this server has no sandboxes of its own",
                          hint="set it for the server of a machine with sandboxes")  # fmt: skip
    if settings.processes > 1 and not hasattr(os, "sched_getaffinity"):
        raise Unsupported(f"--workers {settings.processes}: several processes need Linux", hint="use --workers 1")
    if settings.processes or not alone or not hasattr(os, "sched_getaffinity"):
        return settings.processes or 1
    return usual_count(len(os.sched_getaffinity(0)))


def usual_count(cpus: int) -> int:
    """The number of processes for a number of CPUs, unless one is set."""
    return max(1, min(_MOST, cpus // 8))


def name_of(number: int) -> str:
    """The worker name of a process. The first one has the name of the worker of a server with one process, and its
    sandboxes."""
    return f"{RESERVED}-{number}" if number else RESERVED


def number_of(name: str) -> int | None:
    """The process with a worker name; None for another worker."""
    if name == RESERVED:
        return 0
    head, _, number = name.partition("-")
    return int(number) if head == RESERVED and number.isdigit() and str(int(number)) == number else None


def check_left(settings: Settings, count: int) -> None:
    """Conflict when processes that will not run have sandboxes, retained files, volumes or snapshots."""
    folder = settings.home / PROCESSES
    held = [number for number in _numbers(folder) if number >= count and _holds(folder / str(number))]
    if held:
        raise Conflict(
            f"the server does not start with {count} {'process' if count == 1 else 'processes'}: there are sandboxes, "
            f"files, volumes or snapshots of process {max(held)}",
            hint=f"start it with --workers {max(held) + 1}, and remove them first",
        )


async def forget(settings: Settings, workers: Workers, count: int) -> None:
    """Remove processes that will not run: their folders, and their rows in the registry. With one process, the server
    itself has the sandboxes of the first one."""
    folder = settings.home / PROCESSES
    if not folder.exists():
        return  # this server never had several
    for info in await workers.list():
        number = number_of(info.name)
        if number is not None and (number >= count or count == 1):
            if not info.is_lost:
                await workers.lose(info.name, info.epoch)
            with contextlib.suppress(NotFound, Conflict):
                await workers.remove(info.name)
    for number in _numbers(folder):
        if number >= count or count == 1:
            await asyncio.to_thread(shutil.rmtree, folder / str(number), True)


def _numbers(folder: Path) -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(folder) if name.isdigit())
    except FileNotFoundError:
        return []


def _holds(home: Path) -> bool:
    """Whether the home of a process that is not the first one has state. That of a first one is the server's home."""
    places: Iterable[Path] = (home / "run" / "records", home / "volumes", home / "snapshots")
    for place in places:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if any(not name.startswith(".") for name in os.listdir(place)):
                return True
    return False


def socket_in(folder: Path, url: str) -> Path:
    """The socket of a process. Its name is new for each run of the server: a process of a killed server may serve for a
    moment longer, with another key."""
    return folder / f"{url.removeprefix(PROCESS)}.sock"


def direct_socket_in(folder: Path, url: str) -> Path:
    """The socket of a process for direct requests: its name is in the response to any client with access to a sandbox,
    and says nothing about the other one."""
    return folder / f"direct-{hashlib.sha256(url.encode()).hexdigest()[:32]}.sock"


class Processes:
    """The rocklet processes of a server. count: at least two. key: with which they join, and which they require."""

    def __init__(self, settings: Settings, count: int, key: str) -> None:
        self.key = key
        self.count = count
        self.names = [name_of(number) for number in range(count)]
        self._settings = settings
        self._folder = settings.home / PROCESSES
        # Another worker could have learned the name of a process, but not its address.
        self.urls = {name: f"{PROCESS}{secrets.token_hex(16)}" for name in self.names}
        self._members = Members([self._settings_of(number) for number in range(count)])

    def listen(self) -> socket.socket:
        """The socket at which processes join, to be served by the server."""
        make_private(self._folder)
        return unix.listen(self._folder / SERVER_SOCKET)

    def socket_of(self, name: str) -> Path:
        """The socket at which a process serves."""
        return socket_in(self._folder / str(self.names.index(name)), self.urls[name])

    def direct_socket_of(self, name: str) -> Path:
        """The socket at which a process takes direct requests of clients."""
        return direct_socket_in(self._folder / str(self.names.index(name)), self.urls[name])

    def _settings_of(self, number: int) -> Settings:
        shared = self._settings
        folder = self._folder / str(number)
        return replace(
            shared, home=folder if number else shared.home, server_home=shared.home, process=number, share=self.count,
            host="127.0.0.1", port=0, api_key=self.key, worker_key="", tls_cert="", tls_key="", public_names="",
            join=unix.SCHEME + quote(str(self._folder / SERVER_SOCKET)), worker_name=name_of(number),
            advertise=self.urls[name_of(number)], tunnel="", lease_lost="keep", store="", workers="",
            direct_host="" if shared.direct != "all" or shared.tls_cert else shared.host,
            drain_seconds=0.0, sandbox_limit=-(-shared.sandbox_limit // self.count),
            pool_size=-(-shared.pool_size // self.count),
        )  # fmt: skip

    async def open(self) -> None:
        """Start all processes, and wait until they serve. The error of one that does not start."""
        await self._members.open()

    def let_go(self) -> None:
        """Ask every process to end; its sandboxes continue."""
        self._members.let_go()

    async def close(self) -> None:
        """Wait until every process has ended."""
        await self._members.close()


class Members:
    """The processes with these settings, each of which is started again whenever it ends."""

    def __init__(self, settings: Iterable[Settings]) -> None:
        self._members = [_Member(one) for one in settings]

    async def open(self) -> None:
        """Start all, and wait until they serve. The error of one that does not start."""
        for member in self._members:
            member.open()
        try:
            await asyncio.gather(*(member.ready for member in self._members))
        except BaseException:
            await self.close()
            raise

    def signal(self, number: int) -> None:
        """Send a signal to every process that runs."""
        for member in self._members:
            member.signal(number)

    def let_go(self) -> None:
        """Ask every process to end; its sandboxes continue."""
        for member in self._members:
            member.let_go()

    async def close(self) -> None:
        """Wait until every process has ended."""
        self.let_go()
        await asyncio.gather(*(member.close() for member in self._members))


class _Member:
    """One process: it is started again whenever it ends."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._child: Child | None = None
        self._asked: Child | None = None  # to end
        self._task: asyncio.Task[None] | None = None
        self._ending = False

    def open(self) -> None:
        make_private(self._settings.process_dir)
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._keep(), name=f"process-{self._settings.process}")

    def signal(self, number: int) -> None:
        if self._child is not None and self._child.returncode is None:
            self._child.send_signal(number)

    def let_go(self) -> None:
        self._ending = True
        if self._asked is not self._child:  # a second signal would interrupt its removal of what it prepared
            self._asked = self._child
            self.signal(signal.SIGTERM)

    async def close(self) -> None:
        if self._task is None:
            return
        self.let_go()
        child = self._child
        if child is not None:
            try:
                within = _END_WITHIN + self._settings.drain_seconds
                async with asyncio.timeout(within):
                    await child.wait()
            except TimeoutError:
                log.error("process %d (pid %d) did not end within %g s: killed", self._settings.process, child.pid,
                          within)  # fmt: skip
                child.kill()
                await child.wait()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self.ready.done() and not self.ready.cancelled():
            self.ready.exception()  # reported by `open`, or not of interest any more
        self.ready.cancel()

    async def _keep(self) -> None:
        pause = _PAUSE
        while True:
            began = asyncio.get_running_loop().time()
            try:
                status = await self._run()
            except RockError as error:
                if not self.ready.done():
                    self.ready.set_exception(error)
                    return
                status = str(error)
            if self._ending:
                return
            served = asyncio.get_running_loop().time() - began
            pause = _PAUSE if served > _STABLE else min(2 * pause, _LONGEST_PAUSE)
            log.error("process %d ended: %s; it is started again in %.1f s", self._settings.process, status, pause)
            await asyncio.sleep(pause)

    async def _run(self) -> str:
        """One life of the process; returns how it ended. The error of one that does not start."""
        options = [f"-W{option}" for option in sys.warnoptions]
        child = await asyncio.create_subprocess_exec(
            sys.executable, *options, "-m", "rock.cli.serve.member", stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, start_new_session=True, cwd="/", limit=_LINE,
        )  # fmt: skip
        self._child = child
        try:
            assert child.stdin is not None and child.stdout is not None
            fields = {name: str(value) if isinstance(value, Path) else value
                      for name, value in asdict(self._settings).items()}  # fmt: skip
            # The pipe stays open: its end is the end of the server.
            with contextlib.suppress(ConnectionError):
                child.stdin.write(json.dumps(fields).encode() + b"\n")
                await child.stdin.drain()
            try:
                async with asyncio.timeout(_READY_WITHIN):
                    line = await child.stdout.readline()
            except (TimeoutError, ValueError):
                raise Unavailable(f"rocklet process {self._settings.process} did not start within {_READY_WITHIN:g} s",
                                  hint="look into its log in ROCK_HOME/logs") from None  # fmt: skip
            said = json.loads(line) if line else None
            if isinstance(said, dict) and "error" in said:
                await child.wait()
                raise from_wire(said)
            if said is not None and not self.ready.done():
                self.ready.set_result(None)
            status = await child.wait()
            if said is None and not self.ready.done():
                raise Unavailable(f"rocklet process {self._settings.process} ended before it served: status {status}",
                                  hint="look into its log in ROCK_HOME/logs")  # fmt: skip
            return f"status {status}"
        finally:
            if child.returncode is None and not self._ending:
                child.kill()
                await child.wait()
            if child.stdin is not None:
                child.stdin.close()
