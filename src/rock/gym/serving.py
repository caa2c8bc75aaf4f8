"""A live environment of this process for other processes, without a sandbox.

    with EnvServer(env) as server:                 # in one process
        print(server.address)

    env = RemoteEnv(address)                       # in another one: a gymnasium.Env

The environment is an object: one of Gymnasium, a vector, an object with their members, or one with the older interface
of gym. It has one client at a time. The address has a token, without which a connection is closed. Messages are frames
of values, without pickle.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import re
import secrets
import socket
import struct
import threading
from types import TracebackType
from typing import Any, Self

from gymnasium.vector import AutoresetMode

from rock import errors
from rock.guest.environments import values
from rock.guest.environments.hosting import host_object
from rock.guest.environments.worker import failure
from rock.gym.contract import EnvContract, EnvSandbox, space_of
from rock.gym.env import SandboxEnv
from rock.gym.vector import SandboxVectorEnv
from rock.protocol.env import error_of

_HEAD = struct.Struct(">BI")  # operation, bytes of the payload
_RESET, _STEP, _CALL, _OK, _RAISED, _REFUSED = range(6)
_ADDRESS = re.compile(r"tcp://(\[[0-9a-fA-F:]+\]|[\w.-]+):(\d{1,5})/([0-9a-f]{32})")
_TOKEN = 32  # characters
_FIRST = 10.0  # seconds within which a client sends the token
_END = 5.0  # seconds that a shutdown waits for a call in progress
_CLIENTS = 16  # connections that have not sent their token


def _send(link: socket.socket, op: int, parts: list[Any]) -> None:
    size = sum(len(part) for part in parts)
    link.sendall(b"".join((_HEAD.pack(op, size), *parts)))


def _receive(link: socket.socket) -> tuple[int, bytearray] | None:
    """A frame; None at the end of the connection. ValueError: it is too large, or cut off."""
    head = _exactly(link, _HEAD.size)
    if not head:
        return None
    if len(head) < _HEAD.size:
        raise ValueError("the head of a frame is cut off")
    op, size = _HEAD.unpack(head)
    if size > values.LIMIT:
        raise ValueError(f"a frame of {size} bytes is over the limit of {values.LIMIT}")
    payload = _exactly(link, size)
    if len(payload) < size:
        raise ValueError("a frame is cut off")
    return op, payload


def _exactly(link: socket.socket, size: int) -> bytearray:
    """That many bytes, or fewer at the end of the connection. Memory grows with the bytes that arrive."""
    data = bytearray()
    while len(data) < size:
        piece = link.recv(min(size - len(data), 1 << 20))
        if not piece:
            break
        data += piece
    return data


class EnvServer:
    """Serves an environment of this process on a port. address: for `RemoteEnv` or `RemoteVectorEnv`.

    host: where it listens, by default on this machine only; others can read and change what is sent to another host.
    close_env: close the environment with the server.
    """

    def __init__(self, env: Any, *, host: str = "127.0.0.1", port: int = 0, close_env: bool = True) -> None:
        self._hosted = host_object(env)
        self._close_env = close_env
        self._token = secrets.token_hex(_TOKEN // 2)
        self._busy = threading.Lock()  # held by the connection of the client
        self._waiting = threading.BoundedSemaphore(_CLIENTS)
        self._links: set[socket.socket] = set()
        self._guard = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family)
        name = f"[{host}]" if ":" in host else host
        self.address = f"tcp://{name}:{self._listener.getsockname()[1]}/{self._token}"

    def start(self) -> Self:
        """Serve in a thread. Conflict: it was shut down."""
        if self._ended.is_set():
            raise errors.Conflict("the server was shut down", hint="make a new one")
        if self._thread is None:
            self._thread = threading.Thread(target=self._accept, name="rock-env-server", daemon=True)
            self._thread.start()
        return self

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the shutdown; whether it has happened."""
        return self._ended.wait(timeout)

    def shutdown(self) -> None:
        """End all connections and, with `close_env`, the environment. Idempotent."""
        with self._guard:
            if self._ended.is_set():
                return
            self._ended.set()
            links = list(self._links)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        for link in links:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        if self._close_env and self._busy.acquire(timeout=_END):
            self._hosted.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                link, _ = self._listener.accept()
            except OSError:
                return  # the server was shut down
            if not self._waiting.acquire(blocking=False):
                link.close()
                continue
            threading.Thread(target=self._serve, args=(link,), name="rock-env-client", daemon=True).start()

    def _serve(self, link: socket.socket) -> None:
        """One connection: the token, then requests."""
        with self._guard:
            self._links.add(link)
        try:
            with link:
                link.settimeout(_FIRST)
                try:
                    known = hmac.compare_digest(bytes(_exactly(link, _TOKEN)), self._token.encode())
                finally:
                    self._waiting.release()
                if not known or self._ended.is_set():
                    return
                link.settimeout(None)
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if not self._busy.acquire(blocking=False):
                    _send(link, _REFUSED, [b"the environment has another client"])
                    return
                try:
                    _send(link, _OK, [])
                    while (frame := _receive(link)) is not None:
                        _send(link, *self._answer(*frame))
                finally:
                    self._busy.release()
        except (OSError, ValueError):
            return  # the client has left, or sent something else
        finally:
            with self._guard:
                self._links.discard(link)

    def _answer(self, op: int, payload: bytearray) -> tuple[int, list[Any]]:
        try:
            request = values.decode(memoryview(payload))
            if op == _RESET:
                observation, info = self._hosted.reset(**request)
                return _OK, values.encode_result([observation], info)
            if op == _STEP:
                *found, info = self._hosted.step(request)
                if not self._hosted.vector:
                    found = [found[0], float(found[1]), bool(found[2]), bool(found[3])]
                return _OK, values.encode_result(found, info)
            what, *arguments = request
            return _OK, values.encode(self._hosted.call(what, arguments), describe=True)
        except Exception as error:
            return _RAISED, [json.dumps(failure(error, "environment")).encode()]


