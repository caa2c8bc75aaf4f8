# GENERATED from src/rock/sdk/sandbox/config.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""What a sandbox is asked to be; the same classes travel on the wire."""

from rock.protocol.sandbox import BaseConfig, SandboxConfig, SandboxGroupConfig

__all__ = ["BaseConfig", "SandboxConfig", "SandboxGroupConfig"]
