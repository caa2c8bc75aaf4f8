"""Request and response models of environments (make, reset, step, close), their errors, and task suites."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import Field

from rock.errors import (
    ActionError,
    CommandTimeout,
    Conflict,
    EnvironmentEnded,
    EnvironmentRaised,
    ImageError,
    InvalidConfig,
    NotFound,
    QuotaExceeded,
    RockError,
    Unsupported,
)
from rock.protocol.action import Answer
from rock.protocol.sandbox import SandboxConfig
from rock.protocol.wire import Inside, Wire

TASK_IMAGES = "rock.local/env/set-"  # followed by the name of a training set: the image with its packages
DOOR = "environments.sock"  # the name of every local socket

PIPED = 28  # environments of one sandbox that have their own pipes; len(PIPES) of guest/environments/host.py
# A label: renewals of a lease keep the sandbox alive. Without it, the idle timeout that the user chose applies.
LEASED = "rock.env.leased"
MOST_FORKS = 100  # children of one fork
NAME_PATTERN = r"^[^/\s\x00-\x1f]{1,256}$"
OWNER_PATTERN = r"^[A-Za-z0-9_-]{16,64}$"

Family = Literal["gem", "gym", "task"]


class OpenEnv(Inside):
    """A request for a sandbox that can host `env_id`. Environments of one package set share a sandbox, with one process
    each; `exclusive` requests a sandbox of its own. `config`: limits and image, when the defaults do not fit.

    protocol: the family of the environment: GEM, Gymnasium, or a task of the training set `env_id`. packages:
    additional packages, as pip names them; wheels only. image: host it with the Python of this image, which has
    gymnasium; no packages are installed then.
    """

    env_id: str = Field(min_length=1, max_length=256)
    protocol: Family = "gem"
    packages: list[str] = Field(default_factory=list, max_length=32)
    image: str | None = Field(default=None, min_length=1, max_length=1024)
    exclusive: bool = False
    config: SandboxConfig | None = None


class AddEnv(Inside):
    """Register an environment under a name. source: an id of GEM or Gymnasium, hf://ORG/REPO@COMMIT or image://NAME.
    packages: those beyond its family's, from wheels; imports: modules that register it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]{0,63}(/[A-Za-z0-9][\w.-]{0,63})?$")
    source: str = Field(min_length=1, max_length=512)
    packages: list[str] = Field(default_factory=list, max_length=32)
    imports: list[str] = Field(default_factory=list, max_length=64)
    description: str = Field(default="", max_length=2000)


class BuildEnv(Inside):
    """Install the packages of an environment in advance. packages: in addition to its registered ones."""

    env_id: str = Field(min_length=1, max_length=512)
    packages: list[str] = Field(default_factory=list, max_length=32)


class EnvAbout(Answer):
    """Description of an environment. version: of a registered one, else None; it changes with the source, package set
    or digest. requirements: pip requirements; asked: those of them that were registered with it; packages: the
    installed packages, as "name version". digest: of the image, or of the layer with the packages; None until it exists
    (is_ready)."""

    id: str
    source: str
    protocol: Family
    image: str
    requirements: list[str] = Field(default_factory=list)
    asked: list[str] = Field(default_factory=list)
    imports: list[str] = Field(default_factory=list)
    is_ready: bool = False
    digest: str | None = None
    packages: list[str] = Field(default_factory=list)
    aliases: list[str] = Field(default_factory=list)
    note: str = ""
    version: int | None = None
    versions: list[dict[str, Any]] = Field(default_factory=list)


