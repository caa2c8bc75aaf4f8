"""Configs as they come: the same one for the same text, as a burst asks for one and the same. Nobody changes one."""

from __future__ import annotations

from rock.protocol.sandbox import SandboxConfig
from rock.wire.asgi import parsed, validate

_MOST = 64
_LONGEST = 4096  # bytes


class Configs:
    """What was read last, by its text."""

    def __init__(self) -> None:
        self._known: dict[bytes, SandboxConfig] = {}

    def read(self, text: bytes) -> SandboxConfig:
        """InvalidConfig names each wrong field."""
        known = self._known.get(text)
        if known is not None:
            return known
        config = validate(SandboxConfig, parsed(text))
        if len(text) <= _LONGEST and config.registry_password is None:
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[text] = config
        return config
