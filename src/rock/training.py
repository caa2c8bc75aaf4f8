"""Training sets: graded tasks, with the interface of AgentScope's training sandbox.

    with TrainingSandbox(box_type="bfcl") as box:
        ids = box.get_env_profile(env_type="bfcl", split="train")
        made = box.create_instance(env_type="bfcl", task_id=ids[0])
        done = box.step(made["info"]["instance_id"], {"role": "assistant", "content": "..."})
        score = box.evaluate(made["info"]["instance_id"])

`HarborTasks` provides them for a folder of tasks in Harbor's format. `AsyncTrainingSandbox` and `AsyncHarborTasks` are
the asyncio versions.
"""

from __future__ import annotations

from rock.sdk.harbor import HarborTasks as AsyncHarborTasks
from rock.sdk.training import TrainingSandbox as AsyncTrainingSandbox
from rock.sync.harbor import HarborTask, HarborTasks
from rock.sync.training import Message, TrainingSandbox, failure_of

__all__ = [
    "AsyncHarborTasks",
    "AsyncTrainingSandbox",
    "HarborTask",
    "HarborTasks",
    "Message",
    "TrainingSandbox",
    "failure_of",
]
