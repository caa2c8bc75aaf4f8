"""Four equal sandboxes, started by one request. Start the server first: rock admin start"""

import asyncio

from rock import SandboxGroup


async def main() -> None:
    async with SandboxGroup("python:3.11", size=4, memory="512m") as group:
        for sandbox in group.sandbox_list:
            result = await sandbox.run("echo Hello")
            print(sandbox.sandbox_id, result.output, end="")


if __name__ == "__main__":
    asyncio.run(main())
