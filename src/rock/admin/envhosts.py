"""Sandboxes that host environments: found by the package set they have, or made."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from rock.envhub import registry
from rock.protocol.env import OpenEnv
from rock.protocol.keys import Caller
from rock.protocol.sandbox import SandboxConfig, SandboxInfo, State
from rock.store.base import Query, Record

if TYPE_CHECKING:
    from rock.admin.service import Service

_LABEL = "rock.env"


class EnvHosts:
    """Running ones are shared by the environments of one tenant."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = asyncio.Lock()

    async def open(self, wish: OpenEnv, wait: float, key: str | None, caller: Caller) -> SandboxInfo:
        """A sandbox that can host the environment: a running one of its package set and this tenant, else a new one."""
        image = registry.image_for(wish)
        known = await self._service.store.by_key(key, caller.owner) if key else None
        if known is not None:
            return await self._service.launches.waited(known, wait)
        async with self._lock:  # two first wishes must not make two hosts
            found = (
                []
                if wish.exclusive
                else await self._service.store.list(
                    Query((State.RUNNING, State.PENDING), labels={_LABEL: image}, limit=1, tenant=caller.owner)
                )
            )
            record = found[0] if found else await self._create(image, wish, key, caller)
        return await self._service.launches.waited(record, wait)

    async def _create(self, image: str, wish: OpenEnv, key: str | None, caller: Caller) -> Record:
        config = wish.config or env_host()
        config = config.model_copy(
            update={
                "image": image,
                "labels": config.labels if wish.exclusive else {**config.labels, _LABEL: image},
                # The first start installs the packages.
                "startup_timeout": max(config.startup_timeout, 1200.0),
            }
        )
        return await self._service.insert(config, key, caller)


def env_host() -> SandboxConfig:
    """What hosts environments where nobody says otherwise."""
    return SandboxConfig(image="host", memory="4g", cpus=1.0, auto_clear_seconds=600)
