"""Messages of environments: a task world with make, reset, step and close, hosted in a sandbox."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rock.protocol.action import Answer
from rock.protocol.sandbox import SandboxConfig, Wire


class OpenEnv(Wire):
    """A wish for a sandbox that can host `env_id`. Environments of one package set share a sandbox, a process each;
    `exclusive` asks for one of its own. `config`: limits and image, when the defaults do not fit."""

    env_id: str = Field(min_length=1, max_length=256)
    exclusive: bool = False
    config: SandboxConfig | None = None


class MakeEnv(Wire):
    env_id: str = Field(min_length=1, max_length=256)
    kwargs: dict[str, Any] = Field(default_factory=dict)


class EnvInfo(Answer):
    """An environment that was made: `env` is its number in the sandbox."""

    env: int
    env_id: str = ""
    sandbox_id: str = ""


class ResetEnv(Wire):
    seed: int | None = None
    options: dict[str, Any] | None = None


class ResetResult(Answer):
    observation: Any = None
    info: dict[str, Any] = Field(default_factory=dict)


class StepEnv(Wire):
    """`index`: number of this step in the episode, from 0; the same index again gets the same answer."""

    action: Any
    index: int | None = None


class StepResult(Answer):
    observation: Any = None
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: dict[str, Any] = Field(default_factory=dict)
