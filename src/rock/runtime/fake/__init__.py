"""Runtime "fake": sandboxes in memory, for tests of programs that use ROCK, and for simulated fleets.

A sandbox costs some kilobytes: no process, no thread and, until a program starts, no descriptor. Its shell, tools and
files are Python (docs/guides/testing.md lists them); callers can add programs as functions. It provides no isolation:
the functions run in the server.

    runtime.py   FakeRuntime                    sandbox.py   one sandbox: files, processes, the programs by name
    programs.py  processes, calls, streams      tree.py      files
    shell.py syntax.py expand.py builtins.py printing.py     the shell
    tools.py                                                 programs that every sandbox has
"""

from rock.runtime.fake.programs import Call, Program
from rock.runtime.fake.runtime import FakeRuntime

__all__ = ["Call", "FakeRuntime", "Program"]
