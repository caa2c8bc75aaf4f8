"""The provider "rock" of Inspect: the self checks of its wheel, an evaluation with a scripted model, and errors."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from checks import check, raises
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import Score, Scorer, Target, accuracy, scorer
from inspect_ai.solver import TaskState, generate, use_tools
from inspect_ai.tool import bash
from inspect_ai.util import OutputLimitExceededError, SandboxEnvironmentSpec, SandboxUnavailableError, sandbox
from inspect_ai.util._sandbox import self_check
from inspect_ai.util._sandbox.limits import override_max_exec_output_size
from inspect_ai.util._sandbox.registry import registry_find_sandboxenv

PROVIDER: Any = registry_find_sandboxenv("rock")  # by the entry point: the module is not imported yet

from rock.errors import InvalidConfig, NotFound, Unsupported  # noqa: E402
from rock.integrations.inspect_ai import LABELS, RockSandboxConfig  # noqa: E402
from rock.sync import Sandbox  # noqa: E402

ADD = "sh add.sh $(cat numbers.txt) > answer.txt"
PREPARE = """chmod 1777 /tmp; mkdir -p /etc/skel /etc/pam.d
printf 'auth sufficient pam_rootok.so\\naccount required pam_permit.so\\n' > /etc/pam.d/chfn"""
CONFIG = RockSandboxConfig(image="host", memory="512m", user="daemon", working_dir="/work/sample")
AS_ROOT = RockSandboxConfig(image="host", memory="512m", working_dir="/work/sample")


def running() -> list[str]:
    return [info.sandbox_id for info in Sandbox.list(states="running", labels=LABELS)]


async def until_sleeping(box: Any, wanted: bool) -> None:
    """Wait until `sleep 4321` runs in the sandbox, or does not."""
    programs = ["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"]
    async with asyncio.timeout(30):
        while ("sleep 4321" in (await box.exec(programs)).stdout) is not wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def self_checks() -> None:
    made = await PROVIDER.sample_init("self_check", CONFIG, {})
    # Users and programs expect these files and modes of Debian, which the image "host" may not have.
    await made["default"].exec(["sh", "-c", PREPARE], user="root")
    try:
        for name, function in inspect.getmembers(self_check, inspect.iscoroutinefunction):
            if name.startswith("test_"):
                with check(f"inspect_ai self check: {name}"):
                    await function(made["default"])
    finally:
        await PROVIDER.sample_cleanup("self_check", CONFIG, made, False)


async def contract() -> None:
    """What the self checks leave out."""
    made = await PROVIDER.sample_init("contract", RockSandboxConfig(image="host", memory="512m"), {})
    box = made["default"]
    with check("a missing program is a failed result"):
        done = await box.exec(["no-such-program"])
        assert (done.success, done.returncode) == (False, 127) and "no-such-program" in done.stderr
    with check("output over the limit"):
        with override_max_exec_output_size(1000), raises(OutputLimitExceededError, "1000"):
            await box.exec(["sh", "-c", "head -c 3000 /dev/zero | tr '\\0' a"])
    with check("a parent that is a file"), raises(NotADirectoryError):
        await box.write_file("/etc/hostname/x", "text")
    with check("a path with a NUL"), raises(InvalidConfig):
        await box.read_file("/tmp/a\0b")
    with check("text that is not UTF-8"), raises(UnicodeDecodeError):
        await box.write_file("/tmp/binary", b"\xff")
        await box.read_file("/tmp/binary")
    with check("connection"):
        assert (await box.connection()).command == f"rock shell {box.sandbox.sandbox_id}"
        with raises(Unsupported, "user"):
            await box.connection(user="root")
    with check("a canceled command ends"):
        task = asyncio.create_task(box.exec(["sleep", "4321"]))
        await until_sleeping(box, True)
        task.cancel()
        await asyncio.wait([task])
        await until_sleeping(box, False)
    with check("cli_cleanup stops one by its id"):
        with raises(NotFound, "no-such-id"):
            await PROVIDER.cli_cleanup("no-such-id")
        await PROVIDER.cli_cleanup(box.sandbox.sandbox_id)
        assert running() == []
    with check("a stopped sandbox is unavailable"):
        for call in (box.exec(["true"]), box.read_file("/etc/hostname"), box.write_file("/tmp/x", "x")):
            with raises(SandboxUnavailableError):
                await call
        with raises(ConnectionError):
            await box.connection()
    await PROVIDER.sample_cleanup("contract", None, made, False)


@scorer(metrics=[accuracy()])
def answer_in_sandbox() -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        done = await sandbox().exec_remote(["sh", "-c", "echo $((6 * 7))"], stream=False)  # with injected tools
        assert done.success and done.stdout == "42\n", done
        return Score(value=(await sandbox().read_file("answer.txt")).strip() == target.text)

    return score


def evaluate(config: Any, **options: Any) -> Any:
    """An evaluation of 3 samples, whose model calls the tool bash once."""
    outputs = [output for _ in range(3) for output in (
        ModelOutput.for_tool_call("mockllm/model", "bash", {"command": ADD}),
        ModelOutput.from_content("mockllm/model", "done"))]  # fmt: skip
    for output in outputs:
        output.usage = ModelUsage()  # else Inspect downloads the tables of a tokenizer
    model = get_model("mockllm/model", custom_outputs=outputs)
    samples = [Sample(input="add", target=str(10 + n), files={"numbers.txt": f"10 {n}"},
                      setup="#!/bin/sh\necho 'echo $(($1 + $2))' > add.sh\n") for n in range(3)]  # fmt: skip
    task = Task(dataset=samples, solver=[use_tools(bash(timeout=30)), generate()], scorer=answer_in_sandbox(),
                sandbox=SandboxEnvironmentSpec("rock", config))  # fmt: skip
    with tempfile.TemporaryDirectory() as logs:
        return eval(task, model=model, log_dir=logs, display="none", max_samples=1, **options)[0]


asyncio.run(self_checks())
asyncio.run(contract())
with check("an evaluation with files, setup, a tool, a scorer and exec_remote"):
    log = evaluate(AS_ROOT)
    assert log.status == "success" and log.results.scores[0].metrics["accuracy"].value == 1.0, log.error or log.results
    assert running() == []
with check("a configuration in a file"), tempfile.TemporaryDirectory() as folder:
    for name, text in (("rock.yaml", "image: host\nmemory: 512m\nworking_dir: /work\n"),
                       ("rock.toml", 'image = "host"\nmemory = "512m"\nworking_dir = "/work"\n')):  # fmt: skip
        path = Path(folder, name)
        path.write_text(text)
        log = evaluate(str(path))
        assert log.status == "success" and log.results.scores[0].metrics["accuracy"].value == 1.0, log.error
with check("an unknown field is rejected by its name"), tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "compose.yaml")
    path.write_text("services: {default: {image: x}}\n")
    with raises(InvalidConfig, "services"):
        evaluate(str(path))
    with raises(InvalidConfig, "gpu"):
        PROVIDER.config_deserialize({"gpu": 1})
with check("--no-sandbox-cleanup, and inspect sandbox cleanup rock"):
    log = evaluate(AS_ROOT, sandbox_cleanup=False)
    assert log.status == "success" and len(running()) == 3, (log.error, running())
    subprocess.run(["inspect", "sandbox", "cleanup", "rock"], check=True)
    assert running() == []
