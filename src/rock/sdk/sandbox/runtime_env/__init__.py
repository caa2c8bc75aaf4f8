"""Python and Node.js in a sandbox: `RuntimeEnv.create(sandbox, PythonRuntimeEnvConfig(pip=["requests"]))`."""

from rock.sdk.sandbox.runtime_env.base import RuntimeEnv
from rock.sdk.sandbox.runtime_env.config import NodeRuntimeEnvConfig, PythonRuntimeEnvConfig, RuntimeEnvConfig
from rock.sdk.sandbox.runtime_env.node import NodeRuntimeEnv
from rock.sdk.sandbox.runtime_env.python import PythonRuntimeEnv

RuntimeEnvConfigType = NodeRuntimeEnvConfig | PythonRuntimeEnvConfig

__all__ = [
    "NodeRuntimeEnv",
    "NodeRuntimeEnvConfig",
    "PythonRuntimeEnv",
    "PythonRuntimeEnvConfig",
    "RuntimeEnv",
    "RuntimeEnvConfig",
    "RuntimeEnvConfigType",
]
