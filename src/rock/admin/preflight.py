"""Checks before a server starts. The module imports almost nothing, because the start command uses it too."""

from __future__ import annotations

import ipaddress

from rock.errors import InvalidConfig

_ROLES: dict[str, str] = {"all": "all", "write": "write", "admin": "write", "read": "read", "proxy": "read"}


def role_of(name: str) -> str:
    """The role in the settings: all, write or read. InvalidConfig."""
    try:
        return _ROLES[name]
    except KeyError:
        raise InvalidConfig(f"there is no role {name!r}", hint=", ".join(_ROLES)) from None


def is_loopback(host: str) -> bool:
    """Whether a server that listens on `host` is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_key_beyond_loopback(host: str, key: str | None) -> None:
    """InvalidConfig for a server that any client could use."""
    if not key and not is_loopback(host):
        raise InvalidConfig(
            f"refusing to listen on {host} without an API key: anybody who can reach it could run programs here",
            hint="set ROCK_API_KEY, or listen on 127.0.0.1",
        )
