"""A server in front of another one: `python front.py URL` prints its address and hands everything on.

With ROCK_TEST_FRONT=1 every server of the tests is reached through one.
"""

import asyncio
import sys

from rock.cli.serve.serve import http_over, listen, run
from rock.http.forwarding import RemoteApp


async def main(url: str) -> None:
    listener = listen("127.0.0.1", 0)
    remote = RemoteApp(url)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    http = http_over(remote)
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    await reader.read()  # to the end: whoever started us is gone
    http.should_exit = True
    await serving
    await remote.close()


run(main(sys.argv[1]))
