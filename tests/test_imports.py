"""Imports point down only, and optional dependencies stay in the file that bears their name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "rock"
GROUND = {"protocol", "errors", "faults", "settings", "telemetry", "http"}
ALLOWED: dict[str, set[str]] = {
    "protocol": {"protocol", "errors", "settings"},
    "errors": set(),
    "faults": {"errors"},
    "settings": {"rock_conf"},
    "rock_conf": set(),
    "telemetry": {"telemetry"},
    "http": {"http", "protocol", "errors", "faults", "telemetry"},
    "guest": {"guest"},
    "host": {"host", "guest", *GROUND},
    "egress": {"egress", "host", "guest", *GROUND},
    # recipes: data that the client and the worker share
    "agents": {"agents"},
    "images": {"images", "agents", "egress", "host", "guest", *GROUND},
    "runtime": {"runtime", "images", "egress", "host", "guest", *GROUND},
    "store": {"store", *GROUND},
    "scheduler": {"scheduler", *GROUND},
    "envhub": {"envhub", "datasets", *GROUND},
    "kubernetes": {"kubernetes", "scheduler", *GROUND},
    # what runs inside a sandbox, and the plain data that tells the server of it
    "datasets": {"datasets", "guest"},
    "rocklet": {"rocklet", "agents", "runtime", "images", "egress", "host", "guest", "envhub", *GROUND},
    "gateway": {"gateway", "host", *GROUND},
    "proxy": {"proxy", "scheduler", "store", *GROUND},
    "ui": {"ui", "admin", "store", *GROUND},
    "admin": {"admin", "envhub", "kubernetes", "rock_conf", "scheduler", "store", *GROUND},
    # protocols of other services, over the service interface of the admin and the data plane
    "dialects": {"dialects", "admin", "store", "guest", "host", *GROUND},
    # configurations, plans, grading, statistics and reports of jobs: no I/O but local files
    "jobs": {"jobs", "protocol", "errors", "settings"},
    "sdk": {"sdk", "agents", "jobs", "protocol", "errors", "settings", "telemetry"},
    "sync": {"sync", "sdk", "agents", "jobs", "protocol", "errors", "settings", "telemetry"},
    "actions": {"actions", "protocol"},
    # ROCK's paths, that nothing of ours imports
    "env_vars": {"settings"},
    "logger": {"env_vars"},
    "utils": {"utils", "errors", "protocol"},
    # guest: the frames and values that an environment is spoken to with are the same on both sides
    "envs": {"envs", "sync", "guest", "protocol", "errors", "settings"},
    "training": {"sdk", "sync"},
    # classes that other frameworks load by path; each imports its framework in itself, and nothing of the server
    "integrations": {"integrations", "envs", "gym", "guest", "sdk", "sync", "protocol", "errors", "settings"},
    "gym": {"gym", "envs", "guest", "sync", "protocol", "errors", "settings"},
}
# Old import paths that only name things of a higher floor again.
ALIASES = {"sdk/envs/__init__": {"envs"}, "sdk/envs/rock_env": {"envs"}, "sdk/envs/registration": {"envs"},
            "sdk/common": {"errors"}}
ROOFS = {"__main__", "cli", "__init__", "bench", "testing"}
OPTIONAL = {"numpy", "gymnasium", "torch", "ray", "gem", "httpx", "requests", "aiohttp", "docker", "asyncpg", "psycopg",
            "opentelemetry", "prometheus_client", "inspect_ai", "stable_baselines3", "pettingzoo", "minisweagent",
            "smolagents", "harbor", "trl", "verifiers", "skyrl_gym", "nemo_gym", "verl", "tinker_cookbook",
            "deepagents", "agents"}

# Where they may be imported: in what bears their name, and in what runs inside a sandbox, where they are installed.
HOMES = {
    "gymnasium": {"gym", "guest/environments/hosting", "guest/environments/host",
                  "guest/environments/spaces"},
    "numpy": {"gym", "envs/vector", "guest/environments/values", "integrations/stable_baselines3"},
    "torch": {"gym/torch"},
    "asyncpg": {"store/postgres"},
    "opentelemetry": {"telemetry/otel"},
    "ray": {"scheduler/ray"},
    **{name: {f"integrations/{name}"} for name in (
        "inspect_ai", "stable_baselines3", "minisweagent", "smolagents", "harbor", "trl", "verifiers", "skyrl_gym",
        "verl", "tinker_cookbook", "deepagents")},
    "nemo_gym": {"integrations/nemo_gym", "integrations/nemo_gym_server"},
    "pettingzoo": {"integrations/pettingzoo", "guest/environments/agents"},
    "agents": {"integrations/openai_agents"},
    "gem": {"envs/vector", "guest/environments/hosting", "guest/environments/host"},
}


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield path, ast.parse(path.read_text())


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            if node.module == "rock":
                yield from (f"rock.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", [p for p, _ in modules()], ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    part = part_of(path)
    if part in ROOFS:
        return
    assert part in ALLOWED, f"{part} has no place in the map"
    allowed = set(ALLOWED[part])
    for prefix, more in ALIASES.items():
        if str(path.relative_to(SOURCE)).startswith(prefix):
            allowed |= more
    for name in imported(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "rock" and len(parts) > 1 and parts[1] != "__version__":
            assert parts[1] in allowed, f"{path.relative_to(SOURCE)} imports {name}"
        if parts[0] in OPTIONAL:
            homes = HOMES.get(parts[0], set())
            place = path.relative_to(SOURCE).with_suffix("").as_posix()
            assert part in homes or place in homes, f"{path.relative_to(SOURCE)} imports {name}"


def test_only_settings_read_the_environment() -> None:
    readers = [
        path.relative_to(SOURCE)
        for path, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in ("environ", "getenv")
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
        # what runs inside a sandbox, adapters of training sets too, has an environment of its own
        and part_of(path) not in ("settings", "guest", "datasets")
    ]
    assert readers == []


def test_nothing_runs_text_through_a_shell() -> None:
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "shell":
                assert not (isinstance(node.value, ast.Constant) and node.value.value is True), path
            if isinstance(node, ast.Attribute) and node.attr in ("system", "popen"):
                assert not (isinstance(node.value, ast.Name) and node.value.id == "os"), path
