"""ROCK's model service: `from rock.sdk.sandbox.model_service.base import ModelService, ModelServiceConfig`."""

from rock.sdk.sandbox.model_service.base import ModelService, ModelServiceConfig

__all__ = ["ModelService", "ModelServiceConfig"]
