"""Groups: many equal sandboxes in one request."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rock.protocol.action import Answer
from rock.protocol.sandbox import SandboxConfig, SandboxInfo, Wire

MOST = 10_000  # sandboxes of one group


class GroupRequest(Wire):
    """`size` sandboxes of one config. Where that has a `sandbox_id`, it is the group's id, else the server chooses one;
    the sandboxes are named after it: ID-0, ID-1, ...

    mode: "gang" is all or none: those that started are stopped when one cannot. "best_effort" is as many as there is
    room and quota for. placement: "spread" puts few on each worker, "pack" uses few workers.
    """

    config: SandboxConfig
    size: int = Field(ge=1, le=MOST)
    mode: Literal["gang", "best_effort"] = "gang"
    placement: Literal["spread", "pack"] = "spread"


class GroupInfo(Answer):
    """A group, its sandboxes in order, without their histories. missing: how many of the request were not made, by
    best effort; error: why, as it travels, with the answer to the request alone."""

    group_id: str
    sandboxes: list[SandboxInfo]
    missing: int = 0
    error: dict[str, Any] | None = None
