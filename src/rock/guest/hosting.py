"""What an environment's process hosts: one of GEM, one of Gymnasium, or a vector of those, behind one interface."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from rock.guest.tasks import TaskHost

FILE = "env.py"
_USUAL = "/app"  # where images have what they run


class BadSource(Exception):
    """There is nothing at a source that makes an environment."""


class Hosted(Protocol):
    """An environment. `vector`: whether its rewards and flags are arrays."""

    vector: bool

    def reset(self, seed: Any = None, options: Any = None) -> tuple[Any, Any]: ...

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, Any]: ...

    def call(self, what: str, arguments: list[Any]) -> Any: ...

    def close(self) -> None: ...


class _Base:
    """What hosts of all kinds have in common."""

    vector = False

    def __init__(self, env: Any) -> None:
        self.env = env
        self.step: Callable[[Any], tuple[Any, Any, Any, Any, Any]] = env.step

    def reset(self, seed: Any = None, options: Any = None) -> tuple[Any, Any]:
        result: tuple[Any, Any] = self.env.reset(seed=seed) if options is None else self.env.reset(
            seed=seed, options=options
        )
        return result

    def call(self, what: str, arguments: list[Any]) -> Any:
        method = getattr(self, f"_{what}", None)
        if method is None:
            raise AttributeError(f"there is nothing named {what!r} to ask an environment for")
        return method(*arguments)

    def _get(self, name: str) -> Any:
        value = getattr(self.env, name)
        return value() if callable(value) and not hasattr(value, "sample") else value

    def _set(self, name: str, value: Any) -> None:
        setattr(self.env, name, value)

    def _call(self, name: str, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        return getattr(self.env, name)(*arguments, **keywords)

    def _has(self, name: str) -> bool:
        return hasattr(self.env, name)

    def _render(self) -> Any:
        return self.env.render()

    def close(self) -> None:
        if hasattr(self.env, "close"):
            self.env.close()


class _Single(_Base):
    """An environment of Gymnasium."""

    def _describe(self) -> dict[str, Any]:
        from rock.guest.spaces import spec_of

        env = self.env
        return {"observation_space": spec_of(env.observation_space), "action_space": spec_of(env.action_space),
                "metadata": _metadata(env.metadata), "render_mode": env.render_mode, **_registered(env)}  # fmt: skip

    def _get(self, name: str) -> Any:
        return self.env.get_wrapper_attr(name)

    def _set(self, name: str, value: Any) -> None:
        self.env.set_wrapper_attr(name, value)

    def _call(self, name: str, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        return self.env.get_wrapper_attr(name)(*arguments, **keywords)

    def _has(self, name: str) -> bool:
        return bool(self.env.has_wrapper_attr(name))


class _Vector(_Base):
    """A vector of environments of Gymnasium."""

    vector = True

    def _describe(self) -> dict[str, Any]:
        from rock.guest.spaces import spec_of

        env = self.env
        return {"num_envs": env.num_envs, "observation_space": spec_of(env.observation_space),
                "action_space": spec_of(env.action_space), "metadata": _metadata(env.metadata),
                "single_observation_space": spec_of(env.single_observation_space),
                "single_action_space": spec_of(env.single_action_space), "render_mode": env.render_mode,
                **_registered(env)}  # fmt: skip

    def _get(self, name: str) -> Any:
        return self.env.get_attr(name)

    def _set(self, name: str, value: Any) -> None:
        self.env.set_attr(name, value)

    def _call(self, name: str, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        return self.env.call(name, *arguments, **keywords)


def _metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {key: getattr(value, "value", value) for key, value in metadata.items()}


def _registered(env: Any) -> dict[str, Any]:
    spec = env.spec
    names = ("id", "reward_threshold", "nondeterministic", "max_episode_steps")
    return {"spec": None if spec is None else {name: getattr(spec, name, None) for name in names}}


def host(wish: Mapping[str, Any]) -> Hosted:
    """Make what is wished for: "protocol" gem, gym or task, "env_id" or "folder", "kwargs", "num_envs" for a vector."""
    if wish.get("protocol") == "task":
        return TaskHost(wish["env_id"], wish["kwargs"])
    for module in wish.get("imports") or ():
        importlib.import_module(module)
    if wish.get("protocol", "gem") == "gem":
        import gem

        return _Base(gem.make(wish["env_id"], **wish["kwargs"]))
    return _Single(_gym(wish)) if not wish.get("num_envs") else _Vector(_gym_vector(wish))


def _gym(wish: Mapping[str, Any]) -> Any:
    import gymnasium

    if not wish.get("folder"):
        return gymnasium.make(wish["env_id"], **wish["kwargs"])
    made = _chosen(_maker(wish)(**wish["kwargs"]), wish.get("task"))
    if isinstance(made, gymnasium.vector.VectorEnv) or not isinstance(made, gymnasium.Env):
        raise TypeError(f"make_env made a {type(made).__name__}, and not one gymnasium.Env")
    return made


def _gym_vector(wish: Mapping[str, Any]) -> Any:
    import gymnasium

    mode, options = wish.get("vectorization_mode"), dict(wish.get("vector_kwargs") or {})
    if isinstance(options.get("autoreset_mode"), str):
        options["autoreset_mode"] = gymnasium.vector.AutoresetMode(options["autoreset_mode"])
    if mode == "sync" and not wish.get("folder"):
        options.setdefault("copy", False)  # observations are sent before the next step
    count = wish["num_envs"]
    if not wish.get("folder"):
        return gymnasium.make_vec(wish["env_id"], num_envs=count, vectorization_mode=mode, vector_kwargs=options,
                                  **wish["kwargs"])  # fmt: skip
    maker, kwargs = _maker(wish), dict(wish["kwargs"])
    if "n_envs" in inspect.signature(maker).parameters:
        kwargs["n_envs"] = count
        made = _chosen(maker(**kwargs), wish.get("task"))
        if isinstance(made, gymnasium.vector.VectorEnv):
            return made
        raise TypeError(f"make_env(n_envs={count}) made a {type(made).__name__}, and no vector of environments")
    kind = gymnasium.vector.AsyncVectorEnv if mode == "async" else gymnasium.vector.SyncVectorEnv
    if mode == "sync":
        options.setdefault("copy", False)
    return kind([lambda: _chosen(maker(**kwargs), wish.get("task"))] * count, **options)


def _maker(wish: Mapping[str, Any]) -> Callable[..., Any]:
    """`make_env` of the folder's env.py. "." is the working directory that the image has, else the usual folder."""
    folder = str(wish["folder"])
    tried = [os.getcwd(), _USUAL] if folder == "." else [folder]
    found = next((place for place in tried if os.path.isfile(os.path.join(place, FILE))), None)
    if found is None:
        raise BadSource(f"there is no {FILE} in {' or '.join(dict.fromkeys(tried))}")
    path = os.path.join(found, FILE)
    os.chdir(found)
    sys.path[:0] = dict.fromkeys((found, *([str(wish["root"])] if wish.get("root") else [])))
    spec = importlib.util.spec_from_file_location("env", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["env"] = module
    spec.loader.exec_module(module)
    maker = getattr(module, "make_env", None)
    if not callable(maker):
        raise BadSource(f"{path} has no function make_env")
    return maker  # type: ignore[no-any-return]


def _chosen(made: Any, task: str | None) -> Any:
    """One of what make_env made: it may answer {suite: environment} or {suite: {task: environment}}."""
    names = task.split("/") if task else []
    while isinstance(made, dict):
        if not names and len(made) == 1:
            made = next(iter(made.values()))
            continue
        if not names or names[0] not in made:
            raise KeyError(f"task {task!r}: there are {', '.join(sorted(map(str, made)))}")
        made = made[names.pop(0)]
    return made
