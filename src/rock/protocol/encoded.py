"""Configs as JSON. One that many sandboxes have in common, as those of a burst or of a group, is encoded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rock.protocol.sandbox import SandboxConfig

_MOST = 256
T = TypeVar("T", str, bytes)
_travelling: dict[int, tuple[SandboxConfig, bytes]] = {}  # by identity, which is theirs for as long as they are here
_kept: dict[int, tuple[SandboxConfig, str]] = {}


def travelling(config: SandboxConfig) -> bytes:
    """As it is passed on to a worker."""
    return _encoded(_travelling, config, lambda: config.model_dump_json(exclude=config.unchosen).encode())


def kept(config: SandboxConfig) -> str:
    """As it is written down: without the registry's password, which is needed for one pull and never later, and
    without what is not set, which is half of it."""
    exclude = {"registry_password", *config.unchosen}
    return _encoded(_kept, config, lambda: config.model_dump_json(exclude=exclude, exclude_none=True))


def _encoded(known: dict[int, tuple[SandboxConfig, T]], config: SandboxConfig, encode: Callable[[], T]) -> T:
    if config.registry_password is not None:  # which is not remembered anywhere
        return encode()
    entry = known.get(id(config))
    if entry is None or entry[0] is not config:
        if len(known) >= _MOST:
            known.clear()
        entry = known[id(config)] = (config, encode())
    return entry[1]
