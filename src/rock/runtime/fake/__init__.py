"""Runtime "fake": sandboxes in memory, for tests of programs that use ROCK, and for fleets that are only simulated.

No process of the machine, no thread and, until a program is started, no descriptor: a sandbox costs some kilobytes. Its
shell, its tools and its files are Python (docs/guides/testing.md says which); further programs are functions that you
give. It isolates nothing: what your functions do, they do in the server.

    runtime.py   FakeRuntime              sandbox.py   one sandbox: files, processes, the programs by name
    programs.py  processes and calls      tree.py      files          streams.py  pipes
    syntax.py expand.py shell.py builtins.py printing.py tools.py     the shell and its tools
"""

from rock.runtime.fake.programs import Call, Program
from rock.runtime.fake.runtime import FakeRuntime

__all__ = ["Call", "FakeRuntime", "Program"]
