"""The names that ROCK's users import: `from rock.sdk.sandbox.client import Sandbox`."""

from rock.protocol.action import RunMode, RunModeType
from rock.sdk.sandbox.group import SandboxGroup
from rock.sdk.sandbox.sandbox import Sandbox

__all__ = ["RunMode", "RunModeType", "Sandbox", "SandboxGroup"]
