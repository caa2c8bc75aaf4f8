# GENERATED from src/rock/sdk/envhub/config.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""ROCK's import path of the sandbox configuration of jobs: names of `rock.jobs.config`."""

from __future__ import annotations

from rock.jobs.config import EnvironmentConfig, OssMirrorConfig, ProxyConfig, TrackingConfig

__all__ = ["EnvironmentConfig", "OssMirrorConfig", "ProxyConfig", "TrackingConfig"]
