"""Starts servers by forking: a process that has imported all of it, so that a start costs what a start does.

A line of JSON on standard input, {"role", "port", "environ", "log"}, forks a server and answers with its pid;
{"wait": pid} answers once that process has ended. It ends with its standard input.
"""

from __future__ import annotations

import json
import os
import sys

import uvloop  # noqa: F401

from rock.admin.api import native  # noqa: F401
from rock.cli.serve.serve import Rocklet, Server, run_server
from rock.runtime.docker import runtime as docker  # noqa: F401
from rock.runtime.landlock import runtime as landlock  # noqa: F401
from rock.runtime.namespace import runtime as namespace  # noqa: F401
from rock.runtime.process import runtime  # noqa: F401
from rock.settings import Settings


def serve(order: dict[str, object]) -> None:
    """In the child: be the server, and never return."""
    log = os.open(str(order["log"]), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    code = 1
    try:
        os.environ.update(order["environ"])  # type: ignore[call-overload]
        role = Rocklet if order["role"] == "rocklet" else Server
        run_server(Settings.read(host="127.0.0.1", port=order["port"]), role)
        code = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            serve(order)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
