"""The released client of SWE-ReX against a sandbox; with "oracle" against its own server, which has to pass too.

swerex_client.py rock|oracle URL TOKEN
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
import uuid
from pathlib import Path

from checks import check, raises
from swerex.deployment.config import RemoteDeploymentConfig
from swerex.exceptions import (
    BashIncorrectSyntaxError,
    CommandTimeoutError,
    NonZeroExitCodeError,
    SessionDoesNotExistError,
    SessionExistsError,
)
from swerex.runtime.abstract import (
    BashAction,
    BashInterruptAction,
    CloseBashSessionRequest,
    Command,
    CreateBashSessionRequest,
    ReadFileRequest,
    UploadRequest,
    WriteFileRequest,
)
from swerex.runtime.remote import RemoteRuntime


async def main(kind: str, url: str, token: str) -> None:
    deployment = RemoteDeploymentConfig(host=url, auth_token=token, timeout=10).get_deployment()
    await deployment.start()
    runtime = deployment.runtime
    folder = f"/tmp/swerex-{uuid.uuid4().hex[:8]}"

    async def run(
        command: str, session: str = "default", timeout: float = 30, check: str = "silent"
    ) -> tuple[str, int]:
        action = BashAction(command=command, session=session, timeout=timeout, check=check)
        seen = await runtime.run_in_session(action)
        return seen.output.strip(), seen.exit_code

    with check("is_alive"):
        assert await runtime.is_alive() and await deployment.is_alive()
    with check("wrong token"):
        wrong = RemoteRuntime(host=url, auth_token="wrong")
        assert not await wrong.is_alive()
    with check("sessions: create, keep state, exist, close"):
        await runtime.create_session(CreateBashSessionRequest(startup_source=["/root/.bashrc"], startup_timeout=10))
        with raises(SessionExistsError):
            await runtime.create_session(CreateBashSessionRequest())
        await run(f"mkdir -p {folder} && cd {folder} && export A=kept")
        assert await run('echo "$PWD $A"') == (f"{folder} kept", 0)
        await runtime.create_session(CreateBashSessionRequest(session="second", startup_timeout=5))
        assert await run('echo "$A."', "second") == (".", 0)
        await runtime.close_session(CloseBashSessionRequest(session="second"))
        with raises(SessionDoesNotExistError):
            await run("true", "second")
        with raises(SessionDoesNotExistError):
            await runtime.close_session(CloseBashSessionRequest(session="second"))
    with check("exit codes"):
        assert await run("(exit 7)") == ("", 7)
        seen = await runtime.run_in_session(BashAction(command="(exit 7)", check="ignore", timeout=10))
        assert seen.exit_code is None
        with raises(NonZeroExitCodeError, "it failed: "):
            await runtime.run_in_session(BashAction(command="(exit 7)", error_msg="it failed", timeout=10))
    with check("several lines, here-documents, comments"):
        assert await run("echo a\necho b\n# a comment\ncat <<'EOF'\nc $X\nEOF") == ("a\nb\nc $X", 0)
        assert (await run("for i in 1 2; do\n  echo $i\ndone"))[0] == "1\n2"
        assert await run("") == ("", 0)
    with check("stdout and stderr in one output"):
        assert (await run("echo out; echo err >&2"))[0] == "out\nerr"
    with check("syntax error before anything runs"):
        with raises(BashIncorrectSyntaxError) as _:
            await run("touch ran\nif true")
        assert await run("test -e ran") == ("", 1)
        try:
            await run("echo (")
        except BashIncorrectSyntaxError as error:
            assert "syntax error" in error.extra_info["bash_stderr"]
    with check("timeout, interrupt, and the session afterwards"):
        began = time.monotonic()
        with raises(CommandTimeoutError, "timeout after"):
            await run("sleep 1000", timeout=1)
        assert time.monotonic() - began < 20
        await runtime.run_in_session(BashInterruptAction(timeout=2))
        assert (await run("echo again"))[0].endswith("again")
    with check("interrupt of a running command"):
        await runtime.create_session(CreateBashSessionRequest(session="busy", startup_timeout=5))
        if kind == "rock":  # the other server answers one request at a time
            task = asyncio.create_task(run("sleep 1000", "busy", 100))
            await asyncio.sleep(1)
            assert (await runtime.run_in_session(BashInterruptAction(session="busy", timeout=2))).exit_code == 0
            assert (await asyncio.wait_for(task, 20))[1] == 130
        await runtime.close_session(CloseBashSessionRequest(session="busy"))
    with check("interactive program: expect, state of the session, interrupt, quit"):
        await runtime.create_session(CreateBashSessionRequest(session="repl", startup_timeout=5))
        await run("cd /var && export FOR_PROGRAM=here", "repl")

        async def interact(command: str, expect: list[str], **more: bool) -> tuple[str, str]:
            more = more or {"is_interactive_command": True}
            action = BashAction(command=command, session="repl", expect=expect, timeout=10, **more)
            seen = await runtime.run_in_session(action)
            return seen.output, seen.expect_string

        assert (await interact("python3 -q", [">>> "]))[1] == ">>> "
        assert await interact("import os", [">>> "]) == ("", ">>> ")
        assert (await interact("print(os.getcwd(), os.environ['FOR_PROGRAM'])", [">>> "]))[0] == "/var here"
        with raises(CommandTimeoutError):
            action = BashAction(command="while True: pass", session="repl", expect=[">>> "], timeout=1,
                                is_interactive_command=True)  # fmt: skip
            await runtime.run_in_session(action)
        await runtime.run_in_session(BashInterruptAction(session="repl", expect=[">>> "], timeout=2))
        await interact("exit()", [], is_interactive_quit=True)
        assert await run("pwd", "repl") == ("/var", 0)
        await runtime.close_session(CloseBashSessionRequest(session="repl"))
    with check("execute"):
        seen = await runtime.execute(Command(command=["sh", "-c", "echo out; echo err >&2; exit 3"], cwd="/tmp"))
        assert (seen.stdout, seen.stderr, seen.exit_code) == ("out\n", "err\n", 3)
        seen = await runtime.execute(Command(command="echo $((6*7)); pwd", shell=True, cwd=folder))
        assert seen.stdout == f"42\n{folder}\n"
        seen = await runtime.execute(Command(command="echo a; echo b >&2", shell=True, merge_output_streams=True))
        assert (seen.stdout, seen.stderr) == ("a\nb\n", "")
        assert (await runtime.execute(Command(command="echo $X", shell=True, env={"X": "set"}))).stdout == "set\n"
        with raises(NonZeroExitCodeError):
            await runtime.execute(Command(command=["false"], check=True))
        with raises(CommandTimeoutError):
            await runtime.execute(Command(command=["sleep", "1000"], timeout=1))
        with raises(FileNotFoundError):
            await runtime.execute(Command(command="echo not a program"))
    with check("files"):
        await runtime.write_file(WriteFileRequest(path=f"{folder}/new/a.txt", content="one\nü\n"))
        assert (await runtime.read_file(ReadFileRequest(path=f"{folder}/new/a.txt"))).content == "one\nü\n"
        read = await runtime.read_file(ReadFileRequest(path=f"{folder}/new/a.txt", encoding="ascii", errors="ignore"))
        assert read.content == "one\n\n"
        with raises(FileNotFoundError):
            await runtime.read_file(ReadFileRequest(path=f"{folder}/nothing"))
    with check("upload of a file and of a folder"):
        with tempfile.TemporaryDirectory() as local:
            (Path(local) / "sub/empty").mkdir(parents=True)
            (Path(local) / "sub/tool").write_text("#!/bin/sh\necho tool\n")
            (Path(local) / "large").write_bytes(os.urandom(3 << 20))
            await runtime.upload(UploadRequest(source_path=local, target_path=f"{folder}/up"))
            await runtime.upload(UploadRequest(source_path=f"{local}/large", target_path=f"{folder}/one/large"))
        assert await run(f"cmp {folder}/up/large {folder}/one/large && sh {folder}/up/sub/tool") == ("tool", 0)
        assert await run(f"test -d {folder}/up/sub/empty") == ("", 0)
    with check("the calls of SWE-agent for a repository"):
        await run(f"git init -q {folder}/repo && cd {folder}/repo", check="raise")
        await run("git config user.email a@b && git config user.name a", check="raise")
        await runtime.write_file(WriteFileRequest(path=f"{folder}/repo/code.py", content="x = 1\n"))
        await run("git add -A && git commit -qm first", check="raise")
        await runtime.write_file(WriteFileRequest(path=f"{folder}/repo/code.py", content="x = 2\n"))
        await run("git add -A && git diff --cached > model.patch", check="raise")
        patch = (await runtime.read_file(ReadFileRequest(path=f"{folder}/repo/model.patch"))).content
        assert "+x = 2" in patch
        await run("git reset -q --hard && git clean -fdq", check="raise")
        assert await run("cat code.py") == ("x = 1", 0)
    if kind == "rock":
        with check("eight sessions at once"):
            names = [f"s{number}" for number in range(8)]
            await asyncio.gather(*(runtime.create_session(CreateBashSessionRequest(session=name)) for name in names))
            found = await asyncio.gather(*(run(f"sleep 0.2; echo {name}", name) for name in names))
            assert [output for output, _ in found] == names
    with check("close"):
        await deployment.stop()
        assert kind == "oracle" or await RemoteRuntime(host=url, auth_token=token, timeout=10).is_alive()


asyncio.run(main(*sys.argv[1:]))
