"""ROCK's envelope of an answer, for code that reads its HTTP answers by these classes."""

from __future__ import annotations

from enum import StrEnum
from typing import Generic, TypeVar

from pydantic import BaseModel

Result = TypeVar("Result")


class ResponseStatus(StrEnum):
    SUCCESS = "Success"
    FAILED = "Failed"


class BaseResponse(BaseModel):
    status: ResponseStatus = ResponseStatus.SUCCESS
    message: str | None = None
    error: str | None = None


class RockResponse(BaseResponse, Generic[Result]):
    result: Result | None = None


__all__ = ["BaseResponse", "ResponseStatus", "RockResponse"]
