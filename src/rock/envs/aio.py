"""Environments for asyncio: the same environments as `rock.make` and `rock.gym.SandboxEnv`, whose calls are awaited.

    async with await rock.make_async("game:Sokoban-v0-easy") as env:
        observation, info = await env.reset(seed=42)
        observation, reward, terminated, truncated, info = await env.step("\\\\boxed{up}")

A step of an environment with pipes waits on the event loop, without a thread. Requests over HTTP, making and closing
run in threads of a pool of their own, so that they wait for no other user of the loop's default pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from rock import errors
from rock.envs.client import EnvironmentCall, EnvironmentHandle
from rock.envs.gem import RockEnv
from rock.envs.local_transport import LocalTransport, TransportUnavailable

_THREADS = 256  # maximum; started on demand
_Env = TypeVar("_Env")
_Result = TypeVar("_Result")

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def _forked() -> None:
    """Reset in a forked child, which has none of the parent's threads."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forked)


async def in_thread(work: Callable[[], _Result]) -> _Result:
    """The result of a blocking call in a thread of the pool."""
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="rock-env")
        pool = _pool
    return await asyncio.get_running_loop().run_in_executor(pool, work)


class AsyncEnv(Generic[_Env]):
    """An environment with awaitable calls. `env`: the blocking one, which provides the attributes (spaces, ids).

    Tasks may share it: their calls run in sequence. A cancelled call may have been executed; the next call continues
    after it.
    """

    def __init__(
        self, env: _Env, player: EnvironmentHandle, reward: Callable[[Any], Any] = lambda value: value
    ) -> None:
        self.env = env
        self._player = player
        self._reward = reward
        self._one = asyncio.Lock()

    def __getattr__(self, name: str) -> Any:
        if name == "env":
            raise AttributeError(name)
        return getattr(self.env, name)

    def __repr__(self) -> str:
        return f"AsyncEnv({self.env!r})"

    async def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode: (observation, info). The same seed gives the same start."""
        async with self._one:
            observation, info = self._player.was_reset(await self._asked(self._player.ask_reset(seed, options)))
            return observation, info

    async def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One step: (observation, reward, terminated, truncated, info). Errors as of the blocking environment."""
        async with self._one:
            found = await self._asked(self._player.ask_step(action))
            observation, reward, terminated, truncated, info = self._player.was_stepped(found)
            return observation, self._reward(reward), terminated, truncated, info

    async def render(self) -> Any:
        """A frame, according to the environment's render_mode."""
        return await self._blocking("render")

    async def call(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        """The result of a method of the environment."""
        return await self._blocking("call", name, *arguments, **keywords)

    async def get_attr(self, name: str) -> Any:
        """The current value of an attribute of the environment."""
        return await self._blocking("get_attr", name)

    async def fork(self, n: int = 1, *, reseed: bool = False, partial: bool = False) -> list[Self]:
        """`n` copies of the environment's process at this step; see `RockEnv.fork`."""
        env: Any = self.env
        async with self._one:
            found = await made(lambda: env.fork(n, reseed=reseed, partial=partial))
        return [type(self)(child, child._player, self._reward) for child in found]

    async def close(self) -> None:
        """End its process. Idempotent."""
        await self._blocking("close")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _blocking(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        method = getattr(self.env, name)
        async with self._one:
            return await in_thread(lambda: method(*arguments, **keywords))

    async def _asked(self, ask: EnvironmentCall) -> Any:
        """The environment's response; raises its error."""
        check = getattr(self.env, "_check_open", None)
        if check is not None:
            check()
        link = self._player.link
        pipes = ask.ways.get(ask.env)
        if pipes is not None:
            parts = ask.parts()
            if pipes.fits(parts):
                try:
                    op, payload = await _exchanged(pipes, ask, parts)
                    return link.read(pipes, op, payload)
                except TransportUnavailable:
                    ask.ways.pop(ask.env, None)  # use the server instead
                except errors.RockError as error:
                    ask.ways.pop(ask.env, None)
                    return error
        return (await in_thread(lambda: link.ask_all([ask])))[0]


async def _exchanged(pipes: LocalTransport, ask: EnvironmentCall, parts: list[Any]) -> tuple[int, memoryview]:
    """Exchange over the pipes on the event loop. Raises TransportUnavailable, or the environment's last error."""
    pipes.begin(ask.op, ask.index, parts)
    try:
        while (found := pipes.poll()) is None:
            if not await _readable(pipes):
                break
    except BaseException:
        pipes.abandon()
        raise
    if found is not None:
        return found
    # A server message or a timeout: handled in a thread, because it takes longer.
    waiting = asyncio.ensure_future(in_thread(pipes.finish))
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
        raise


async def _readable(pipes: LocalTransport) -> bool:
    """Wait for more data; False on a server message or a timeout."""
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[bool] = loop.create_future()

    def settle(value: bool) -> None:
        if not answered.done():
            answered.set_result(value)

    loop.add_reader(pipes.answers, settle, True)
    loop.add_reader(pipes.door, settle, False)
    try:
        while True:
            left = pipes.left()
            if left <= 0:
                return False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    return await asyncio.shield(answered)
            pipes.sign()
    finally:
        loop.remove_reader(pipes.answers)
        loop.remove_reader(pipes.door)


async def make_async(env_id: str, **options: Any) -> AsyncEnv[RockEnv]:
    """`rock.make` for asyncio: creates the environment in a thread. `options` are those of `rock.make`."""
    env = await made(lambda: RockEnv(env_id, **options))
    return AsyncEnv(env, env.player, float)


async def made(make: Callable[[], _Env]) -> _Env:
    """The environment, or the list of them, that `make` creates; closed after its creation if the caller is cancelled
    meanwhile."""
    making = asyncio.ensure_future(in_thread(make))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(_discard)
        raise


def _discard(making: asyncio.Future[Any]) -> None:
    if not making.cancelled() and making.exception() is None:
        found = making.result()
        for env in found if isinstance(found, list) else [found]:
            threading.Thread(target=env.close, name="rock-env-close", daemon=True).start()


__all__ = ["AsyncEnv", "make_async"]
