"""Sandboxes: `from rock.sdk.sandbox import Sandbox, SandboxConfig`."""

from rock.protocol.action import RunMode, RunModeType
from rock.protocol.sandbox import SandboxConfig, SandboxGroupConfig
from rock.sdk.sandbox.group import SandboxGroup
from rock.sdk.sandbox.processes import Process
from rock.sdk.sandbox.sandbox import Sandbox

__all__ = ["Process", "RunMode", "RunModeType", "Sandbox", "SandboxConfig", "SandboxGroup", "SandboxGroupConfig"]
