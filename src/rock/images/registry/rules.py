"""Registries that the owner of the server names: in the settings of the process, and in the live configuration.

`set_rules` replaces those of the live configuration, for connections that are opened afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rock import settings


@dataclass(frozen=True)
class _Rules:
    mirrors: Mapping[str, Sequence[str]] = field(default_factory=dict)
    insecure: frozenset[str] = frozenset()
    private: frozenset[str] = frozenset()


_live = _Rules()


def set_rules(mirrors: Mapping[str, Sequence[str]], insecure: Iterable[str], private: Iterable[str]) -> None:
    """Replace the rules of the live configuration. mirrors: by registry, in the order in which they are tried."""
    global _live
    _live = _Rules({name: list(found) for name, found in mirrors.items()}, frozenset(insecure), frozenset(private))


def mirrors_of(registry: str) -> list[str]:
    """The mirrors of a registry, in the order in which they are tried."""
    return [*_live.mirrors.get(registry, ()), *settings.registry_mirrors().get(registry, ())]


def is_insecure(registry: str) -> bool:
    """Whether a registry is contacted without TLS."""
    return registry in _live.insecure or registry in settings.insecure_registries()


def named() -> set[str]:
    """All registries that the server contacts for tenants, wherever they are."""
    known = (*_live.mirrors.values(), *settings.registry_mirrors().values())
    mirrors = {mirror for found in known for mirror in found}
    return mirrors | _live.insecure | _live.private | settings.insecure_registries() | settings.private_registries()
