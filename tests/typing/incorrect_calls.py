"""Incorrect calls of the SDK. mypy --strict reports an error for each line that has the mark.

tests/sdk/test_typing.py checks that; this module is never imported.
"""

from __future__ import annotations

import rock
from rock.sync import Sandbox, SandboxConfig, SandboxGroup


def creation() -> None:
    Sandbox(imag="python:3.11")  # wrong: no such option
    Sandbox("python:3.11", memmory="2g")  # wrong: no such option
    Sandbox("python:3.11", auto_clear_seconds=5)  # wrong: a field of SandboxConfig
    Sandbox("python:3.11", "2g")  # wrong: options are keywords
    Sandbox(5)  # wrong: no image
    Sandbox("python:3.11", memory=2.5)  # wrong: a size is str or int
    Sandbox("python:3.11", cpus="2")  # wrong: a number
    Sandbox("python:3.11", isolation="usrns")  # wrong: no such level
    Sandbox("python:3.11", network="wifi")  # wrong: no such network
    Sandbox("python:3.11", env={"A": 1})  # wrong: values are text
    Sandbox("python:3.11", labels=["a"])  # wrong: a mapping
    Sandbox("python:3.11", idle_timeout="5m")  # wrong: seconds
    Sandbox(SandboxConfig(memry="2g"))  # wrong: no such field
    SandboxGroup("python:3.11", sise=4)  # wrong: no such option
    SandboxGroup("python:3.11", mode="best")  # wrong: no such mode
    Sandbox.connect()  # wrong: the id is missing
    Sandbox.connect("id", memory="2g")  # wrong: not an option of a connection
    Sandbox.list(state="running")  # wrong: states
    Sandbox.list(labels="a=b")  # wrong: a mapping


def calls(sandbox: Sandbox) -> None:
    sandbox.run("true", check="raise")  # wrong: a bool
    sandbox.run(["true"])  # wrong: a command line
    sandbox.run("true", tiemout=1)  # wrong: timeout
    sandbox.run("true", wait_timeout=1)  # wrong: timeout
    sandbox.exec("true", cwdd="/")  # wrong: cwd
    sandbox.exec("cat", stdin=5)  # wrong: no input
    sandbox.exec(True)  # wrong: no command
    sandbox.processes.start("true", tiemout=1)  # wrong: no such option
    sandbox.stream("true", session="s", cwd="/")  # wrong: an option of a program
    sandbox.sessions.create("s", users="root")  # wrong: user
    sandbox.files.upload("/here")  # wrong: the remote path is missing
    sandbox.files.write("/x", 5)  # wrong: no content
    sandbox.port_url("8000")  # wrong: a number
    sandbox.run("true").exitcode  # wrong: exit_code
    sandbox.processes()  # wrong: a part, not a method


async def asynchronous(sandbox: rock.Sandbox) -> None:
    with sandbox:  # wrong: async with
        pass
    sandbox.run("true").output  # wrong: await is missing
