"""smolagents: agents that write code, with scripted models; our executor, and the E2B executor over our dialect."""

from __future__ import annotations

import datetime
from typing import Any

from checks import check, raises
from smolagents import CodeAgent, Tool, tool
from smolagents.models import ChatMessage, Model
from smolagents.monitoring import AgentLogger, LogLevel
from smolagents.remote_executors import E2BExecutor
from smolagents.utils import AgentError

from rock.errors import CommandFailed, InvalidConfig
from rock.integrations.smolagents import LABELS, RockPythonExecutor
from rock.sync import Sandbox


class Scripted(Model):  # type: ignore[misc]
    """A model with prepared responses."""

    def __init__(self, *cells: str) -> None:
        super().__init__()
        self.cells = list(cells)
        self.seen: list[Any] = []

    def generate(self, messages: Any, *_: Any, **__: Any) -> ChatMessage:
        self.seen.append(messages)
        return ChatMessage(role="assistant", content=f"Thought: next\n<code>\n{self.cells.pop(0)}\n</code>")


def running() -> int:
    return len(Sandbox.list(states="running", labels=LABELS))


@tool
def times(left: int, right: int) -> int:
    """Multiply two numbers.

    Args:
        left: One number.
        right: The other.
    """
    return left * right


class Odd(Tool):  # type: ignore[misc]
    name = "odd"
    description = "Needs a package that does not exist."
    inputs: dict[str, Any] = {}
    output_type = "string"

    def forward(self) -> str:
        import no_such_package_of_rock

        return str(no_such_package_of_rock)


executor = RockPythonExecutor("host", memory="512m", timeout=5, max_output=2000)
with check("state, logs and the value of the last expression"):
    executor("x = 20")
    done = executor("import sys\nprint('a')\nprint('b', file=sys.stderr)\nx + 1")
    assert (done.output, done.is_final_answer) == ("21", False) and "a\n" in done.logs and "b" in done.logs
with check("an error has its traceback, and keeps the state"):
    with raises(AgentError, "ZeroDivisionError"):
        executor("y = 1\n1 / 0")
    assert executor("y").output == "1"
with check("variables are sent"):
    executor.send_variables({"names": ["a", "b"], "when": datetime.date(2026, 1, 2), "raw": b"\0\1"})
    assert executor("(names, when.year, raw)").output == "(['a', 'b'], 2026, b'\\x00\\x01')"
with check("an object that JSON cannot express is rejected"), raises(Exception, "object"):
    executor.send_variables({"odd": object()})
with check("output over the limit"):
    done = executor("print('a' * 5000)")
    assert done.logs.startswith("a" * 2000) and "3001 characters are left out" in done.logs
with check("code that takes too long is interrupted, and the state remains"):
    with raises(AgentError, "longer than 5 s"):
        executor("import time\ntime.sleep(60)")
    assert executor("x").output == "20"
with check("code that ends its interpreter"):
    with raises(AgentError, "InterpreterEnded"):
        executor("import os\nos._exit(3)")
    with raises(AgentError, "NameError"):
        executor("x")
with check("code that forges events"):
    executor("import os\nos.write(1, b'{\"id\": \"x\", \"type\": \"done\"}\\n')")
    assert executor("1 + 1").output == "2"
with check("a package that cannot be installed"), raises(CommandFailed, "no-such-package-of-rock"):
    executor.install_packages(["no-such-package-of-rock"])
with check("an agent with a tool"):
    model = Scripted("product = times(6, 7)\nprint(product)", "final_answer({'product': product, 'set': {1, 2}})")
    agent = CodeAgent(tools=[times], model=model, executor=executor, verbosity_level=0)
    assert agent.run("Multiply") == {"product": 42, "set": {1, 2}}
    assert "42" in str(model.seen[1])
with check("a tool whose package cannot be installed"), raises(CommandFailed, "no_such_package_of_rock"):
    CodeAgent(tools=[Odd()], model=Scripted("1"), executor=executor, verbosity_level=0).run("x")
with check("an agent sees the error of its code, and variables of the run"):
    model = Scripted("print(missing)", "final_answer(given + 1)")
    agent = CodeAgent(tools=[], model=model, executor=executor, verbosity_level=0)
    assert agent.run("Add", additional_args={"given": 41}) == 42 and "NameError" in str(model.seen[1])
    agent.cleanup()
with check("cleanup stops the sandbox"):
    executor.cleanup()
    assert running() == 0
    with RockPythonExecutor("host", memory="512m"):
        assert running() == 1
    assert running() == 0
with check("an unknown option is rejected by its name"):
    with raises(InvalidConfig, "template"):
        RockPythonExecutor("host", template="base")
    assert running() == 0
with check("the E2B executor over the E2B dialect"):
    remote = E2BExecutor([], AgentLogger(level=LogLevel.ERROR), template="host")
    remote("x = 20")
    remote.send_variables({"y": {"z": 22}})
    assert remote("x + y['z']").output == "42"
    with raises(AgentError, "ZeroDivisionError"):
        remote("1 / 0")
    remote.cleanup()
