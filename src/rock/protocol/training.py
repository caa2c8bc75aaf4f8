"""How a task of a training set is answered, in the SDK and on AgentScope's routes alike."""

from __future__ import annotations

import os
from typing import Any

from rock.errors import CommandTimeout
from rock.protocol.env import EnvInfo, StepResult

IDLE = 300.0  # seconds after which an instance that nobody asks for anything is released
STEP_TIMEOUT = 60.0  # seconds for one step, after which the instance is ended
START_TIMEOUT = 1200.0  # seconds; the first sandbox of a set installs its packages
NAMED = "name:"  # before the name of an environment, where its number could stand


def new_instance_id() -> str:
    """A name for an instance whose caller gave it none."""
    return f"exp_{os.urandom(12).hex()}"


def created(made: EnvInfo, instance_id: str, task_id: str) -> dict[str, Any]:
    """What create_instance answers."""
    return {"state": made.observation, "info": {**made.info, "instance_id": instance_id, "task_id": task_id}}


def stepped(done: StepResult) -> dict[str, Any]:
    """What step answers. There is one flag for an end; info["truncated"] tells one that is not the task's own."""
    return {
        "state": done.observation,
        "reward": done.reward,
        "is_terminated": done.terminated or done.truncated,
        "info": done.info,
    }


def overdue(error: CommandTimeout) -> dict[str, Any]:
    """What a step answers that took too long: the end of the episode, with the reason."""
    info = {"truncated": True, "stop_reason": "step_timeout", "failure": "timeout", "error": error.message}
    return {"state": [], "reward": 0.0, "is_terminated": True, "info": info}
