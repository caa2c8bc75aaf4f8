# GENERATED from src/rock/sdk/__init__.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""The blocking SDK. The names are those of its modules; they are loaded when they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rock.sync.client import Client
    from rock.sync.sandbox import Process, RunMode, RunModeType, Sandbox, SandboxConfig, SandboxGroup, SandboxGroupConfig

__all__ = [
    "Client",
    "Process",
    "RunMode",
    "RunModeType",
    "Sandbox",
    "SandboxConfig",
    "SandboxGroup",
    "SandboxGroupConfig",
]


def __getattr__(name: str) -> Any:
    if name == "Client":
        from rock.sync.client import Client

        return Client
    if name in __all__:
        from rock.sync import sandbox

        return getattr(sandbox, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
