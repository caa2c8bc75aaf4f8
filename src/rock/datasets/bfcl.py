"""BFCL's 800 multi-turn tasks (package bfcl-eval): function calls in several turns, judged by their effects.

An agent calls functions in text, as Qwen's models do, or in `tool_calls` of its message:

    <tool_call>
    {"name": "cd", "arguments": {"folder": "document"}}
    </tool_call>

A message without a call ends the turn. The package evaluates calls as text of Python, so that text is written here: the
name of a function that there is, and literals. Nothing that a model writes is evaluated.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import keyword
import math
import os
import re
from itertools import count
from typing import Any, ClassVar

from rock.guest.environments.tasks import BadAction, BadParams, Message, Outcome, Task, UnknownTask, says, text_of

CATEGORIES = ("base", "miss_func", "miss_param", "long_context")
_ID = re.compile(r"multi_turn_(\w+)_\d+")
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.S)
_MODEL = "agent"
_DONE = "[CONVERSATION_COMPLETED]"
_MOST_CALLS = 64  # in one message
_MOST_STEPS = 20  # in one turn; the benchmark ends the run after as many
_DEPTH = 50
_SYSTEM = """You help a user by calling functions. These are the functions, one JSON object a line:
<tools>
{tools}
</tools>
To call one, write its name and arguments as JSON between tags:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>
You may write several calls. Their results come in the next message. When a request is done, or when it cannot be done
with these functions and what you know, answer without a call."""


class Bfcl(Task):
    """One multi-turn task. params: nothing at create; evaluate takes sparse=True for the bare number."""

    SPLITS = ("train", "test", "multi_turn", *(f"multi_turn_{name}" for name in CATEGORIES))
    entries: ClassVar[dict[str, dict[str, Any]]] = {}
    answers: ClassVar[dict[str, list[list[str]]]] = {}
    docs: ClassVar[dict[str, list[dict[str, Any]]]] = {}
    prompts: ClassVar[Any] = None
    execute: ClassVar[Any] = None
    check: ClassVar[Any] = None

    @classmethod
    def prepare(cls) -> None:
        import bfcl_eval
        from bfcl_eval.constants import default_prompts
        from bfcl_eval.constants import executable_backend_config as backend
        from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_checker, multi_turn_utils

        cls.prompts = default_prompts
        cls.execute = staticmethod(multi_turn_utils.execute_multi_turn_func_call)
        cls.check = staticmethod(multi_turn_checker.multi_turn_checker)
        data = os.path.join(os.path.dirname(bfcl_eval.__file__), "data")
        for name in CATEGORIES:
            file = f"BFCL_v4_multi_turn_{name}.json"
            for entry in _lines(os.path.join(data, file)):
                cls.entries[entry["id"]] = entry
            for found in _lines(os.path.join(data, "possible_answer", file)):
                cls.answers[found["id"]] = found["ground_truth"]
        classes = {name for entry in cls.entries.values() for name in entry["involved_classes"]}
        for name in sorted(classes):
            importlib.import_module(backend.CLASS_FILE_PATH_MAPPING[name])
            cls.docs[name] = list(
                _lines(os.path.join(data, "multi_turn_func_doc", backend.MULTI_TURN_FUNC_DOC_FILE_MAPPING[name]))
            )

    @classmethod
    def tasks(cls, split: str, params: dict[str, Any]) -> list[str]:
        if not split.startswith("multi_turn_"):
            return list(cls.entries)
        return [id for id in cls.entries if _category(id) == split.removeprefix("multi_turn_")]

    def __init__(self, task_id: str, params: dict[str, Any]) -> None:
        super().__init__(task_id, params)
        if task_id not in self.entries:
            raise UnknownTask(f"BFCL has no multi-turn task {task_id!r}; they are like multi_turn_base_0")
        self.entry = self.entries[task_id]
        self.turns: list[list[list[str]]] = [[]]  # calls that were made, by turn and step
        self.steps = 0  # in this turn
        self.completed = False
        self.forced = False
        self._evaluations = count()
        self._seen: tuple[int, dict[str, Any]] | None = None
        held = {name for names in self.entry.get("missed_function", {}).values() for name in names}
        hidden = {*held, *self.entry.get("excluded_function", ())}
        every = [doc for name in self.entry["involved_classes"] for doc in self.docs[name]]
        self._every = {doc["name"]: doc for doc in every}
        self.offered = {doc["name"]: doc for doc in every if doc["name"] not in hidden}

    # ---- what is asked

    def start(self) -> list[Message]:
        return [says(_SYSTEM.format(tools=self._described(self.offered)), "system"), *self._turn(0)]

    def step(self, action: dict[str, Any], params: dict[str, Any]) -> Outcome:
        self.steps += 1
        text = text_of(action)
        if self.steps > _MOST_STEPS:
            self.forced = True
            return self._finished("step_limit")
        if _DONE in text:
            return self._finished("completed" if len(self.turns) == len(self.entry["question"]) else "given_up")
        wanted = _wanted(action, text)
        if not wanted:
            return self._end_turn()
        calls = [self._text_of(*call) for call in wanted]
        results, _ = self.execute(
            calls, self.entry["initial_config"], self.entry["involved_classes"], _MODEL, self.task_id, self._long
        )
        self.turns[-1].append(calls)
        shown = [
            f"<tool_response>\n{json.dumps({'name': name, 'content': result})}\n</tool_response>"
            for (name, _), result in zip(wanted, results, strict=True)
        ]
        return Outcome([says("\n".join(shown))], info={"turn": len(self.turns) - 1})

    def evaluate(self, messages: list[Message] | None, params: dict[str, Any]) -> Any:
        if messages:
            raise BadParams("BFCL judges the calls that were made, not messages")
        done = sum(map(len, self.turns)), len(self.turns)
        key = hash((done, self.completed, self.forced))
        if self._seen is None or self._seen[0] != key:
            self._seen = key, self._verdict()
        found = self._seen[1]
        score = float(bool(found.get("valid")))
        if params.get("sparse"):
            return score
        return {
            "valid": bool(score), "accuracy": score, "total_count": 1, "correct_count": int(score),
            "test_category": f"multi_turn_{_category(self.task_id)}", "test_id": self.task_id,
            "model_name": self.params.get("model_name", _MODEL), "input_tokens": None, "output_tokens": None,
            "turn_count": len(self.turns), "completed": self.completed,
            **({} if score else {"error": _brief(found)}),
        }  # fmt: skip

    def tools(self, messages: list[Message] | None, params: dict[str, Any]) -> str:
        return self._described(self.offered)

    def solution(self) -> list[Message]:
        """The answers that come with the tasks: the calls of each turn in one message, and one that ends the turn."""
        found: list[Message] = []
        for calls in self.answers[self.task_id]:
            if calls:
                blocks = [f"<tool_call>\n{json.dumps(self._parsed(call))}\n</tool_call>" for call in calls]
                found.append({"role": "assistant", "content": "\n".join(blocks)})
            found.append({"role": "assistant", "content": "Done."})
        return found

    # ---- turns

    @property
    def _long(self) -> bool:
        return "long_context" in self.task_id

    def _turn(self, number: int) -> list[Message]:
        """What the user says in this turn, or the functions that are offered from it on."""
        new = self.entry.get("missed_function", {}).get(str(number), [])
        said = [says(message["content"], message["role"]) for message in self.entry["question"][number]]
        if not new:
            return said
        found = {name: self._every[name] for name in new}
        self.offered.update(found)
        prompt = self.prompts.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_PROMPTING
        return [*said, says(prompt.format(functions=self._described(found)))]

    def _end_turn(self) -> Outcome:
        if len(self.turns) == len(self.entry["question"]):
            return self._finished("completed")
        self.turns.append([])
        self.steps = 0
        return Outcome(self._turn(len(self.turns) - 1), info={"turn": len(self.turns) - 1})

    def _finished(self, why: str) -> Outcome:
        self.completed = why == "completed"
        reward = self.evaluate(None, {"sparse": True})
        return Outcome([], reward, terminated=True, info={"stop_reason": why, "turn": len(self.turns) - 1})

    def _verdict(self) -> dict[str, Any]:
        answers = self.answers[self.task_id]
        if self.forced or len(self.turns) != len(answers):
            return {"valid": False, "error_type": "multi_turn:force_terminated",
                    "error_message": f"{len(self.turns)} of {len(answers)} turns were played"}  # fmt: skip
        # The package keeps what calls did in globals by the model's name, so that each judgement needs a new one
        name = f"{_MODEL}_{next(self._evaluations)}"
        category = f"multi_turn_{_category(self.task_id)}"
        found: dict[str, Any] = self.check(self.turns, answers, self.entry, category, name)
        return found

    # ---- calls

    @staticmethod
    def _described(docs: dict[str, dict[str, Any]]) -> str:
        return "\n".join(json.dumps(doc) for doc in docs.values())

    def _text_of(self, name: str, arguments: dict[str, Any]) -> str:
        """The call as Python's text; BadAction for a function that there is not, and for what is no argument.

        One that is not offered yet is called all the same, as in the benchmark: the answer of miss_func_49 does so.
        """
        if name not in self._every:
            raise BadAction(f"there is no function {name!r}; there are: {', '.join(self.offered)}")
        for key, value in arguments.items():
            if not key.isidentifier() or keyword.iskeyword(key) or not key.isascii():
                raise BadAction(f"{key!r} is no name of an argument")
            _check(value)
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"

    def _parsed(self, call: str) -> dict[str, Any]:
        """A call of an answer as name and arguments. The answers are the package's own."""
        tree = ast.parse(call, mode="eval").body
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
            raise BadParams(f"an answer of {self.task_id} is no plain call: {call}")
        name = tree.func.id
        arguments = {}
        if tree.args:
            parameters = [p for p in inspect.signature(self._method(name)).parameters if p != "self"]
            arguments = dict(zip(parameters, map(ast.literal_eval, tree.args), strict=False))
        for given in tree.keywords:
            arguments[str(given.arg)] = ast.literal_eval(given.value)
        return {"name": name, "arguments": arguments}

    def _method(self, name: str) -> Any:
        from bfcl_eval.constants.executable_backend_config import CLASS_FILE_PATH_MAPPING

        for owner in self.entry["involved_classes"]:
            kind = getattr(importlib.import_module(CLASS_FILE_PATH_MAPPING[owner]), owner)
            if hasattr(kind, name):
                return getattr(kind, name)
        raise BadParams(f"no function {name} in {self.task_id}")


