"""task.toml of a Harbor task: reading it, and the settings that ROCK does not provide.

A task with such a setting is refused before anything starts: without the setting, its rewards would mean something
else.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rock.errors import InvalidConfig, Unsupported

SECTIONS = ("environment", "agent", "verifier", "solution")
_LAYOUT = "it has a task.toml, an instruction.md and tests/test.sh"
_NETWORKS = ("public", "no-network")  # the network of the sandboxes is that of the caller's config


def read_task_file(folder: Path) -> dict[str, Any]:
    """task.toml of a folder, with all SECTIONS. InvalidConfig; Unsupported names each setting that is not provided."""
    path = folder / "task.toml"
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidConfig(f"{folder} is no task of Harbor: {error}", hint=_LAYOUT) from None
    for name in SECTIONS:
        if not isinstance(found.setdefault(name, {}), dict):
            raise InvalidConfig(f"{path} has a section that is not a table",
                                hint="make environment, agent, verifier and solution tables")  # fmt: skip
    missing = list(_missing(folder, found))
    if missing:
        raise Unsupported(f"task {folder.name} needs what ROCK does not provide: {'; '.join(missing)}",
                          hint=f"run it with Harbor, or remove the settings from {path}",
                          details={"settings": missing})  # fmt: skip
    return found


def _missing(folder: Path, found: Mapping[str, Any]) -> Iterator[str]:
    """The settings that are not provided, each with its reason."""
    environment, agent, verifier = found["environment"], found["agent"], found["verifier"]
    if found.get("steps") or found.get("multi_step") or (folder / "steps").is_dir():
        yield "steps: a task has one step"
    if verifier.get("environment_mode", "shared") != "shared" or verifier.get("environment"):
        yield "verifier.environment_mode: the tests run in the sandbox of the agent"
    if verifier.get("collect"):
        yield "verifier.collect: the tests run in the sandbox of the agent"
    if environment.get("network_mode", "public") not in _NETWORKS or environment.get("allowed_hosts"):
        yield "environment.network_mode: allow hosts in the configuration of the sandbox"
    for name, section in (("agent", agent), ("verifier", verifier)):
        for key in ("network_mode", "allowed_hosts", "network"):
            if section.get(key):
                yield f"{name}.{key}: the network is that of the sandbox"
        if section.get("user"):
            yield f"{name}.user: programs run as the user of the sandbox"
    if str(environment.get("os", "linux")).lower() != "linux":
        yield "environment.os: sandboxes run Linux"
    for key in ("gpus", "tpu", "mcp_servers", "healthcheck"):
        if environment.get(key):
            yield f"environment.{key}"
