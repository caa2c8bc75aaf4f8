"""The former import path of `rock.guest.environments.tasks`, for adapters of other distributions."""

from __future__ import annotations

from rock.guest.environments.tasks import (
    DATA,
    BadAction,
    BadParams,
    Message,
    MissingData,
    Outcome,
    Task,
    TaskError,
    UnknownTask,
    says,
    text_of,
)

__all__ = [
    "DATA",
    "BadAction",
    "BadParams",
    "Message",
    "MissingData",
    "Outcome",
    "Task",
    "TaskError",
    "UnknownTask",
    "says",
    "text_of",
]
