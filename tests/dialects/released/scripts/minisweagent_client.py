"""mini-SWE-agent: the class by its path, an agent with a scripted model, and the SWE-bench command."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from checks import check, raises

os.environ["MSWEA_SILENT_STARTUP"] = "1"
os.environ["MSWEA_GLOBAL_CONFIG_DIR"] = tempfile.mkdtemp()

from minisweagent.agents.default import DefaultAgent
from minisweagent.environments import get_environment
from minisweagent.environments.local import LocalEnvironment
from minisweagent.exceptions import Submitted
from minisweagent.models.test_models import DeterministicModel, make_output

from rock.errors import Conflict, InvalidConfig, RockError, SandboxError
from rock.integrations.minisweagent import LABELS, RockEnvironment, main, register
from rock.sync import Sandbox

CLASS = "rock.integrations.minisweagent.RockEnvironment"
FIELDS = {"image": "host", "memory": "512m", "cwd": "/tmp", "env": {"WORD": "hello"}}
FINISH = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; cat /tmp/answer"


def running() -> int:
    return len(Sandbox.list(states="running", labels=LABELS))


env: Any = get_environment({"environment_class": CLASS, **FIELDS})
local = LocalEnvironment(cwd="/tmp", env=FIELDS["env"])
with check("the class is resolved by its path"):
    assert isinstance(env, RockEnvironment) and running() == 1
for command in ("echo $WORD; pwd", "echo out; echo err >&2; echo out", "exit 3", "no-such-program-x",
                "printf 'a\\377b'", "cd /; pwd", "echo ä; cat", "head -c 100000 /dev/zero | tr '\\0' a"):  # fmt: skip
    with check(f"the result is that of the local environment: {command}"):
        wanted, found = local.execute({"command": command}), env.execute({"command": command})
        if command.startswith("no-such"):
            assert found["returncode"] == wanted["returncode"] == 127 and "no-such-program-x" in found["output"]
        else:
            assert found == wanted, (found, wanted)
with check("a command that takes too long is killed, and its output kept"):
    done = env.execute({"command": "echo begun; sleep 4321"}, timeout=1)
    assert done["returncode"] == -1 and "begun" in done["output"] and "longer than 1 s" in done["exception_info"]
    assert done["extra"]["exception_type"] == "CommandTimeout"
    programs = env.execute({"command": "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"})
    assert "sleep 4321" not in programs["output"]
with check("a directory that does not exist is a failed command"):
    done = env.execute({"command": "pwd"}, cwd="/no/such/folder")
    assert done["returncode"] == -1 and "/no/such/folder" in done["exception_info"]
with check("the marker submits"):
    env.execute({"command": "echo 42 > answer"})
    try:
        env.execute({"command": FINISH})
        raise AssertionError("Submitted was not raised")
    except Submitted as submitted:
        assert submitted.messages[0]["extra"] == {"exit_status": "Submitted", "submission": "42\n"}
    assert env.execute({"command": FINISH + "; exit 1"})["returncode"] == 1
with check("the variables of templates, and a trajectory without the key"):
    assert env.get_template_vars(more=1)["more"] == 1 and env.get_template_vars()["cwd"] == "/tmp"
    keyed = RockEnvironment(api_key=os.environ["ROCK_API_KEY"], **FIELDS)
    assert os.environ["ROCK_API_KEY"] not in json.dumps([keyed.serialize(), keyed.get_template_vars()])
    assert keyed.serialize()["info"]["config"]["environment_type"] == CLASS
    keyed.cleanup()
with check("an unknown option is rejected by its name, before a start"):
    before = running()
    with raises(InvalidConfig, "run_args"):
        RockEnvironment(run_args=["--rm"], **FIELDS)
    assert running() == before
with check("an agent with a scripted model"):
    steps = ["ls -a > /dev/null", "echo $((6 * 7)) > answer", FINISH]
    model = DeterministicModel(outputs=[make_output("next", [{"command": one}]) for one in steps])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trajectory.json")
        agent = DefaultAgent(model, env, system_template="{{system}}", instance_template="{{task}} in {{cwd}}",
                             cost_limit=100.0, output_path=path)  # fmt: skip
        result = agent.run("Multiply")
        assert result["exit_status"] == "Submitted" and result["submission"].strip() == "42", result
        assert json.loads(path.read_text())["info"]["config"]["environment"]["image"] == "host"
with check("a sandbox that ended raises"):
    env.sandbox.stop()
    with raises(SandboxError):
        env.execute({"command": "true"})
    with raises(RockError):
        env.execute({"command": "pwd"}, cwd="/no/such/folder")
    env.cleanup()
    env.cleanup()
    with raises(Conflict, "cleaned up"):
        env.execute({"command": "true"})
with check("the end of the object stops the sandbox"):
    other = RockEnvironment(**FIELDS)
    assert running() == 1
    del other
    assert running() == 0
with check("SWE-bench: the image of the instance, with the short name docker"):
    from minisweagent.run.benchmarks.swebench import get_sb_environment

    register()
    config = {"environment": {"cwd": "/tmp", "memory": "512m"},
              "run": {"env_startup_command": "echo {{instance_id}} > id"}}  # fmt: skip
    made = get_sb_environment(config, {"instance_id": "a__b-1", "image_name": "host"})
    assert isinstance(made, RockEnvironment) and made.execute({"command": "cat id"})["output"] == "a__b-1\n"
    made.cleanup()
with check("the command of SWE-bench starts, and another command is rejected"):
    with raises(SystemExit, "swebench"):
        main(["mini"])
    try:
        main(["swebench", "--help"])
    except SystemExit as ended:
        assert ended.code == 0
assert running() == 0
