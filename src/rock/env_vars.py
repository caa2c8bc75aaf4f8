"""Compatibility module: settings as attributes, `rock.env_vars.ROCK_BASE_URL`, as in the original ROCK.

Each access reads the process's environment, else the default below; an assignment overrides both. Settings of the
original ROCK server are not available: AttributeError lists the available ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rock import settings

_TEXT: dict[str, str | None] = {
    "ROCK_BASE_URL": settings.DEFAULT_URL,
    "ROCK_ENVHUB_BASE_URL": "http://localhost:8081",
    "ROCK_ENVHUB_DB_URL": None,
    "ROCK_ENVHUB_DEFAULT_DOCKER_IMAGE": "python:3.11",
    "ROCK_DEFAULT_CLUSTER": "vpc-nt-a",
    "ROCK_CONFIG": None,
    "ROCK_LOGGING_PATH": None,
    "ROCK_LOGGING_FILE_NAME": "rocklet.log",
    "ROCK_LOGGING_LEVEL": "INFO",
    "ROCK_PIP_INDEX_URL": None,
    "ROCK_TIME_ZONE": "UTC",
    "ROCK_CLI_DEFAULT_CONFIG_PATH": str(Path.home() / ".rock" / "config.ini"),
    "ROCK_RTENV_PYTHON_V31114_INSTALL_CMD": None,
    "ROCK_RTENV_PYTHON_V31212_INSTALL_CMD": None,
    "ROCK_RTENV_NODE_V22180_INSTALL_CMD": None,
}
_NUMBERS = {"ROCK_SANDBOX_STARTUP_TIMEOUT_SECONDS": 180, "ROCK_DEFAULT_AUTO_CLEAR_TIME_MINUTES": 360}
_SWITCHES = ("ROCK_LOGGING_APPEND", "ROCK_OSS_ENABLE", "ROCK_MONITOR_ENABLE")

__all__ = ["is_set"]


def is_set(name: str) -> bool:
    """Whether the environment has the variable."""
    return settings.variable(name) is not None


def __getattr__(name: str) -> Any:
    text = settings.variable(name)
    if name in _TEXT:
        return _TEXT[name] if text is None else text
    if name in _NUMBERS:
        return _NUMBERS[name] if text is None else float(text) if "." in text else int(text)
    if name in _SWITCHES:
        return text is not None and text.strip().lower() in ("1", "true", "yes", "on")
    known = ", ".join(sorted([*_TEXT, *_NUMBERS, *_SWITCHES]))
    raise AttributeError(f"rock.env_vars has no {name!r}; it has {known}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_TEXT, *_NUMBERS, *_SWITCHES])
