"""Requests of GEM environments as ROCK's dialect has them (`/apis/v1/envs/gem`)."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, StringConstraints

_Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class EnvMakeRequest(BaseModel):
    env_id: _Text
    sandbox_id: _Text


class EnvResetRequest(BaseModel):
    sandbox_id: _Text
    seed: int | None = None


class EnvStepRequest(BaseModel):
    sandbox_id: _Text
    action: str


class EnvCloseRequest(BaseModel):
    sandbox_id: _Text


__all__ = ["EnvCloseRequest", "EnvMakeRequest", "EnvResetRequest", "EnvStepRequest"]
