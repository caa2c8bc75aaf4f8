"""What a sandbox is asked to be; the same classes travel on the wire."""

from rock.protocol.sandbox import BaseConfig, SandboxConfig, SandboxGroupConfig

__all__ = ["BaseConfig", "SandboxConfig", "SandboxGroupConfig"]
