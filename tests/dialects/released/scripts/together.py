"""One of four agents and evaluations that use one server at the same time; the first argument names it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from checks import check

os.environ["MSWEA_SILENT_STARTUP"] = "1"
os.environ["MSWEA_GLOBAL_CONFIG_DIR"] = tempfile.mkdtemp()
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
OPTIONS = {"memory": "512m"}


def minisweagent() -> None:
    from minisweagent.agents.default import DefaultAgent
    from minisweagent.environments import get_environment
    from minisweagent.models.test_models import DeterministicModel, make_output

    env = get_environment({"environment_class": "rock.integrations.minisweagent.RockEnvironment", "image": "host",
                           "cwd": "/tmp", **OPTIONS})  # fmt: skip
    steps = ["echo 'def f(x): return x' > f.py", "sed -i 's/return x/return 6 * x/' f.py",
             "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; python3 -c 'import f; print(f.f(7))'"]
    model = DeterministicModel(outputs=[make_output("next", [{"command": step}]) for step in steps])
    agent = DefaultAgent(model, env, system_template="s", instance_template="{{task}}", cost_limit=100.0)
    assert agent.run("Multiply")["submission"] == "42\n"
    env.cleanup()


def harbor() -> None:
    folder = Path(tempfile.mkdtemp())
    files = {"task.toml": "[environment]\nmemory_mb = 512\n", "instruction.md": "Write 42.",
             "environment/Dockerfile": "FROM host\nCOPY number /data/number\n", "environment/number": "42\n",
             "solution/solve.sh": "cp /data/number /tmp/answer\n",
             "tests/test.sh": "grep -q 42 /tmp/answer && echo 1 > /logs/verifier/reward.txt\n"}  # fmt: skip
    for name, text in files.items():
        (folder / "task" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "task" / name).write_text(text)
    subprocess.run([sys.executable, "-m", "harbor.cli.main", "run", "-p", folder / "task", "-a", "oracle", "-q", "-y",
                    "-e", "rock.integrations.harbor:RockEnvironment", "--ek", "build_network=none",
                    "-o", folder / "jobs"], check=True, timeout=300)  # fmt: skip
    (reward,) = folder.rglob("reward.txt")
    assert reward.read_text() == "1\n"


def inspect_ai() -> None:
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.model import ModelOutput, ModelUsage, get_model
    from inspect_ai.scorer import includes
    from inspect_ai.solver import generate, use_tools
    from inspect_ai.tool import bash
    from inspect_ai.util import SandboxEnvironmentSpec

    from rock.integrations.inspect_ai import RockSandboxConfig

    outputs = [ModelOutput.for_tool_call("mockllm/model", "bash", {"command": "echo $((6 * $(cat seven)))"}),
               ModelOutput.from_content("mockllm/model", "42")]  # fmt: skip
    for output in outputs:
        output.usage = ModelUsage()  # else Inspect downloads the tables of a tokenizer
    config = RockSandboxConfig(image="host", working_dir="/work", **OPTIONS)
    task = Task(dataset=[Sample(input="6 x 7", target="42", files={"seven": "7"})], scorer=includes(),
                solver=[use_tools(bash(timeout=30)), generate()], sandbox=SandboxEnvironmentSpec("rock", config))
    with tempfile.TemporaryDirectory() as logs:
        (log,) = eval(task, model=get_model("mockllm/model", custom_outputs=outputs), log_dir=logs, display="none")
        assert log.status == "success" and log.results.scores[0].metrics["accuracy"].value == 1.0, log.error
        assert any(message.role == "tool" and "42" in message.text for message in log.samples[0].messages)


def smolagents() -> None:
    from smolagents import CodeAgent
    from smolagents.models import ChatMessage, Model

    from rock.integrations.smolagents import RockPythonExecutor

    cells = ["x = 6\nprint(x)", "final_answer(x * 7)"]

    class Scripted(Model):  # type: ignore[misc]
        def generate(self, *_: Any, **__: Any) -> ChatMessage:
            return ChatMessage(role="assistant", content=f"Thought: next\n<code>\n{cells.pop(0)}\n</code>")

    with RockPythonExecutor("host", **OPTIONS) as executor:
        assert CodeAgent(tools=[], model=Scripted(), executor=executor, verbosity_level=0).run("Multiply") == 42


with check(f"{sys.argv[1]}, beside the three others on one server"):
    {"minisweagent": minisweagent, "harbor": harbor, "inspect": inspect_ai, "smolagents": smolagents}[sys.argv[1]]()
