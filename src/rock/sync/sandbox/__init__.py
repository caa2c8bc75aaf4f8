# GENERATED from src/rock/sdk/sandbox/__init__.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""Sandboxes: `from rock.sync.sandbox import Sandbox, SandboxConfig`."""

from rock.protocol.action import RunMode, RunModeType
from rock.protocol.sandbox import SandboxConfig, SandboxGroupConfig
from rock.sync.sandbox.group import SandboxGroup
from rock.sync.sandbox.processes import Process
from rock.sync.sandbox.sandbox import Sandbox

__all__ = ["Process", "RunMode", "RunModeType", "Sandbox", "SandboxConfig", "SandboxGroup", "SandboxGroupConfig"]
