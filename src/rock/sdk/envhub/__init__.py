"""Registered environments: `from rock.sdk.envhub.client import EnvHubClient`."""

from rock.errors import EnvHubError
from rock.sdk.envhub.client import EnvHubClient
from rock.sdk.envhub.schema import EnvHubClientConfig, RockEnvInfo

__all__ = ["EnvHubClient", "EnvHubClientConfig", "EnvHubError", "RockEnvInfo"]
