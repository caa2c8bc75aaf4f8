"""What goes wrong inside an environment, as a typed error."""

from __future__ import annotations

from typing import Any

from rock.errors import (
    ActionError,
    Conflict,
    EnvironmentRaised,
    InvalidConfig,
    NotFound,
    QuotaExceeded,
    RockError,
    Unsupported,
)

_NOT_STARTED = {"unknown", "refused"}
_TASK: dict[str, type[RockError]] = {"not_found": NotFound, "unsupported": Unsupported}  # else InvalidConfig


def error_of(told: dict[str, Any], sandbox_id: str) -> tuple[RockError, bool]:
    """The error that a frame of an environment tells of, and whether its process was started at all.

    What is told comes from inside, so nothing of it is trusted to be of the right type.
    """
    kind, name, text = str(told.get("kind")), str(told.get("type")), str(told.get("message"))
    started = not (kind in _NOT_STARTED or (kind in ("import", "task") and "next" not in told))
    details = {"type": name, "traceback": str(told.get("traceback", ""))}
    if type(told.get("next")) is int:
        details["next"] = told["next"]
    near, code = told.get("near"), str(told.get("code"))
    return _error(kind, name, text, details, near if isinstance(near, list) else [], code, sandbox_id), started


def _error(
    kind: str, name: str, text: str, details: dict[str, Any], near: list[Any], code: str, sandbox_id: str
) -> RockError:
    if kind == "unknown":
        names = ", ".join(map(str, near))
        hint = f"did you mean {names}?" if near else "`rock env list` shows what there is"
        return NotFound(text, sandbox_id=sandbox_id, hint=hint)
    if kind == "unknown_env":
        return NotFound(text, sandbox_id=sandbox_id, details=details,
                        hint="a package that registers it goes into packages, its module into imports")  # fmt: skip
    if kind == "task":
        return _TASK.get(code, InvalidConfig)(text, sandbox_id=sandbox_id, details=details)
    if kind == "import":
        return ActionError(
            f"the environment cannot be imported: {name}: {text}",
            sandbox_id=sandbox_id,
            details=details,
            hint="it needs a package that is not installed for it",
        )
    if kind == "refused":
        return QuotaExceeded(
            f"the sandbox cannot start another process: {text}",
            sandbox_id=sandbox_id,
            hint="close environments, or ask for more pids or memory",
        )
    if kind == "refused_step":
        return Conflict(text, sandbox_id=sandbox_id, details=details,
                        hint="steps are numbered from 0; does somebody else play this environment?")  # fmt: skip
    if kind == "gone":
        return NotFound(text, sandbox_id=sandbox_id, hint="make a new one")
    if kind == "transport":
        return EnvironmentRaised(text, sandbox_id=sandbox_id, details=details,
                                 hint="only plain values, arrays, tuples, sets and bytes can be sent")  # fmt: skip
    return EnvironmentRaised(f"the environment raised {name}: {text}", sandbox_id=sandbox_id, details=details)