class _Link:
    """The connection of a client, with the methods of an EnvironmentHandle."""

    sandbox_id = ""
    number = 0

    def __init__(self, address: str, timeout: float | None) -> None:
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise errors.InvalidConfig("this is no address of an environment",
                                       hint="use EnvServer.address: tcp://HOST:PORT/TOKEN")
        self.link = self
        self._lock = threading.Lock()
        host, port, token = match[1].strip("[]"), int(match[2]), match[3]
        try:
            self._socket = socket.create_connection((host, port), timeout=timeout)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.sendall(token.encode())
            frame = _receive(self._socket)
        except (OSError, ValueError, OverflowError) as error:
            raise self._gone(f"{host}:{port}: {error}") from error
        if frame is None or frame[0] != _OK:
            self._socket.close()
            if frame is not None and frame[0] == _REFUSED:
                raise errors.Conflict(frame[1].decode(errors="replace"), hint="close the other client")
            raise errors.Unauthorized("the server closed the connection", hint="use the address of a running EnvServer")

    def _gone(self, reason: str) -> errors.Unavailable:
        return errors.Unavailable(f"the server of the environment is gone: {reason}",
                                  hint="start a server again, and make a new client")  # fmt: skip

    def _ask(self, op: int, request: Any) -> Any:
        try:
            parts = values.encode(request)
        except values.Unsendable as error:
            raise errors.InvalidConfig(f"the value cannot be sent to an environment: {error}",
                                       hint="send plain data and NumPy arrays") from None
        with self._lock:
            try:
                _send(self._socket, op, parts)
                frame = _receive(self._socket)
            except (OSError, ValueError) as error:
                self._socket.close()  # a late response must not answer the next request
                raise self._gone(str(error) or type(error).__name__) from error
        if frame is None:
            raise self._gone("it closed the connection")
        try:
            if frame[0] == _RAISED:
                raise error_of(json.loads(frame[1]), "")[0]
            return values.decode(memoryview(frame[1]))
        except ValueError as error:
            raise errors.ServerError(f"malformed answer of an environment: {error}") from None

    def _items(self, found: Any, count: int) -> list[Any]:
        if type(found) is not list or len(found) != count:
            raise errors.ServerError("malformed answer of an environment")
        return found

    def reset(self, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        observation, info = self._items(self._ask(_RESET, {"seed": seed, "options": options}), 2)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, Any]:
        observation, reward, terminated, truncated, info = self._items(self._ask(_STEP, action), 5)
        return observation, reward, terminated, truncated, info

    def call(self, what: str, *arguments: Any) -> Any:
        return self._ask(_CALL, [what, *arguments])

    def fork(self, n: int, reseed: bool, partial: bool) -> list[Any]:
        raise errors.Unsupported("an environment of an EnvServer has no copies", hint="use SandboxEnv")

    def close_env(self, number: int) -> None:
        """The environment stays, for the next client."""

    def close(self) -> None:
        self._socket.close()


