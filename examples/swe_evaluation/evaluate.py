"""Evaluate agents on three small repositories, and print SWE-bench reports.

    rock admin start
    rock agent add mini-swe-agent
    python examples/swe_evaluation/evaluate.py [--image IMAGE] [--agent NAME] [--upstream NAME]

The oracle applies the solutions and resolves all instances; `nop` resolves none; the scripted agent edits files with
shell commands and resolves one. mini-swe-agent calls a scripted model (model.py) through the gateway and resolves two:
the model listens on a loopback port, so the server runs on this machine. --upstream names a real model instead.
--agent selects another recipe, or "none". Each patch is graded in a fresh sandbox. The image needs git and python3.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from model import KEY, Model
from projects import build

from rock.jobs import reports
from rock.jobs.plan import AgentPlan, Plan
from rock.jobs.tasks import local_tasks
from rock.protocol.jobs import JobTask
from rock.sdk.client import Client
from rock.sdk.job import Job

# An agent as a shell script: it repairs the project that it knows, and tries to change the tests of the others.
SCRIPT = """
cat "$ROCK_INSTRUCTION_FILE"
if [ -f slugs.py ]; then
    python3 - <<'END'
text = open("slugs.py").read()
text = text.replace("import re", "import re\\nimport unicodedata")
text = text.replace("text.lower()", 'unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()')
open("slugs.py", "w").write(text)
END
else
    for file in tests/test_*.py; do echo "import unittest" > "$file"; done
fi
"""
SCRIPTED = "scripted-model"  # the upstream of model.py


async def evaluate(agent: AgentPlan, tasks: list[JobTask], image: str, upstream: str | None) -> None:
    """Run one agent on all tasks, and print its report. upstream: of the gateway, for agents that call a model."""
    plan = Plan(name=f"swe-{agent.name}", kind="swe", agents=[agent], concurrency=3, dataset="examples",
                environment={"image": image, "memory": "2g" if upstream else "512m", "cpus": 1},
                model={"upstream": upstream} if upstream else None)  # fmt: skip
    result = await Job(plan, tasks=tasks).run()
    client = Client()
    detail, trials = await client.jobs.get(result.job_id), await client.jobs.trials(result.job_id)
    for trial in trials:
        if trial.error is not None:
            print(f"{agent.name}, {trial.task}: {trial.error.type}: {trial.error.message}")
    *_, (name, report) = reports.swe(detail, trials, agent.title)
    print(f"{agent.name}: {report['resolved_instances']} of {report['total_instances']} resolved ({name})")
    tokens = [trial.agent_result for trial in result.trial_results if trial.agent_result]
    if upstream:
        print(f"{agent.name}: {sum(used['n_input_tokens'] for used in tokens)} input tokens, "
              f"{sum(used['n_output_tokens'] for used in tokens)} output tokens")  # fmt: skip
    print(json.dumps(report, indent=2))


@contextlib.asynccontextmanager
async def scripted_upstream() -> AsyncIterator[Model]:
    """The scripted model as an upstream of the gateway."""
    client = Client()
    with Model() as model:
        await client.upstreams.put(SCRIPTED, model.url, key=KEY, dialect="openai-chat")
        try:
            yield model
        finally:
            await client.upstreams.delete(SCRIPTED)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--image", default="python:3.11")
    parser.add_argument("--agent", default="mini-swe-agent", help='an agent recipe; "none" for none')
    parser.add_argument("--upstream", help="upstream of the gateway for the recipe, instead of the scripted model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tasks = local_tasks(build(Path(folder)))
        for agent in (AgentPlan(name="oracle"), AgentPlan(name="nop"), AgentPlan(name="bash", command=SCRIPT)):
            await evaluate(agent, tasks, options.image, None)
        if options.agent == "none":
            return
        agent = AgentPlan(name=options.agent)
        if options.upstream:
            await evaluate(agent, tasks, options.image, options.upstream)
            return
        async with scripted_upstream() as model:
            await evaluate(agent, tasks, options.image, SCRIPTED)
            print(f"the scripted model answered {model.calls} calls")


if __name__ == "__main__":
    asyncio.run(main())