class MakeEnv(Inside):
    """kwargs: arguments of the environment's constructor. timeout: seconds for one reset, step or call, after which it
    is killed. imports: modules that are imported before, and may register it.

    For Gymnasium: num_envs makes a vector of them in one process, vectorization_mode and vector_kwargs are those of
    gymnasium.make_vec. folder: a folder inside with an env.py whose make_env makes the environment, "." for the image's
    working directory or /app; root: a folder inside from which that may import; task: "suite" or "suite/task".
    agents: the interface of an environment of several agents (PettingZoo), whose env_id is a module or a make_env.

    name: an alternative identifier, "name:NAME" instead of the number; a name in use is a Conflict. idle: seconds
    without a request after which it is closed. begin: reset it too, and include the response of the reset. owner: id of
    the client process that makes it. The environment is released when that process has not renewed its lease for
    `EnvInfo.lease` seconds; without an owner it lives as long as its sandbox, or until its idle timeout.
    """

    env_id: str = Field(min_length=1, max_length=256)
    protocol: Family = "gem"
    kwargs: dict[str, Any] = Field(default_factory=dict)
    imports: list[str] = Field(default_factory=list, max_length=64)
    num_envs: int | None = Field(default=None, ge=1, le=4096)
    vectorization_mode: str | None = None
    vector_kwargs: dict[str, Any] | None = None
    agents: Literal["parallel", "aec"] | None = None
    folder: str | None = None
    root: str | None = None
    timeout: float | None = Field(default=None, gt=0, le=86400)
    task: str | None = None
    name: str | None = Field(default=None, pattern=NAME_PATTERN)
    idle: float | None = Field(default=None, gt=0, le=7 * 86400)
    begin: bool = False
    owner: str | None = Field(default=None, pattern=OWNER_PATTERN)


class Door(Answer):
    """The address at which a client on the server's own machine may borrow the pipes of an environment
    (rocklet/environments/local_socket.py)."""

    path: str
    token: str


class EnvInfo(Answer):
    """An environment that was made: `env` is its number in the sandbox. With `begin`, also the response of its reset.
    lease: with an owner, seconds within which the owner has to renew its lease."""

    env: int
    env_id: str = ""
    sandbox_id: str = ""
    door: Door | None = None
    lease: float | None = None
    observation: Any = None
    info: dict[str, Any] = Field(default_factory=dict)


class ForkEnv(Inside):
    """Fork an environment: `count` copies of its process, which continue as it would. reseed: draw new seeds in each.

    names, idle, owner: of the children, as in MakeEnv; as many names as children.
    """

    count: int = Field(default=1, ge=1, le=MOST_FORKS)
    reseed: bool = False
    names: list[Annotated[str, Field(pattern=NAME_PATTERN)]] | None = None
    idle: float | None = Field(default=None, gt=0, le=7 * 86400)
    owner: str | None = Field(default=None, pattern=OWNER_PATTERN)


class ForkedEnv(EnvInfo):
    """A child of a fork, or `error`: why this one could not be started; `env` is 0 then."""

    error: dict[str, Any] | None = None


class ForkedEnvs(Answer):
    """The children of a fork, in the order of the names. At least one was started."""

    items: list[ForkedEnv] = Field(default_factory=list)


class EnvOwner(Answer):
    """Number of environments of a sandbox that a client process owns; after a renewal with 0 there is nothing to
    renew."""

    owner: str
    environments: int


class ResetEnv(Wire):
    seed: int | None = None
    options: dict[str, Any] | None = None


class CallEnv(Wire):
    """Call another method of an environment: `what`, and its arguments."""

    what: str = Field(min_length=1, max_length=64)
    arguments: list[Any] = Field(default_factory=list, max_length=16)


class CallResult(Answer):
    result: Any = None


class ResetResult(Answer):
    observation: Any = None
    info: dict[str, Any] = Field(default_factory=dict)


class StepEnv(Wire):
    """`index`: number of this step in the episode, from 0; the same index again gets the same response."""

    action: Any
    index: int | None = None


class StepResult(Answer):
    observation: Any = None
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: dict[str, Any] = Field(default_factory=dict)


# ---- errors ----
#
# Errors inside an environment become typed errors.

_NOT_STARTED = {"unknown", "refused", "image", "unforkable", "unforked"}
_TASK: dict[str, type[RockError]] = {"not_found": NotFound, "unsupported": Unsupported}  # others are InvalidConfig


