"""ROCK's import path of the sandbox configuration of jobs: names of `rock.jobs.config`."""

from __future__ import annotations

from rock.jobs.config import EnvironmentConfig, OssMirrorConfig, ProxyConfig, TrackingConfig

__all__ = ["EnvironmentConfig", "OssMirrorConfig", "ProxyConfig", "TrackingConfig"]