class RemoteEnv(SandboxEnv):
    """The environment of an `EnvServer`. timeout: seconds of one call. `close` leaves the environment open.

    Unauthorized, Unavailable, Conflict: it has another client.
    """

    def __init__(self, address: str, *, timeout: float | None = 300.0) -> None:
        self._closed = True
        self._process = os.getpid()
        self.source = _ADDRESS.sub(r"tcp://\1:\2", address)
        link: Any = _Link(address, timeout)
        self._player, self._closed = link, False
        try:
            about = _described(link, False)
            self.observation_space = space_of(about["observation_space"])
            self.action_space = space_of(about["action_space"])
            self.metadata, self.render_mode, self.spec = about["metadata"], about["render_mode"], None
            self._contract = EnvContract.of(about, self.observation_space, self.action_space)
            self._sandbox = EnvSandbox(self.source, self.source, "", self.source)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"RemoteEnv({self.source!r})"

    __str__ = __repr__


class RemoteVectorEnv(SandboxVectorEnv):
    """The vector of an `EnvServer`. timeout: seconds of one call. Errors as of `RemoteEnv`."""

    def __init__(self, address: str, *, timeout: float | None = 300.0) -> None:
        self.closed = True
        self._process = os.getpid()
        self.source = _ADDRESS.sub(r"tcp://\1:\2", address)
        link: Any = _Link(address, timeout)
        self._player, self.closed = link, False
        try:
            about = _described(link, True)
            self.num_envs = int(about["num_envs"])
            self.observation_space, self.action_space, self.single_observation_space, self.single_action_space = (
                space_of(about[name]) for name in
                ("observation_space", "action_space", "single_observation_space", "single_action_space"))  # fmt: skip
            self.metadata = dict(about["metadata"])
            if "autoreset_mode" in self.metadata:
                self.metadata["autoreset_mode"] = AutoresetMode(self.metadata["autoreset_mode"])
            self.render_mode, self.spec = about["render_mode"], None
            self._contract = EnvContract.of(about, self.single_observation_space, self.single_action_space)
            self._sandbox = EnvSandbox(self.source, self.source, "", self.source)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"RemoteVectorEnv({self.source!r}, {self.num_envs})"

    __str__ = __repr__


def _described(link: _Link, vector: bool) -> dict[str, Any]:
    """The description of the environment. InvalidConfig: the other class is for it."""
    about = link.call("describe")
    if not isinstance(about, dict):
        raise errors.ServerError("malformed answer: no description of an environment")
    if bool(about.get("num_envs")) is not vector:
        raise errors.InvalidConfig(f"the server has {'one environment' if vector else 'a vector of environments'}",
                                   hint=f"use {'RemoteEnv' if vector else 'RemoteVectorEnv'}")
    return about
