"""Environments of GEM and Gymnasium, and vectors of the latter, behind one interface."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import random
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from rock.guest.environments import agents
from rock.guest.environments.spaces import metadata_of, spec_of
from rock.guest.environments.tasks import TaskHost

FILE = "env.py"
_USUAL = "/app"  # the usual folder of programs in images


class BadSource(Exception):
    """The source defines no environment."""


class Hosted(Protocol):
    """A hosted environment. `vector`: whether its rewards and flags are arrays."""

    vector: bool

    def reset(self, seed: Any = None, options: Any = None) -> tuple[Any, Any]: ...

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, Any]: ...

    def call(self, what: str, arguments: list[Any]) -> Any: ...

    def layers(self) -> list[Any]:
        """The environment and what it wraps, the outermost first; of a vector, those of each member too."""
        ...

    def close(self) -> None: ...


class _Base:
    """The common part of all hosts."""

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

    def _render(self, index: int | None = None) -> Any:
        """A frame; for a vector those of all environments, or with `index` that of one."""
        frame = self.env.render()
        if index is None:
            return frame
        count = self.env.num_envs if self.vector else 1
        if type(index) is not int or not 0 <= index < count:
            raise IndexError(f"env_index={index!r} is out of range: there are {count} environments")
        return frame[index] if self.vector and frame is not None else frame

    def layers(self) -> list[Any]:
        found: list[Any] = []
        waiting = [self.env]
        while waiting:
            layer = waiting.pop(0)
            if any(layer is known for known in found):
                continue
            found.append(layer)
            held = getattr(layer, "__dict__", {})
            members = held.get("envs")
            waiting += [held["env"]] if "env" in held else []
            waiting += members if isinstance(members, list | tuple) else []
        return found

    def close(self) -> None:
        if hasattr(self.env, "close"):
            self.env.close()


class _Single(_Base):
    """An environment of Gymnasium, or one with the older interface of four-value steps: see `_Older`."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.step = self._first_step

    def reset(self, seed: Any = None, options: Any = None) -> tuple[Any, Any]:
        result: Any = super().reset(seed, options)
        return result if _is_reset(result) else (result, {})

    def _first_step(self, action: Any) -> tuple[Any, Any, Any, Any, Any]:
        """The first step detects the interface of the environment; later steps skip the check."""
        result: Any = self.env.step(action)
        if type(result) is tuple and len(result) == 4:
            self.step = lambda action: _five(self.env.step(action))
            return _five(result)
        if type(result) is not tuple or len(result) != 5:
            names = "observation, reward, terminated, truncated, info"
            raise TypeError(f"step returned {_shown(result)} in place of ({names})")
        self.step = self.env.step
        return result

    def _describe(self) -> dict[str, Any]:
        env = self.env
        return {"observation_space": spec_of(env.observation_space), "action_space": spec_of(env.action_space),
                "metadata": metadata_of(env.metadata), "render_mode": env.render_mode,
                **_registered(env)}  # fmt: skip

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
        env = self.env
        return {"num_envs": env.num_envs, "observation_space": spec_of(env.observation_space),
                "action_space": spec_of(env.action_space), "metadata": metadata_of(getattr(env, "metadata", {})),
                "single_observation_space": spec_of(env.single_observation_space),
                "single_action_space": spec_of(env.single_action_space),
                "render_mode": getattr(env, "render_mode", None), **_registered(env)}  # fmt: skip

    def _get(self, name: str) -> Any:
        return self.env.get_attr(name)

    def _set(self, name: str, value: Any, indices: list[int] | None = None) -> None:
        for member in () if indices is None else self._members(indices):
            _set_inside(member, name, value)
        if indices is None:
            self.env.set_attr(name, value)

    def _call(
        self, name: str, arguments: list[Any], keywords: dict[str, Any], indices: list[int] | None = None
    ) -> Any:
        if indices is None:
            return self.env.call(name, *arguments, **keywords)
        return [_attribute(member, name)(*arguments, **keywords) for member in self._members(indices)]

    def _members(self, indices: list[int]) -> list[Any]:
        """Some of the environments; TypeError for a vector that has them in other processes."""
        members = getattr(self.env, "envs", None)
        if not isinstance(members, list | tuple):
            raise TypeError(f"a {type(self.env).__name__} has no access to single environments")
        return [members[index] for index in indices]


def _attribute(env: Any, name: str) -> Any:
    return env.get_wrapper_attr(name) if hasattr(env, "get_wrapper_attr") else getattr(env, name)


