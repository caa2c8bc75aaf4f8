# GENERATED from src/rock/sdk/envhub/__init__.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""Registered environments: `from rock.sync.envhub.client import EnvHubClient`."""

from rock.errors import EnvHubError
from rock.sync.envhub.client import EnvHubClient
from rock.sdk.envhub.schema import EnvHubClientConfig, RockEnvInfo

__all__ = ["EnvHubClient", "EnvHubClientConfig", "EnvHubError", "RockEnvInfo"]
