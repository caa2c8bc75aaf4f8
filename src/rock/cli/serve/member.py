"""One of several rocklet processes of a machine: `python -m rock.cli.serve.member`, started by processes.py for a
server, and by group.py for a worker that joins one.

Standard input: one line with the settings as JSON; its end is the end of the server. Standard output: one line when the
process serves, or when it does not start.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rock import faults
from rock.cli.serve.home import Home
from rock.cli.serve.processes import direct_socket_in, socket_in
from rock.cli.serve.serve import Rocklet, http_over, listen, prepare_process, run, stop_on_signals, when_input_ends
from rock.errors import Conflict, RockError, ServerError
from rock.http import unix
from rock.http.middleware import dropping
from rock.protocol.node import PROCESS
from rock.settings import Settings
from rock.telemetry import set_up_logs

log = logging.getLogger("rock.server")

_LOCK_WITHIN = 20.0  # seconds for an earlier process with this number to end
_LOOK = 0.1
_early = asyncio.Event()  # SIGTERM came before the process served


class MemberHome(Home):
    """The home of a process: its lock, and for a worker its address. Clients find a server by the server's home."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.process_dir)

    def take(self) -> None:
        """Lock it, unless `wait` has. Conflict, InvalidConfig."""
        if self._lock is None:
            self.lock()

    async def wait(self) -> None:
        """Lock it: a process of a killed server may need a moment to end. Conflict."""
        loop = asyncio.get_running_loop()
        end = loop.time() + _LOCK_WITHIN
        while True:
            try:
                self.take()
                return
            except Conflict:
                if loop.time() > end:
                    raise
                await asyncio.sleep(_LOOK)


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM, or until the process that started this one ends: at the sockets of a process of a server,
    or at a port of a worker that joins one. Conflict, InvalidConfig."""
    home = MemberHome(settings)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, _early.set)
    await home.wait()
    await (_serve_server(settings, home) if settings.advertise.startswith(PROCESS) else _serve_worker(settings, home))


def _stop_if_early() -> None:
    """A SIGTERM that came while the process started ends it now, in the same way: it removes what it prepared."""
    if _early.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


def _end_once() -> None:
    """Ignore a further SIGTERM while the process removes what it prepared. Its parent kills it after some time."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: None)


async def _serve_worker(settings: Settings, home: MemberHome) -> None:
    listener = listen(settings.host, settings.port)
    try:
        rocklet = Rocklet(replace(settings, port=listener.getsockname()[1]), home=home)
        await rocklet.open()
    except BaseException:
        listener.close()
        raise
    try:
        http = http_over(dropping(rocklet.app) if faults.active else rocklet.app, settings,
                         frames=settings.multiplex == "on")

        async def drain() -> None:
            try:
                await rocklet.observed.drain(settings.drain_seconds)
            finally:
                rocklet.let_go()

        assert rocklet.membership is not None  # group.py requires --join
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, rocklet.membership.leave)  # rock worker drain --self
        loop.add_signal_handler(signal.SIGUSR2, rocklet.membership.evacuate)
        with stop_on_signals(http, drain):
            when_input_ends(lambda: os.kill(os.getpid(), signal.SIGTERM))  # the sandboxes continue
            _stop_if_early()
            gc.freeze()
            gc.enable()
            home.write(settings.host, listener.getsockname()[1], settings.tls_cert, joins=True)
            _say({"pid": os.getpid()})
            await http.serve(sockets=[listener])
    finally:
        _end_once()
        listener.close()
        await rocklet.close()  # last: it unlocks the home for the next process, which listens at the same port


async def _serve_server(settings: Settings, home: MemberHome) -> None:
    rocklet = Rocklet(settings, home=home)
    for old in settings.process_dir.glob("*.sock"):
        old.unlink(missing_ok=True)
    listener = unix.listen(socket_in(settings.process_dir, settings.advertise))
    at = _listen_directly(settings, rocklet)
    try:
        await rocklet.open()
    except BaseException:
        for one in (listener, *at):
            one.close()
        raise
    try:
        http = http_over(dropping(rocklet.app) if faults.active else rocklet.app, ends_within=1)
        direct = http_over(rocklet.direct, ends_within=1, frames=settings.multiplex == "on")

        async def drain() -> None:
            rocklet.let_go()
            direct.should_exit = True

        with stop_on_signals(http, drain):
            when_input_ends(lambda: os.kill(os.getpid(), signal.SIGTERM))  # the sandboxes continue
            _stop_if_early()
            gc.freeze()
            gc.enable()
            _say({"pid": os.getpid()})
            async with asyncio.TaskGroup() as group:
                if at:
                    group.create_task(direct.serve(sockets=at), name="direct requests")
                await http.serve(sockets=[listener])
                direct.should_exit = True
    finally:
        _end_once()
        for one in at:
            one.close()
        await rocklet.close()
        listener.close()


def _listen_directly(settings: Settings, rocklet: Rocklet) -> list[socket.socket]:
    """Listeners for direct requests of clients: a Unix socket, and with ROCK_DIRECT=all a port at the address of the
    server."""
    if settings.direct == "off" or rocklet.membership is None:
        return []
    found = [unix.listen(direct_socket_in(settings.process_dir, settings.advertise))]
    if settings.direct_host:
        try:
            found.append(listen(settings.direct_host, 0))
            rocklet.membership.direct_port = int(found[-1].getsockname()[1])
        except RockError as error:
            log.warning("no port for direct requests: %s", error)
    return found


def _say(line: dict[str, object]) -> None:
    os.write(1, json.dumps(line, default=repr).encode() + b"\n")


def main() -> int:
    gc.disable()
    with open(0, "rb", buffering=0, closefd=False) as server:  # unbuffered: the rest is for `when_input_ends`
        fields: dict[str, Any] = json.loads(server.readline())
    fields |= {name: Path(fields[name]) for name in ("home", "server_home")}
    settings = Settings(**fields)
    set_up_logs(settings.log_level, settings.log_dir, settings.log_format, f"process-{settings.process}.log")
    prepare_process(settings)
    try:
        run(serve(settings))
    except RockError as error:
        _say(error.to_wire())
        return 1
    except OSError as error:
        _say(ServerError(f"rocklet process {settings.process} does not start: {error}",
                         hint="look into its log in ROCK_HOME/logs").to_wire())  # fmt: skip
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