def _set_inside(env: Any, name: str, value: Any) -> None:
    if hasattr(env, "set_wrapper_attr"):
        env.set_wrapper_attr(name, value)
    else:
        setattr(env, name, value)


def _registered(env: Any) -> dict[str, Any]:
    spec = getattr(env, "spec", None)
    names = ("id", "reward_threshold", "nondeterministic", "max_episode_steps")
    return {"spec": None if spec is None else {name: getattr(spec, name, None) for name in names}}


def host(request: Mapping[str, Any]) -> Hosted:
    """Create the requested environment: "protocol" gem, gym or task, "env_id" or "folder", "kwargs", "num_envs" for a
    vector."""
    if request.get("protocol") == "task":
        return TaskHost(request["env_id"], request["kwargs"])
    for module in request.get("imports") or ():
        importlib.import_module(module)
    if request.get("protocol", "gem") == "gem":
        import gem

        return _Base(gem.make(request["env_id"], **request["kwargs"]))
    if request.get("agents"):
        return _of_agents(request)
    return _Single(_gym(request)) if not request.get("num_envs") else _Vector(_gym_vector(request))


def _of_agents(request: Mapping[str, Any]) -> Hosted:
    """A game of several agents: a module of PettingZoo, or what make_env makes."""
    interface, kwargs = str(request["agents"]), dict(request["kwargs"])
    if request.get("folder"):
        made = agents.interface_of(_chosen(_maker(request)(**kwargs), request.get("task")), interface)
    else:
        made = agents.made_by(request["env_id"], interface, kwargs)
    return agents.Aec(made) if interface == agents.AEC else agents.Parallel(made)


def _gym(request: Mapping[str, Any]) -> Any:
    import gymnasium

    if not request.get("folder"):
        return gymnasium.make(request["env_id"], **request["kwargs"])
    made = _chosen(_maker(request)(**request["kwargs"]), request.get("task"))
    return _one(made)


def host_object(made: Any) -> Hosted:
    """Host an existing environment or vector of Gymnasium, an object with their members, or one with the older
    interface of four-value steps."""
    import gymnasium

    vector = isinstance(made, gymnasium.vector.VectorEnv) or all(hasattr(made, name) for name in _VECTOR_MEMBERS)
    return _Vector(made) if vector else _Single(_one(made))


_MEMBERS = ("reset", "step", "observation_space", "action_space")
_VECTOR_MEMBERS = (*_MEMBERS, "num_envs", "single_observation_space", "single_action_space")


def _one(made: Any) -> Any:
    """A gymnasium.Env from the result of make_env: the object itself, or an adapter with the same members."""
    import gymnasium

    if isinstance(made, gymnasium.Env):
        return made
    missing = [name for name in _MEMBERS if not hasattr(made, name)]
    if isinstance(made, gymnasium.vector.VectorEnv) or hasattr(made, "num_envs") or missing:
        why = f"it has no {', '.join(missing)}" if missing else "it is a vector of environments"
        raise TypeError(f"make_env made a {type(made).__name__}, which is not one environment: {why}")
    return _older()(made)


@functools.cache
def _older() -> Any:
    """The adapter's class; imports gymnasium on demand."""
    import gymnasium

    class Older(gymnasium.Env):
        """Adapter of an object with reset, step and spaces that is no gymnasium.Env, or that has the interface of gym
        before 0.26: reset without arguments returns only an observation, step returns (observation, reward, done,
        info).

        A seed is passed to its `seed` method when `reset` accepts none. When it has neither, the seed is applied to the
        global random state of Python and numpy, which belongs to this process alone.
        """

        def __init__(self, env: Any) -> None:
            self.env = env
            self.observation_space = env.observation_space
            self.action_space = env.action_space
            self.metadata = dict(getattr(env, "metadata", None) or {})
            self.render_mode = getattr(env, "render_mode", None)
            self._takes = _parameters(env.reset)

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
            taken: dict[str, Any] = {}
            if "seed" in self._takes:
                taken["seed"] = seed
            elif seed is not None:
                _seed(self.env, seed)
            if "options" in self._takes:
                taken["options"] = options
            elif options:
                raise TypeError(f"reset of {type(self.env).__name__} takes no options")
            result: Any = self.env.reset(**taken)
            return result if _is_reset(result) else (result, {})

        def step(self, action: Any) -> Any:
            result = self.env.step(action)
            return _five(result) if type(result) is tuple and len(result) == 4 else result

        def render(self) -> Any:
            if not hasattr(self.env, "render"):
                return None
            taken = {"mode": "rgb_array"} if "mode" in _parameters(self.env.render) else {}
            return self.env.render(**taken)

        def close(self) -> None:
            if hasattr(self.env, "close"):
                self.env.close()

        def has_wrapper_attr(self, name: str) -> bool:
            return hasattr(self, name) or hasattr(self.env, name)

        def get_wrapper_attr(self, name: str) -> Any:
            return getattr(self if hasattr(self, name) else self.env, name)

        def set_wrapper_attr(self, name: str, value: Any, **_: Any) -> Any:
            setattr(self.env, name, value)
            return True

    return Older


