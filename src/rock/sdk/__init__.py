"""The asynchronous SDK. The names are those of its modules; they are loaded when they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rock.sdk.client import Client
    from rock.sdk.sandbox import Process, RunMode, RunModeType, Sandbox, SandboxConfig, SandboxGroup, SandboxGroupConfig

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
        from rock.sdk.client import Client

        return Client
    if name in __all__:
        from rock.sdk import sandbox

        return getattr(sandbox, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