def error_of(told: dict[str, Any], sandbox_id: str) -> tuple[RockError, bool]:
    """The error in an error frame of an environment, and whether its process was started.

    The content comes from inside the sandbox, so the type of each value is checked.
    """
    kind, name, text = str(told.get("kind")), str(told.get("type")), str(told.get("message"))
    started = not (kind in _NOT_STARTED or (kind in ("import", "task") and "next" not in told))
    details = {"type": name, "traceback": str(told.get("traceback", ""))}
    if type(told.get("next")) is int:
        details["next"] = told["next"]
    near, code = told.get("near"), str(told.get("code"))
    return _error(kind, name, text, details, near if isinstance(near, list) else [], code, sandbox_id), started


def _error(
    kind: str, name: str, text: str, details: dict[str, Any], near: list[Any], code: str, sandbox_id: str
) -> RockError:
    if kind == "unknown":
        names = ", ".join(map(str, near))
        hint = f"did you mean {names}?" if near else "`rock env list` shows what there is"
        return NotFound(text, sandbox_id=sandbox_id, hint=hint)
    if kind == "unknown_env":
        return NotFound(text, sandbox_id=sandbox_id, details=details,
                        hint="a package that registers it goes into packages, its module into imports")  # fmt: skip
    if kind == "task":
        return _TASK.get(code, InvalidConfig)(text, sandbox_id=sandbox_id, details=details)
    if kind == "import":
        return ActionError(
            f"the environment cannot be imported: {name}: {text}",
            sandbox_id=sandbox_id,
            details=details,
            hint="it needs a package that is not installed for it",
        )
    if kind == "image":
        return ImageError(text, sandbox_id=sandbox_id, details=details, hint="install it in the image")
    if kind == "source":
        return InvalidConfig(text, sandbox_id=sandbox_id, hint="it defines make_env(**kwargs); cwd= names its folder")
    if kind == "refused":
        return QuotaExceeded(
            f"the sandbox cannot start another process: {text}",
            sandbox_id=sandbox_id,
            hint="close environments, or ask for more pids or memory",
        )
    if kind == "unforkable":
        return Unsupported(text, sandbox_id=sandbox_id, details=details,
                           hint="make another environment and repeat the actions; an environment whose copy by os.fork "
                                "is correct nevertheless declares fork_safe = True")  # fmt: skip
    if kind == "unforked":
        return EnvironmentEnded(text, sandbox_id=sandbox_id, hint="fork again, or make a new environment")
    if kind == "refused_step":
        return Conflict(text, sandbox_id=sandbox_id, details=details,
                        hint="steps are numbered from 0; does another client use this environment?")  # fmt: skip
    if kind == "gone":
        return NotFound(text, sandbox_id=sandbox_id, hint="make a new one")
    if kind == "transport":
        return EnvironmentRaised(text, sandbox_id=sandbox_id, details=details,
                                 hint="only plain values, arrays, tuples, sets and bytes can be sent")  # fmt: skip
    return EnvironmentRaised(f"the environment raised {name}: {text}", sandbox_id=sandbox_id, details=details)


# ---- task suites ----
#
# Responses for tasks of a training set, shared by the SDK and AgentScope's routes.

IDLE = 300.0  # idle timeout of an instance in seconds
STEP_TIMEOUT = 60.0  # seconds for one step, after which the instance is ended
START_TIMEOUT = 1200.0  # seconds; the first sandbox of a set installs its packages
NAMED = "name:"  # prefix of the name of an environment, where its number could stand


def new_instance_id() -> str:
    """A generated name for an instance without one."""
    return f"exp_{os.urandom(12).hex()}"


def created(made: EnvInfo, instance_id: str, task_id: str) -> dict[str, Any]:
    """The response of create_instance."""
    return {"state": made.observation, "info": {**made.info, "instance_id": instance_id, "task_id": task_id}}


def stepped(done: StepResult) -> dict[str, Any]:
    """The response of step. There is one flag for an end; info["truncated"] marks an end that is not the task's own."""
    return {
        "state": done.observation,
        "reward": done.reward,
        "is_terminated": done.terminated or done.truncated,
        "info": done.info,
    }


def overdue(error: CommandTimeout) -> dict[str, Any]:
    """The response to a step that exceeded its timeout: the end of the episode, with the reason."""
    info = {"truncated": True, "stop_reason": "step_timeout", "failure": "timeout", "error": error.message}
    return {"state": [], "reward": 0.0, "is_terminated": True, "info": info}