def _parameters(function: Callable[..., Any]) -> set[str]:
    """The names of its keyword parameters; includes "seed" and "options" when it accepts any keyword."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set()
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return {parameter.name for parameter in parameters} | ({"seed", "options"} if anything else set())


def _seed(env: Any, seed: int) -> None:
    if callable(getattr(env, "seed", None)):
        env.seed(seed)
        return
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % (1 << 32))


def _is_reset(result: Any) -> bool:
    """Whether it is (observation, info), and not only an observation."""
    return type(result) is tuple and len(result) == 2 and isinstance(result[1], Mapping)


def _five(result: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, Any, Any]:
    """Convert (observation, reward, done, info) of gym before 0.26 to Gymnasium's five values."""
    observation, reward, done, info = result
    truncated = bool(info.get("TimeLimit.truncated", False)) if isinstance(info, Mapping) else False
    return observation, reward, bool(done) and not truncated, truncated, info


def _shown(result: Any) -> str:
    return f"a tuple of {len(result)}" if isinstance(result, tuple) else f"a {type(result).__name__}"


def _gym_vector(request: Mapping[str, Any]) -> Any:
    import gymnasium

    mode, options = request.get("vectorization_mode"), dict(request.get("vector_kwargs") or {})
    if isinstance(options.get("autoreset_mode"), str):
        options["autoreset_mode"] = gymnasium.vector.AutoresetMode(options["autoreset_mode"])
    if mode == "sync" and not request.get("folder"):
        options.setdefault("copy", False)  # observations are encoded before the next step
    count = request["num_envs"]
    if not request.get("folder"):
        return gymnasium.make_vec(request["env_id"], num_envs=count, vectorization_mode=mode, vector_kwargs=options,
                                  **request["kwargs"])  # fmt: skip
    maker, kwargs = _maker(request), dict(request["kwargs"])
    if "n_envs" in inspect.signature(maker).parameters:
        kwargs["n_envs"] = count
        made = _chosen(maker(**kwargs), request.get("task"))
        if isinstance(made, gymnasium.vector.VectorEnv) or all(hasattr(made, name) for name in _VECTOR_MEMBERS):
            return made
        raise TypeError(f"make_env(n_envs={count}) made a {type(made).__name__}, and no vector of environments")
    kind = gymnasium.vector.AsyncVectorEnv if mode == "async" else gymnasium.vector.SyncVectorEnv
    if mode == "sync":
        options.setdefault("copy", False)
    return kind([lambda: _one(_chosen(maker(**kwargs), request.get("task")))] * count, **options)


def _maker(request: Mapping[str, Any]) -> Callable[..., Any]:
    """`make_env` of the folder's env.py. "." is the image's working directory if it has one, else the usual folder."""
    folder = str(request["folder"])
    tried = [os.getcwd(), _USUAL] if folder == "." else [folder]
    found = next((place for place in tried if os.path.isfile(os.path.join(place, FILE))), None)
    if found is None:
        raise BadSource(f"there is no {FILE} in {' or '.join(dict.fromkeys(tried))}")
    path = os.path.join(found, FILE)
    os.chdir(found)
    sys.path[:0] = dict.fromkeys((found, *([str(request["root"])] if request.get("root") else [])))
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
    """Select one result of make_env, which may return {suite: environment} or {suite: {task: environment}}."""
    names = task.split("/") if task else []
    while isinstance(made, dict):
        if not names and len(made) == 1:
            made = next(iter(made.values()))
            continue
        if not names or names[0] not in made:
            raise KeyError(f"task {task!r}: there are {', '.join(sorted(map(str, made)))}")
        made = made[names.pop(0)]
    return made
