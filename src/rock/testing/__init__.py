"""Test support for programs that use ROCK: a complete server in this process, with sandboxes in memory.

    with FakeServer({"train": my_function}) as server:
        sandbox = Sandbox(base_url=server.url)

docs/guides/testing.md describes its sandboxes. It provides no isolation. `rock.testing.kubernetes` is a fake cluster.
"""

from rock.testing.server import Call, FakeServer, Program

__all__ = ["Call", "FakeServer", "Program"]
