"""A training loop: rollouts of an agent in groups of 8, in which this process is the model of the agents.

Each rollout has a sandbox without network and a run in pull mode. The agent calls a model at a loopback port of its
sandbox; the gateway gives the call to this process, and the policy answers it with token ids and log probabilities.
The run ends with a reward, and its token chains go to the trainer, without tokenizing anything again.

    rock admin start
    python examples/train_loop/train_loop.py [STEPS]
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from policy import Policy, Trainer

from rock import Sandbox, SandboxGroup

AGENT = (Path(__file__).parent / "agent.py").read_text()
GROUP = 8
SECRETS = [3, 7]  # one task each
TURNS = 3


async def answer_calls(run: Any, policy: Policy) -> None:
    """Be the model of a run until it ends."""
    after = 0
    while True:
        found = await run.next(after, wait=30)
        if found.call is not None:
            after = found.call.number
            await run.answer(after, **policy.sample(found.call.request["messages"]))
        elif found.state == "ended":
            return


async def rollout(sandbox: Sandbox, secret: int, policy: Policy) -> dict[str, Any]:
    """One episode: the token chains of the run, with its reward."""
    run = await sandbox.start_run(pull=True, tags={"task": f"guess-{secret}"})
    model = asyncio.create_task(answer_calls(run, policy))
    try:
        done = await sandbox.exec(["python3", "-c", AGENT, str(secret), str(TURNS)], env=run.environ, timeout=120)
        if done.exit_code == 0:
            guess = (await sandbox.exec(["cat", "/tmp/guess"], check=True)).stdout
            await run.end(reward=1.0 if guess == str(secret) else 0.0)
        else:
            await run.end(valid=False, reason=done.stderr[-500:])  # no reward, rather than a reward of 0
        await model
    finally:
        model.cancel()
    return await run.trajectory("chains")


async def main(steps: int) -> None:
    policy = Policy()
    trainer = Trainer(policy)
    async with SandboxGroup("python:3.11", size=GROUP * len(SECRETS), memory="256m", network="none") as group:
        tasks = [secret for secret in SECRETS for _ in range(GROUP)]
        for step in range(1, steps + 1):
            rollouts = await asyncio.gather(
                *(rollout(sandbox, secret, policy) for sandbox, secret in zip(group.sandbox_list, tasks, strict=True))
            )
            groups = [rollouts[start : start + GROUP] for start in range(0, len(rollouts), GROUP)]
            figures = trainer.step(groups)
            print(f"step {step}:", ", ".join(f"{name} {value:g}" for name, value in figures.items()))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 3))
