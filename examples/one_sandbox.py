"""One sandbox, one session, one command. Start the server first: rock admin start"""

import asyncio

from rock import Sandbox


async def main() -> None:
    async with Sandbox("python:3.11", memory="2g", cpus=2.0) as sandbox:
        await sandbox.sessions.create("bash-1")
        result = await sandbox.run("echo Hello ROCK", session="bash-1")
        print("\n" + "*" * 50 + "\n" + result.output + "\n" + "*" * 50 + "\n")


if __name__ == "__main__":
    asyncio.run(main())
