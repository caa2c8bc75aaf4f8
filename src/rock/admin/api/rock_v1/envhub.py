"""EnvHub: environments that users register by name. Plain JSON, without an envelope."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rock.admin.api.rock_v1.envelope import Asked, Name, Row, body_of, detailed
from rock.envhub.catalogue import Catalogue, Registered
from rock.protocol.keys import Access
from rock.wire.asgi import Request


class RegisterRequest(Asked):
    env_name: Name
    image: Name
    owner: str = ""
    description: str = ""
    tags: list[str] = Field(default_factory=list)
    extra_spec: dict[str, Any] | None = None


class AboutEnv(Asked):
    env_name: Name


class ListRequest(Asked):
    owner: str | None = None
    tags: list[str] | None = None


class EnvHub:
    """Handlers of the registry, by method and path."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def routes(self) -> list[Row]:
        return [
            ("POST", "/env/register", detailed(self.register, 422), Access.IMAGES),
            ("POST", "/env/get", detailed(self.get, 422), Access.READ),
            ("POST", "/env/list", detailed(self.list, 422), Access.READ),
            ("POST", "/env/delete", detailed(self.delete, 422), Access.IMAGES),
            ("GET", "/health", detailed(self.health), Access.READ),
        ]

    async def register(self, request: Request) -> dict[str, Any]:
        wish = await body_of(request, RegisterRequest)
        return (await self._catalogue.register(Registered(**wish.model_dump()))).model_dump()

    async def get(self, request: Request) -> dict[str, Any]:
        return (await self._catalogue.get((await body_of(request, AboutEnv)).env_name)).model_dump()

    async def list(self, request: Request) -> dict[str, Any]:
        wish = await body_of(request, ListRequest)
        return {"envs": [env.model_dump() for env in await self._catalogue.list(wish.owner, wish.tags)]}

    async def delete(self, request: Request) -> bool:
        await self._catalogue.delete((await body_of(request, AboutEnv)).env_name)
        return True

    async def health(self, request: Request) -> dict[str, Any]:
        return {"status": "ok"}
