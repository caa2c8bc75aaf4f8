"""Runtime "fake": sandboxes in memory, for tests of programs that use ROCK, and for fleets that are only simulated.

No process of the machine, no thread and, until a program is started, no descriptor: a sandbox costs some kilobytes. Its
shell, its tools and its files are Python (docs/guides/testing.md says which); further programs are functions that you
give. It isolates nothing: what your functions do, they do in the server.

    runtime.py   FakeRuntime              sandbox.py   one sandbox: files, processes, the programs by name
    programs.py  processes and calls      tree.py      files          programs.py  pipes
    shell.py shell.py syntax.py syntax.py expand.py builtins.py printing.py   the shell
    tools.py tools.py                                             programs that every sandbox has
"""

from rock.runtime.fake.programs import Call, Program
from rock.runtime.fake.runtime import FakeRuntime

__all__ = ["Call", "FakeRuntime", "Program"]
