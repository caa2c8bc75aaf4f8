"""`EnvHubClient`: environments that users register by name, with the image they run in."""

from __future__ import annotations

from typing import Any

from rock import errors, settings
from rock.errors import EnvHubError
from rock.sdk.envhub.schema import EnvHubClientConfig, RockEnvInfo
from rock.sdk.transport import Transport

__all__ = ["EnvHubClient", "EnvHubClientConfig", "EnvHubError", "RockEnvInfo"]


class EnvHubClient:
    """A registry of environments: an `envhub`, or any ROCK server, which has one. Every call raises EnvHubError, whose
    `__cause__` is what went wrong."""

    def __init__(self, config: EnvHubClientConfig | None = None) -> None:
        self.config = config or EnvHubClientConfig()
        self.base_url = self.config.base_url.rstrip("/")
        self._transport = Transport(self.base_url, settings.api_key())

    async def register(
        self,
        env_name: str,
        image: str,
        owner: str = "",
        description: str = "",
        tags: list[str] | None = None,
        extra_spec: dict[str, Any] | None = None,
    ) -> RockEnvInfo:
        """Register an environment, in place of one of this name."""
        spec = RockEnvInfo(env_name, image, owner, "", "", description, list(tags or []), extra_spec).to_dict()
        return self._info(await self._call("POST", "/env/register", spec, "Failed to register environment"))

    async def get_env(self, env_name: str) -> RockEnvInfo:
        """The environment of this name."""
        body = {"env_name": env_name}
        return self._info(await self._call("POST", "/env/get", body, f"Failed to get environment {env_name}"))

    async def list_envs(self, owner: str | None = None, tags: list[str] | None = None) -> list[RockEnvInfo]:
        """All of them by name, or those of an owner, or those that have at least one of the tags."""
        answer = await self._call("POST", "/env/list", {"owner": owner, "tags": tags}, "Failed to list environments")
        found = answer.get("envs") if isinstance(answer, dict) else None
        if not isinstance(found, list):
            raise EnvHubError(f"malformed answer of {self.base_url}: {str(answer)[:200]!r}")
        return [self._info(item) for item in found]

    async def delete_env(self, env_name: str) -> bool:
        """Forget an environment; False when there is none of this name."""
        try:
            await self._call("POST", "/env/delete", {"env_name": env_name}, f"Failed to delete environment {env_name}")
        except EnvHubError as error:
            if error.details.get("http_status") != 404:
                raise
            return False
        return True

    async def health_check(self) -> dict[str, str]:
        """`{"status": "ok"}` when it serves."""
        answer = await self._call("GET", "/health", None, "Failed to health check")
        return {str(name): str(value) for name, value in answer.items()} if isinstance(answer, dict) else {}

    async def _call(self, method: str, path: str, body: Any, words: str) -> Any:
        try:
            return await self._transport.json(method, path, body)
        except errors.RockError as error:
            raise EnvHubError(f"{words}: {error.message}", hint=error.hint, details=error.details) from error

    def _info(self, answer: Any) -> RockEnvInfo:
        try:
            return RockEnvInfo.from_dict(answer)
        except (TypeError, AttributeError):
            raise EnvHubError(f"malformed answer of {self.base_url}: {str(answer)[:200]!r}") from None
