"""The dialects of other sandbox services, mounted in a server."""

from __future__ import annotations

import secrets
from pathlib import Path

from rock.admin.app import Admin
from rock.dialects.e2b import E2B, Options
from rock.errors import InvalidConfig
from rock.host import atomic_file
from rock.http.asgi import App
from rock.protocol.sandbox import SandboxConfig
from rock.settings import Settings
from rock.store.base import Store

_SECRET = "e2b.key"  # in ROCK_HOME


def e2b_of(settings: Settings, admin: Admin, store: Store, data: App) -> E2B | None:
    """The E2B dialect; None with ROCK_E2B=off. InvalidConfig. data: the data plane."""
    if settings.e2b == "off":
        return None
    try:
        SandboxConfig(memory=settings.e2b_memory)
    except ValueError as error:
        raise InvalidConfig(f"ROCK_E2B_MEMORY: {error}", hint="use a size like 2g") from None
    domain = settings.e2b_domain.lower().strip(".")
    options = Options(settings.e2b_image, settings.e2b_network, settings.e2b_memory, settings.e2b_cpus, domain,
                      Path(settings.home) / "e2b")
    made = E2B(admin.tenant_services, admin.keys, data, store.get, _secret(settings), options)
    admin.service.on_pausing.append(made.on_pausing)
    admin.service.on_continued.append(made.on_continued)
    return made


def _secret(settings: Settings) -> bytes:
    """The key of access tokens: derived from ROCK_API_KEY, which all servers of an installation have, else a file in
    ROCK_HOME."""
    if settings.api_key:
        return settings.api_key.encode()
    file = Path(settings.home) / _SECRET
    try:
        found = file.read_bytes()
        if len(found) >= 32:
            return found
    except FileNotFoundError:
        pass
    made = secrets.token_hex(32).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_file.replace(file, made.decode())
    return made