def _lines(path: str) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def _category(task_id: str) -> str:
    found = _ID.fullmatch(task_id)
    return found[1] if found else ""


def _wanted(action: dict[str, Any], text: str) -> list[tuple[str, dict[str, Any]]]:
    """The calls of a message, as name and arguments; BadAction for what is meant as one and is none."""
    given = action.get("tool_calls") or []
    if not isinstance(given, list):
        raise BadAction("tool_calls has to be a list")
    found = [_call(item.get("function", item) if isinstance(item, dict) else item) for item in given]
    for block in _CALL.findall(text):
        try:
            found.append(_call(json.loads(block)))
        except (ValueError, RecursionError) as error:
            raise BadAction(f"what is between <tool_call> and </tool_call> is no JSON: {error}") from None
    if len(found) > _MOST_CALLS:
        raise BadAction(f"{len(found)} calls in one message; {_MOST_CALLS} are taken")
    return found


def _call(item: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        raise BadAction('a call is an object with "name" and "arguments"')
    arguments = item.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise BadAction(f"the arguments of {item['name']} are no JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise BadAction(f"the arguments of {item['name']} are no object")
    return item["name"], arguments


def _check(value: Any, depth: int = 0) -> None:
    """BadAction for what has no literal: NaN and infinities, and what is nested too deep."""
    if depth > _DEPTH:
        raise BadAction(f"an argument is nested deeper than {_DEPTH}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadAction(f"{value} is no argument")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check(item, depth + 1)


def _brief(found: dict[str, Any]) -> dict[str, Any]:
    """Why it is not valid, as text that can travel."""
    return {"type": str(found.get("error_type", "")), "message": str(found.get("error_message", ""))[:2000]}
