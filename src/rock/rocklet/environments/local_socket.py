"""A Unix socket by which clients on the same machine borrow the pipes of an environment and use it without the server.

A step through the server wakes four processes; a step over the environment's own pipes wakes two. A client that may
connect to this Unix socket gets the two descriptors for as long as it holds the connection:

    client: {"sandbox", "env", "token", "memory"}  token: from the response of make_env; memory: false for none
    server: {"timeout": seconds} with the descriptors (requests, responses), or an error in wire format; a third
            descriptor and {"offset"} where there is memory for large responses: the environment's part begins there
    client: {"playing": true}                      now and then: the environment is not idle
    client: {"overdue": "step"}                    a request exceeded its timeout: the environment is killed
    client: {"nonsense": why}                      a response was invalid: likewise
    server: an error                               the environment has ended, or the pipes are taken back
    either closes                                  the pipes are the server's again

One message is one packet. Only the owner can enter the folder of the socket, so a connected client is that user, or
root.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson

from rock.errors import InvalidConfig, NotFound, RockError
from rock.http.peers import is_ours, owner_of
from rock.protocol.env import DOOR, Door
from rock.rocklet.environments.host import EnvHost
from rock.rocklet.sandbox import Supervisor

log = logging.getLogger("rock.envs")

_PACKET = 4096
_GREETING_TIMEOUT = 10.0
_CONNECTIONS = 1024


class LocalSocket:
    """Listens in `folder`. find: returns the sandbox of an id, or raises its error."""

    def __init__(self, folder: Path, find: Callable[[str], Awaitable[Supervisor]]) -> None:
        self.path = folder / DOOR
        self._find = find
        self._socket: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Listen. Without Unix sockets of type SEQPACKET there is no local socket, and all requests go through the
        server."""
        if not hasattr(socket, "SOCK_SEQPACKET"):
            return
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.path.unlink(missing_ok=True)
            folder = os.open(self.path.parent, os.O_PATH | os.O_DIRECTORY)
            try:
                listening.bind(f"/proc/self/fd/{folder}/{DOOR}")  # supports a path of any length
            finally:
                os.close(folder)
            self.path.chmod(0o600)
            listening.listen(128)
            listening.setblocking(False)
        except OSError as error:
            listening.close()
            log.warning("environments are played through the server only: %s", error)
            return
        self._socket = listening
        self._start(self._serve(listening))

    async def close(self) -> None:
        """Take all pipes back and close."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self.path.unlink(missing_ok=True)

    def way(self, host: EnvHost, number: int) -> Door | None:
        """The address of the local socket for an environment; None when its pipes cannot be lent."""
        token = host.pipe_lending.token_of(number)
        if self._socket is None or token is None or host.recorded:
            return None
        return Door(path=str(self.path), token=token)

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work, name="env-socket")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(listening)
            except OSError as error:  # no free descriptors at the moment
                log.warning("cannot accept a client of the local socket: %s", error)
                await asyncio.sleep(1)
                continue
            if len(self._tasks) > _CONNECTIONS:
                client.close()
                continue
            owner = owner_of(client)
            if owner is None or not is_ours(owner.uid):  # the folder excludes other users, unless its mode was changed
                client.close()
                continue
            client.setblocking(False)
            self._start(self._client(client))

    async def _client(self, client: socket.socket) -> None:
        try:
            try:
                async with asyncio.timeout(_GREETING_TIMEOUT):
                    supervisor, host, number, shared = await self._greeted(client)
                await self._lend(client, supervisor, host, number, shared)
            except RockError as error:
                _tell(client, error)
        except (OSError, TimeoutError):
            pass  # the client disconnected
        finally:
            client.close()

    async def _greeted(self, client: socket.socket) -> tuple[Supervisor, EnvHost, int, bool]:
        spec = await _packet(client)
        sandbox_id, number, token = spec.get("sandbox"), spec.get("env"), spec.get("token")
        if not isinstance(sandbox_id, str) or type(number) is not int or not isinstance(token, str):
            raise InvalidConfig("the first packet has no valid sandbox, env and token",
                                hint="connect through rock.make, or use HTTP")
        supervisor = await self._find(sandbox_id)
        host = supervisor.env_host
        if host is None or not host.pipe_lending.is_token(number, token):
            raise NotFound(f"there is no environment {number} with that token", sandbox_id=sandbox_id,
                           hint="open a new environment; a token is valid while its environment is open")
        return supervisor, host, number, spec.get("memory") is not False

    async def _lend(
        self, client: socket.socket, supervisor: Supervisor, host: EnvHost, number: int, shared: bool
    ) -> None:
        lent = host.pipe_lending.lend(number, lambda error: _tell(client, error))
        try:
            told: dict[str, Any] = {"timeout": lent.timeout}
            fds = [lent.requests, lent.answers]
            if shared and lent.memory is not None:
                memory, told["offset"] = lent.memory
                fds.append(memory)
            socket.send_fds(client, [orjson.dumps(told)], fds)
            supervisor.touch()
            while said := await _packet(client):
                supervisor.touch()
                if "overdue" in said:
                    host.pipe_lending.overdue(number, str(said["overdue"])[:100])
                elif "nonsense" in said:
                    host.pipe_lending.nonsense(number, str(said["nonsense"])[:1000])
        finally:
            host.pipe_lending.take_back(number)


async def _packet(client: socket.socket) -> dict[str, Any]:
    """The next packet; empty when the client closed the connection."""
    data = await asyncio.get_running_loop().sock_recv(client, _PACKET)
    if not data:
        return {}
    try:
        said = orjson.loads(data)
    except ValueError:
        said = None
    if not isinstance(said, dict) or not said:
        raise InvalidConfig("the packet is not a JSON object", hint="connect through rock.make, or use HTTP")
    return said


def _tell(client: socket.socket, error: RockError) -> None:
    """Send a message. The client may have disconnected or left earlier messages unread; it then finds the connection
    closed."""
    with contextlib.suppress(OSError):
        client.send(orjson.dumps(error.to_wire(), default=repr))
