"""A resources server of NeMo Gym for environments of GEM on a ROCK server.

    rock_env:
      resources_servers:
        rock_env: {entrypoint: app.py, env_id: "game:Sokoban-v0-easy", base_url: http://HOST:8080}

where app.py is

    from rock.integrations.nemo_gym_server import EnvironmentResourcesServer

    if __name__ == "__main__":
        EnvironmentResourcesServer.run_webserver()

A module of its own: the base class needs more packages than the sandbox provider.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request
from nemo_gym.base_resources_server import (
    BaseResourcesServerConfig,
    BaseSeedSessionRequest,
    BaseSeedSessionResponse,
    BaseVerifyRequest,
    BaseVerifyResponse,
    SimpleResourcesServer,
)
from nemo_gym.server_utils import SESSION_ID_KEY
from pydantic import BaseModel, Field, PrivateAttr
from starlette.concurrency import run_in_threadpool

from rock import errors
from rock.envs.gem import RockEnv, make

_RESULTS = 10_000  # rewards of ended sessions that are kept, for repeated verifications
_SWEEP = 60.0  # seconds between two searches for idle sessions
T = TypeVar("T")


class EnvironmentConfig(BaseResourcesServerConfig):  # type: ignore[misc]
    """env_id: the environment, which a row of the data set may replace. options: of `rock.make`. base_url, api_key: of
    the ROCK server; default to ROCK_BASE_URL and ROCK_API_KEY. most_sessions: open environments of this process.
    idle_timeout: seconds without a request after which an environment is closed."""

    env_id: str = ""
    options: dict[str, Any] = Field(default_factory=dict)
    base_url: str | None = None
    api_key: str | None = None
    most_sessions: int = Field(default=1024, ge=1)
    idle_timeout: float = Field(default=3600.0, gt=0)


class SeedRequest(BaseSeedSessionRequest):  # type: ignore[misc]
    env_id: str | None = None
    seed: int | None = None


class SeedResponse(BaseSeedSessionResponse):  # type: ignore[misc]
    observation: str


class ActRequest(BaseModel):
    action: str


class ActResponse(BaseModel):
    observation: str
    reward: float
    terminated: bool
    truncated: bool


class _Session:
    def __init__(self, env: RockEnv) -> None:
        self.env = env
        self.lock = threading.Lock()  # one call at a time
        self.total = 0.0
        self.over = False
        self.used = time.monotonic()


class EnvironmentResourcesServer(SimpleResourcesServer):  # type: ignore[misc]
    """One environment for each session: /seed_session makes it, /act is a step, /verify has the sum of the rewards and
    closes it. A repeated /verify has the same reward. Statuses: 404 for a session without an environment, 429 for too
    many sessions, 422 for invalid input, 503 while the ROCK server is unavailable."""

    config: EnvironmentConfig
    _sessions: dict[str, _Session] = PrivateAttr(default_factory=dict)
    _results: OrderedDict[str, float] = PrivateAttr(default_factory=OrderedDict)
    _guard: threading.Lock = PrivateAttr(default_factory=threading.Lock)
    _swept: float = PrivateAttr(default_factory=time.monotonic)

    def setup_webserver(self) -> FastAPI:
        app: FastAPI = super().setup_webserver()
        app.post("/act")(self.act)
        return app

    async def seed_session(self, body: SeedRequest, request: Request) -> SeedResponse:
        session_id = str(request.session[SESSION_ID_KEY])
        observation = await run_in_threadpool(_typed, lambda: self._begin(session_id, body))
        return SeedResponse(observation=observation)

    async def act(self, body: ActRequest, request: Request) -> ActResponse:
        session_id = str(request.session[SESSION_ID_KEY])
        return await run_in_threadpool(_typed, lambda: self._act(session_id, body.action))

    async def verify(self, body: BaseVerifyRequest, request: Request) -> BaseVerifyResponse:
        session_id = str(request.session[SESSION_ID_KEY])
        reward = await run_in_threadpool(_typed, lambda: self._verified(session_id))
        return BaseVerifyResponse(**body.model_dump(), reward=reward)

    def _begin(self, session_id: str, body: SeedRequest) -> str:
        env_id = body.env_id or self.config.env_id
        if not env_id:
            raise errors.InvalidConfig("there is no env_id", hint="set it in the configuration or the row")
        self._sweep()
        with self._guard:
            old = self._sessions.pop(session_id, None)
            self._results.pop(session_id, None)
            if len(self._sessions) >= self.config.most_sessions:
                raise errors.QuotaExceeded(f"the server has {self.config.most_sessions} sessions",
                                           hint="verify some first, or raise most_sessions")
        if old is not None:
            old.env.close()
        reach = {"base_url": self.config.base_url, "api_key": self.config.api_key}
        env = make(env_id, **{**self.config.options, **{name: at for name, at in reach.items() if at is not None}})
        try:
            observation, _ = env.reset(seed=body.seed)
        except BaseException:
            env.close()
            raise
        with self._guard:
            self._sessions[session_id] = _Session(env)
        return str(observation)

    def _act(self, session_id: str, action: str) -> ActResponse:
        session = self._sessions.get(session_id)
        if session is None:
            raise errors.NotFound("the session has no environment", hint="call /seed_session before")
        with session.lock:
            if session.over:
                raise errors.InvalidConfig("the episode has ended", hint="call /verify")
            session.used = time.monotonic()
            observation, reward, terminated, truncated, _ = session.env.step(action)
            session.total += float(reward)
            session.over = bool(terminated or truncated)
        return ActResponse(observation=str(observation), reward=float(reward), terminated=bool(terminated),
                           truncated=bool(truncated))  # fmt: skip

    def _verified(self, session_id: str) -> float:
        with self._guard:
            session = self._sessions.pop(session_id, None)
            if session is None:
                if session_id not in self._results:
                    raise errors.NotFound("the session has no environment", hint="call /seed_session before")
                return self._results[session_id]
        with session.lock:
            session.env.close()
        with self._guard:
            self._results[session_id] = session.total
            while len(self._results) > _RESULTS:
                self._results.popitem(last=False)
        return session.total

    def _sweep(self) -> None:
        """Close idle environments."""
        now = time.monotonic()
        with self._guard:
            if now - self._swept < min(_SWEEP, self.config.idle_timeout):
                return
            self._swept = now
            idle = [key for key, one in self._sessions.items() if now - one.used > self.config.idle_timeout]
            closed = [self._sessions.pop(key) for key in idle]
        for session in closed:
            session.env.close()


def _typed(call: Callable[[], T]) -> T:
    """The result of a call; a typed error becomes a response with its status."""
    try:
        return call()
    except errors.RockError as error:
        status = error.status if 400 <= error.status < 600 else 500
        raise HTTPException(status, f"{type(error).__name__}: {error}") from error
