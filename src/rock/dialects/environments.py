"""Environments by any id that a server has: GEM, Gymnasium, task suites and registered names."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from rock.dialects.api import Api
from rock.errors import InvalidConfig, NotFound, StartFailed, Unavailable
from rock.protocol.sandbox import State

START_WAIT = 1200.0  # seconds; the first environment of a package set installs it
IDLE = 1800.0  # seconds without a request after which an environment is closed


@dataclass(frozen=True)
class Kind:
    """How an environment of an id is made. env_id, protocol: as the native routes name it. about: its description."""

    env_id: str
    protocol: str
    open: dict[str, Any]
    make: dict[str, Any]
    about: dict[str, Any]


async def kind_of(api: Api, env_id: str) -> Kind:
    """NotFound for an unknown id; InvalidConfig for one that has no wire form."""
    if not 0 < len(env_id) <= 256:
        raise NotFound(f"{env_id[:80]!r} is no id of an environment", hint="`rock env list` shows what there is")
    about = await api.json("about_env", query={"id": env_id})
    source, protocol = str(about["source"]), str(about["protocol"])
    if protocol == "gym" and ":" in env_id and "://" not in env_id:
        await _check_family(api, env_id)
    if source.startswith("hf://"):
        raise InvalidConfig(f"the source of {env_id} is {source}, which is started by the client alone",
                            hint="use rock.gym.SandboxEnv for it")
    name = source.removeprefix("gym://").removeprefix("image://").removeprefix("task:")
    opened: dict[str, Any] = {"env_id": name, "protocol": protocol}
    made: dict[str, Any] = {"env_id": name, "protocol": protocol}
    if source.startswith("image://"):
        opened |= {"image": name, "exclusive": True}
        made["folder"] = "."
    if about.get("asked"):
        opened["packages"] = about["asked"]
    if about.get("imports"):
        made["imports"] = about["imports"]
    return Kind(name, protocol, opened, made, about)


async def _check_family(api: Api, env_id: str) -> None:
    """NotFound for an id with the prefix of a family of GEM that GEM does not have: it is not a module's name."""
    family, ids = env_id.partition(":")[0] + ":", [item["id"] for item in (await api.json("list_envs"))["items"]]
    near = [found for found in ids if found.startswith(family)]
    if near:
        close = get_close_matches(env_id, near, 3) or near[:3]
        raise NotFound(f"Environment {env_id} not found in registry.", hint=f"did you mean {', '.join(close)}?")


async def open_sandbox(api: Api, kind: Kind) -> str:
    """The id of a sandbox that can host it. Unavailable, StartFailed."""
    host = await api.json("open_env", kind.open, query={"wait": START_WAIT})
    if host["state"] == State.RUNNING:
        return str(host["sandbox_id"])
    if host["state"] == State.PENDING:
        raise Unavailable(f"the sandbox for {kind.env_id} has not started within {START_WAIT:g} s", hint="retry")
    raise StartFailed(f"the sandbox for {kind.env_id} did not start: {host.get('reason') or host['state']}",
                      sandbox_id=host["sandbox_id"], hint="the log of the server has the cause")


async def make(api: Api, kind: Kind, kwargs: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Make an environment: an EnvInfo as plain data. more: fields of MakeEnv."""
    sandbox_id = await open_sandbox(api, kind)
    body = {**kind.make, "kwargs": kwargs, "idle": IDLE, **more}
    made = await api.json("make_env", body, sandbox_id=sandbox_id)
    assert isinstance(made, dict)
    return {**made, "sandbox_id": sandbox_id}
