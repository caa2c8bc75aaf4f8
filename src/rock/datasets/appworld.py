"""AppWorld: code that calls the apps of a person's day, judged by what it changed in them.

The package (appworld) has the apps; its tasks are a download of their own, `appworld download data`, whose folder the
user supplies. An agent writes Python in a ```python block, which runs in the instance's process, where AppWorld's own
guard stands between it and the rest of that process; the sandbox is what holds.
`apis.supervisor.complete_task(answer=..)` ends the episode.
"""

from __future__ import annotations

import os
import re
from typing import Any, ClassVar

from rock.guest.environments.tasks import (
    DATA,
    BadAction,
    BadParams,
    Message,
    MissingData,
    Outcome,
    Task,
    UnknownTask,
    says,
    text_of,
)

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.S)
_CACHE = "/tmp/rock-appworld"
_HINT = (
    "AppWorld's tasks are not in its package. Where there is a network, run `appworld download data --root FOLDER`, "
    "and pass that folder: TrainingSandbox(box_type='appworld', data=FOLDER)"
)
_SYSTEM = """You work for {name} ({email}, {phone}), in Python that keeps its variables from one message to the next.
Every answer is one ```python block; its output comes in the next message. `apis` has the apps:
    apis.api_docs.show_app_descriptions()
    apis.api_docs.show_api_descriptions(app_name=..)
    apis.api_docs.show_api_doc(app_name=.., api_name=..)
When it is done, call apis.supervisor.complete_task(), with answer=.. where the task asks for one."""


class AppWorld(Task):
    """One task. params at create: prompt=False leaves the system prompt out; simple=True runs a whole message as code.

    evaluate takes sparse=True: 1.0 when all tests pass, else 0.0.
    """

    SPLITS = ("train", "dev", "test_normal", "test_challenge")
    package: ClassVar[Any] = None

    @classmethod
    def prepare(cls) -> None:
        if not os.path.isdir(os.path.join(DATA, "data", "tasks")):
            raise MissingData(_HINT)
        os.environ.update(APPWORLD_ROOT=DATA, APPWORLD_CACHE=_CACHE)
        import appworld
        import appworld.install

        # The package has its apps packed, so that they are found in no training text: they are unpacked in here only
        if not os.path.isdir(os.path.join(os.path.dirname(appworld.__file__), "apps", "admin")):
            appworld.install.install_package()
        cls.package = appworld

    @classmethod
    def tasks(cls, split: str, params: dict[str, Any]) -> list[str]:
        if not os.path.isfile(os.path.join(DATA, "data", "datasets", f"{split}.txt")):
            raise MissingData(f"the data folder has no split {split}. {_HINT}")
        return [str(id) for id in cls.package.load_task_ids(split)]

    def __init__(self, task_id: str, params: dict[str, Any]) -> None:
        super().__init__(task_id, params)
        if not re.fullmatch(r"\w{1,40}", task_id) or not os.path.isdir(os.path.join(DATA, "data", "tasks", task_id)):
            raise UnknownTask(f"AppWorld has no task {task_id!r}")
        self.world = self.package.AppWorld(task_id, experiment_name=f"instance-{os.getpid()}")

    def start(self) -> list[Message]:
        task = self.world.task
        person = task.supervisor
        prompt = _SYSTEM.format(
            name=f"{person.first_name} {person.last_name}", email=person.email, phone=person.phone_number
        )
        before = [says(prompt, "system")] if self.params.get("prompt", True) else []
        return [*before, says(str(task.instruction))]

    def step(self, action: dict[str, Any], params: dict[str, Any]) -> Outcome:
        output = self.world.execute(self._code(action))
        state = [says(f"Output:\n```\n{output}\n```")]
        if not self.world.task_completed():
            return Outcome(state)
        return Outcome(state, self._share(params), terminated=True, info={"stop_reason": "completed"})

    def evaluate(self, messages: list[Message] | None, params: dict[str, Any]) -> float:
        if messages:
            raise BadParams("AppWorld judges what was changed, not messages")
        return self._share(params)

    def tools(self, messages: list[Message] | None, params: dict[str, Any]) -> Any:
        return dict(self.world.task.app_descriptions)

    def _code(self, action: dict[str, Any]) -> str:
        calls = action.get("tool_calls")
        for call in calls if isinstance(calls, list) else []:
            given = call.get("function", call) if isinstance(call, dict) else {}
            given = given if isinstance(given, dict) else {}
            arguments = given.get("arguments")
            code = arguments.get("code") if isinstance(arguments, dict) else None
            if given.get("name") == "appworld" and isinstance(code, str):
                return code
        text = text_of(action)
        blocks = _BLOCK.findall(text)
        if not blocks and not self.params.get("simple"):
            raise BadAction("no code: answer with a ```python block")
        return str(blocks[0] if blocks else text)

    def _share(self, params: dict[str, Any]) -> float:
        """The share of its tests that pass; with sparse, whether all do."""
        tests = self.world.evaluate()
        if params.get("sparse"):
            return float(bool(tests.success))
        return float(tests.pass_count) / max(1, int(tests.pass_count) + int(tests.fail_count))

    def close(self) -> None:
        self.world.close()
