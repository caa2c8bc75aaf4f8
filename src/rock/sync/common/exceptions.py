# GENERATED from src/rock/sdk/common/exceptions.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""ROCK's path and names of the errors; all of them are drawn in `rock.errors`."""

from rock.errors import (
    BadRequestRockError,
    ClientError,
    CommandRockError,
    InternalServerRockError,
    InvalidConfig,
    NotFound,
    RockError,
    RockException,
    codes,
    raise_for_code,
)

InvalidParameterRockException = InvalidConfig  # ROCK's deprecated name
SandboxNotFoundRockError = NotFound

__all__ = [
    "BadRequestRockError",
    "ClientError",
    "CommandRockError",
    "InternalServerRockError",
    "InvalidParameterRockException",
    "RockError",
    "RockException",
    "SandboxNotFoundRockError",
    "codes",
    "raise_for_code",
]
