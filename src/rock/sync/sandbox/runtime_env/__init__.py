# GENERATED from src/rock/sdk/sandbox/runtime_env/__init__.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""Python and Node.js in a sandbox: `RuntimeEnv.create(sandbox, PythonRuntimeEnvConfig(pip=["requests"]))`."""

from rock.sync.sandbox.runtime_env.base import RuntimeEnv
from rock.sync.sandbox.runtime_env.config import NodeRuntimeEnvConfig, PythonRuntimeEnvConfig, RuntimeEnvConfig
from rock.sync.sandbox.runtime_env.node import NodeRuntimeEnv
from rock.sync.sandbox.runtime_env.python import PythonRuntimeEnv

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
