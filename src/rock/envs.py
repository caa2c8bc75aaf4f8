"""Environments as GEM has them: `make`, `reset`, `step`, `close`. Blocking, and safe to use from many threads.

env = rock.make("game:Sokoban-v0-easy")
observation, info = env.reset(seed=42)
observation, reward, terminated, truncated, info = env.step("\\boxed{up}")
env.close()
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

import orjson

from rock import errors, settings
from rock.protocol.env import EnvInfo, OpenEnv
from rock.protocol.routes import ROUTES
from rock.protocol.sandbox import SandboxConfig, SandboxInfo, State
from rock.sync.sandbox.lifecycle import end_of
from rock.sync.sandbox.link import parse, path, transport_of
from rock.sync.transport import Transport, decode

POLL = 20.0  # seconds of one long-poll
SLACK = 30.0
START_TIMEOUT = 1200.0  # the first one of a package set installs it
STEP_TIMEOUT = 300.0

Step = tuple[Any, float, bool, bool, dict[str, Any]]


class RockEnv:
    """One environment in a process of its own, in a sandbox on the server.

    env_id: as GEM names it. env_number: its number there. sandbox_id: where it runs.
    base_url, api_key: ROCK_BASE_URL and ROCK_API_KEY where they are not given.
    config: limits of its sandbox; it then gets one of its own, which `close` stops. `exclusive` asks for the same.
    start_timeout, step_timeout: seconds. kwargs: go to the environment's constructor.

    Errors are typed: NotFound (no such environment), InvalidConfig (arguments it does not take), Unavailable, ...
    """

    def __init__(
        self,
        env_id: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        config: SandboxConfig | None = None,
        exclusive: bool = False,
        start_timeout: float = START_TIMEOUT,
        step_timeout: float | None = STEP_TIMEOUT,
        **kwargs: Any,
    ) -> None:
        self.env_id = env_id
        self._closed = True
        self._exclusive = exclusive or config is not None
        self._step_timeout = step_timeout
        self._transport = _transport(base_url, api_key, config)
        self._index = 0
        wish = OpenEnv(env_id=env_id, exclusive=self._exclusive)
        if config is not None:
            wish.config = config
        self.sandbox_id = self._open_sandbox(wish, start_timeout)
        try:
            self.env_number = self._make(kwargs, start_timeout)
        except BaseException:
            self._stop_sandbox()
            raise
        self._closed = False
        self._step_path = self._path("step_env")
        self._reset_path = self._path("reset_env")

    def __repr__(self) -> str:
        return f"RockEnv({self.env_id!r}, sandbox_id={self.sandbox_id!r}, env_number={self.env_number})"

    @property
    def unwrapped(self) -> Self:
        return self

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode: (observation, info). The same seed gives the same start."""
        self._check_open()
        body: dict[str, Any] = {"seed": seed}
        if options is not None:
            body["options"] = options
        answer = self._call(self._reset_path, body)
        self._index = 0
        return answer["observation"], answer["info"]

    def step(self, action: Any) -> Step:
        """One step: (observation, reward, terminated, truncated, info).

        It carries its number in the episode, so that one sent again because its answer was lost is done once.
        """
        self._check_open()
        answer = self._call(self._step_path, {"action": action, "index": self._index})
        self._index += 1
        return (
            answer["observation"],
            float(answer["reward"]),
            bool(answer["terminated"]),
            bool(answer["truncated"]),
            answer["info"],
        )

    def close(self) -> None:
        """End its process. Nothing happens when that was done, or when its sandbox is gone."""
        if self._closed:
            return
        self._closed = True
        try:
            self._transport.json("DELETE", self._path("close_env"), timeout=SLACK)
        except (errors.NotFound, errors.SandboxError):
            pass
        self._stop_sandbox()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise errors.Conflict(f"{self.env_id} is closed", hint="make a new one")

    def _path(self, name: str) -> str:
        return ROUTES[name].url(sandbox_id=self.sandbox_id, env=str(self.env_number))

    def _call(self, target: str, body: dict[str, Any]) -> Any:
        try:
            raw = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        except TypeError as error:
            raise errors.InvalidConfig(f"this cannot be sent to an environment: {error}") from None
        answer = decode(self._transport.call("POST", target, raw, timeout=self._step_timeout))
        if not isinstance(answer, dict) or "observation" not in answer:
            raise errors.ServerError(f"malformed answer: {str(answer)[:80]!r} is not a result of an environment")
        return answer

    def _open_sandbox(self, wish: OpenEnv, timeout: float) -> str:
        """The sandbox that hosts it. The packages of its family are installed the first time, which takes minutes."""
        deadline = time.monotonic() + timeout
        target = f"{ROUTES['open_env'].path}?wait={min(POLL, timeout):.3f}"
        body = wish.model_dump(mode="json", exclude_unset=True)
        info = parse(SandboxInfo, self._transport.json("POST", target, body, timeout=POLL + SLACK))
        while info.state is State.PENDING:
            left = deadline - time.monotonic()
            if left <= 0:
                raise errors.StartFailed(
                    f"{self.env_id} was not ready within {timeout:g} seconds", sandbox_id=info.sandbox_id
                )
            target = f"{path('get_sandbox', info.sandbox_id)}?wait={min(left, POLL):.3f}"
            info = parse(SandboxInfo, self._transport.json("GET", target, timeout=POLL + SLACK))
        if info.state is not State.RUNNING:
            raise end_of(info)
        return info.sandbox_id

    def _make(self, kwargs: dict[str, Any], timeout: float) -> int:
        target = ROUTES["make_env"].url(sandbox_id=self.sandbox_id)
        body = {"env_id": self.env_id, "kwargs": kwargs}
        return parse(EnvInfo, self._transport.json("POST", target, body, timeout=timeout)).env

    def _stop_sandbox(self) -> None:
        if not self._exclusive:
            return
        try:
            self._transport.json("POST", path("stop_sandbox", self.sandbox_id), timeout=SLACK)
        except errors.RockError:
            return


def _transport(base_url: str | None, api_key: str | None, config: SandboxConfig | None) -> Transport:
    if config is not None and base_url is None and api_key is None:
        return transport_of(config)
    return Transport(base_url or settings.base_url(), api_key or settings.api_key())


def make(env_id: str, **options: Any) -> RockEnv:
    """Make an environment, as `gem.make` does; `options` are those of `RockEnv`, and the environment's own."""
    return RockEnv(env_id, **options)
