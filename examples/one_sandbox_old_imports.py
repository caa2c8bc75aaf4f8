"""The same with the names of the original ROCK."""

import asyncio

from rock.sdk.sandbox.client import Sandbox
from rock.sdk.sandbox.config import SandboxConfig
from rock.sdk.sandbox.request import CreateBashSessionRequest


async def run_sandbox() -> None:
    sandbox = Sandbox(SandboxConfig(image="python:3.11", memory="8g", cpus=2.0))
    await sandbox.start()
    await sandbox.create_session(CreateBashSessionRequest(session="bash-1"))
    result = await sandbox.arun(cmd="echo Hello Rock", session="bash-1")
    await sandbox.stop()
    print(result.output)


if __name__ == "__main__":
    asyncio.run(run_sandbox())
