"""The environments of `rock.gym` with torch tensors, on a device of your choice.

    envs = rock.gym.torch.SandboxVectorEnv("CartPole-v1", 8, device="cuda")
    observations, infos = envs.reset(seed=1)
    observations, rewards, terminations, truncations, infos = envs.step(policy(observations))

They are `gymnasium.Env` and `VectorEnv` like those of `rock.gym`, with Gymnasium's spaces. Arrays in observations and
frames become tensors of their dtype; on the CPU the tensors share the arrays' memory, which has no other user. Numbers
become zero-dimensional tensors. Rewards are float32, flags bool. Text and infos are unchanged, except `final_obs`,
which is a list of observations, with None for environments that did not end. Actions and `reset_mask` may be tensors of
any device, arrays or numbers.

Requires the extra: pip install "rock-sandbox[torch]".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

try:
    import torch
except ImportError as error:
    raise ImportError(f"rock.gym.torch needs torch ({error}): pip install 'rock-sandbox[torch]'") from error

from rock.errors import InvalidConfig
from rock.gym import env, vector

__all__ = ["SandboxEnv", "SandboxVectorEnv"]

_FINAL = "final_obs"
Step = tuple[Any, Any, Any, Any, dict[str, Any]]


class SandboxEnv(env.SandboxEnv):
    """`rock.gym.SandboxEnv` with tensors. device: as torch names it."""

    def __init__(self, source: str, /, *, device: Any = "cpu", **options: Any) -> None:
        self._closed = True
        self.device = _device(device)
        super().__init__(source, **options)
        if self.spec is not None:
            self.spec.entry_point = "rock.gym.torch:remake"
            self.spec.kwargs["device"] = str(self.device)
            self.spec.disable_env_checker = True  # it requires arrays

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = super().reset(seed=seed, options=to_numpy(options))
        return to_torch(observation, self.device), info

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One step: (observation, reward, terminated, truncated, info), the first four as tensors."""
        return _stepped(super().step(to_numpy(action)), self.device)

    def render(self, *, env_index: int = 0) -> Any:
        return to_torch(super().render(env_index=env_index), self.device)


class SandboxVectorEnv(vector.SandboxVectorEnv):
    """`rock.gym.SandboxVectorEnv` with tensors. device: as torch names it."""

    def __init__(self, source: str, /, num_envs: int, *, device: Any = "cpu", **options: Any) -> None:
        self.closed = True
        self.device = _device(device)
        super().__init__(source, num_envs, **options)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        observations, infos = super().reset(seed=seed, options=to_numpy(options))
        return to_torch(observations, self.device), infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One step of each: (observations, rewards, terminations, truncations, infos), the first four as tensors."""
        return _stepped(super().step(to_numpy(actions)), self.device)

    def render(self, *, env_index: int | None = None) -> Any:
        return to_torch(super().render(env_index=env_index), self.device)


def remake(rock_source: str, **options: Any) -> SandboxEnv:
    """The entry point in the spec of a SandboxEnv."""
    return SandboxEnv(rock_source, **options)


def to_torch(value: Any, device: Any = "cpu") -> Any:
    """Convert arrays and numbers to tensors, in any nesting."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            return [to_torch(item, device) for item in value] if value.dtype.kind == "O" else value
        if not value.flags.writeable:
            value = value.copy()  # torch warns about read-only memory
        return torch.from_numpy(value).to(device)
    if isinstance(value, bool | int | float | np.number | np.bool_):
        return torch.as_tensor(value, device=device)
    if isinstance(value, dict):
        return {key: to_torch(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_make"):  # a graph
        return type(value)(*(to_torch(item, device) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(to_torch(item, device) for item in value)
    return value


def to_numpy(value: Any) -> Any:
    """Convert tensors to arrays; zero-dimensional ones become numpy scalars."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()[()]
    if isinstance(value, dict):
        return {key: to_numpy(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return type(value)(*(to_numpy(item) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(to_numpy(item) for item in value)
    return value


def _stepped(found: Step, device: Any) -> Step:
    observation, reward, terminated, truncated, info = found
    if _FINAL in info:
        info = {**info, _FINAL: to_torch(info[_FINAL], device)}
    return (
        to_torch(observation, device),
        torch.as_tensor(reward, dtype=torch.float32, device=device),
        torch.as_tensor(terminated, dtype=torch.bool, device=device),
        torch.as_tensor(truncated, dtype=torch.bool, device=device),
        info,
    )


def _device(name: Any) -> Any:
    """The device, after a test allocation: torch accepts names of missing devices."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        return device
    except (RuntimeError, TypeError, AssertionError) as error:
        text = str(error).partition("\n")[0]
        raise InvalidConfig(f"the device {name!r} cannot be used: {text}",
                            hint='use a device of this machine, such as "cpu", "cuda" or "cuda:1"') from None
