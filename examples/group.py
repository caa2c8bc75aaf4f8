"""Four sandboxes handled as one. Start the server first: rock admin start"""

import asyncio

from rock.actions import Action
from rock.sdk.sandbox.client import SandboxGroup
from rock.sdk.sandbox.config import SandboxGroupConfig


async def run_group():
    config = SandboxGroupConfig(
        image="python:3.11",
        size=4,  # how many
        start_concurrency=2,  # how many start at once
    )
    sandbox_group = SandboxGroup(config)
    await sandbox_group.start()
    for sandbox in sandbox_group.sandbox_list:
        seen = await sandbox.run_in_session(Action(session="default", command="echo Hello"))
        print(sandbox.sandbox_id, seen.output, end="")
    await sandbox_group.stop()


if __name__ == "__main__":
    asyncio.run(run_group())
