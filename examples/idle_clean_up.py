"""A sandbox with an idle timeout of twenty minutes. Start the server first: rock admin start"""

import asyncio

from rock import Sandbox


async def main() -> None:
    async with Sandbox("python:3.11", idle_timeout=60 * 20, experiment_id="test") as sandbox:
        info = await sandbox.info()
        assert info.auto_stop_at is not None and info.last_activity_at is not None
        print(info.experiment_id, round(info.auto_stop_at - info.last_activity_at))


if __name__ == "__main__":
    asyncio.run(main())
