"""A sandbox that is stopped after twenty minutes without use. Start the server first: rock admin start"""

import asyncio

from rock.sdk.sandbox import Sandbox, SandboxConfig


async def main():
    config = SandboxConfig(
        image="python:3.11",
        auto_clear_seconds=60 * 20,
        experiment_id="test",
    )
    async with Sandbox(config) as sandbox:
        info = await sandbox.info()
        print(info.experiment_id, round(info.auto_stop_at - info.last_activity_at))


if __name__ == "__main__":
    asyncio.run(main())
