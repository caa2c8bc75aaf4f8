"""Answers of GEM environments as ROCK's dialect has them (`/apis/v1/envs/gem`)."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class EnvMakeResponse(BaseModel):
    sandbox_id: str


class EnvResetResponse(BaseModel):
    observation: Any
    info: dict[str, Any]


class EnvStepResponse(BaseModel):
    observation: Any
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


class EnvCloseResponse(BaseModel):
    sandbox_id: str


class EnvListResponse(BaseModel):
    env_id: list[str]


__all__ = ["EnvCloseResponse", "EnvListResponse", "EnvMakeResponse", "EnvResetResponse", "EnvStepResponse"]
