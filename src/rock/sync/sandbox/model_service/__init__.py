# GENERATED from src/rock/sdk/sandbox/model_service/__init__.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""ROCK's model service: `from rock.sync.sandbox.model_service.base import ModelService, ModelServiceConfig`."""

from rock.sync.sandbox.model_service.base import ModelService, ModelServiceConfig

__all__ = ["ModelService", "ModelServiceConfig"]
