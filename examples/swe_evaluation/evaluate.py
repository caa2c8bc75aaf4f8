"""Evaluate agents on three small repositories, and print SWE-bench reports.

    rock admin start
    python examples/swe_evaluation/evaluate.py [--image IMAGE] [--agent NAME --upstream NAME]

The oracle applies the solutions and resolves all instances; `nop` resolves none; the scripted agent edits files with
shell commands and resolves one. Any agent recipe runs in the same way: --agent mini-swe-agent --upstream NAME. Each
patch is graded in a fresh sandbox. The image needs git and python3.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from pathlib import Path

from projects import build

from rock.jobs import reports
from rock.jobs.plan import AgentPlan, Plan
from rock.jobs.tasks import local_tasks
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


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--image", default="python:3.11")
    parser.add_argument("--agent", help="an agent recipe, besides oracle, nop and the scripted agent")
    parser.add_argument("--upstream", help="upstream of the model gateway for that agent")
    options = parser.parse_args()
    agents = [AgentPlan(name="oracle"), AgentPlan(name="nop"), AgentPlan(name="bash", command=SCRIPT)]
    with tempfile.TemporaryDirectory() as folder:
        tasks = local_tasks(build(Path(folder)))
        if options.agent:
            agents.append(AgentPlan(name=options.agent))
        for agent in agents:
            model = {"upstream": options.upstream} if options.upstream and agent.name == options.agent else None
            plan = Plan(name=f"swe-{agent.name}", kind="swe", agents=[agent], concurrency=3, dataset="examples",
                        environment={"image": options.image, "memory": "512m", "cpus": 1}, model=model)  # fmt: skip
            result = await Job(plan, tasks=tasks).run()
            client = Client()
            detail, trials = await client.jobs.get(result.job_id), await client.jobs.trials(result.job_id)
            *_, (name, report) = reports.swe(detail, trials, agent.title)
            print(f"{agent.name}: {report['resolved_instances']} of {report['total_instances']} resolved ({name})")
            print(json.dumps(report, indent=2))


if __name__ == "__main__":
    asyncio.run(main())
