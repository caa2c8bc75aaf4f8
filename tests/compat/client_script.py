"""What a user of ROCK writes, run by rl-rock itself: each case prints what it saw as one line of JSON.

It runs in the client's own environment, which knows nothing of this repository. Nothing here is adapted to our server.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import rock

warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)

from rock.actions import (  # noqa: E402
    Action,
    BashAction,
    Command,
    CreateBashSessionRequest,
    ReadFileRequest,
    UploadRequest,
    WriteFileRequest,
)
from rock.sdk.sandbox.client import Sandbox, SandboxGroup  # noqa: E402
from rock.sdk.sandbox.config import SandboxConfig, SandboxGroupConfig  # noqa: E402

IMAGE = "python:3.11"
Case = Callable[[Any], Awaitable[dict[str, Any]]]


def config(**more: Any) -> Any:
    return SandboxConfig(image=IMAGE, memory="512m", cpus=1, **more)


async def error_of(work: Awaitable[Any]) -> list[str]:
    """The class and the text of what a call raises."""
    try:
        await work
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["", ""]


# ---- cases of all versions ------------------------------------------------------------------------------------------


async def life(box: Any) -> dict[str, Any]:
    status = await box.get_status()
    seen = {
        "id": box.sandbox_id,
        "host": [box.host_name, box.host_ip],
        "alive": bool(await box.is_alive()),
        "status": [status.is_alive, status.sandbox_id],
        "image": status.image,
        "user": [status.user_id, status.experiment_id],
        "free_port": 8000 not in status.port_mapping,
    }
    await box.stop()
    return {**seen, "after": await error_of(box.get_status()), "run_after": await error_of(box.arun("ls", session="s"))}


async def sessions(box: Any) -> dict[str, Any]:
    created = await box.create_session(CreateBashSessionRequest(session="s"))
    twice = await box.create_session(CreateBashSessionRequest(session="s"))
    default = await box.create_session(CreateBashSessionRequest(env_enable=True, env={"FROM": "me"}))
    await box.arun("cd /tmp; export A=5", session="s")
    kept = await box.arun("echo $A $PWD", session="s")
    silent = await box.run_in_session(BashAction(command="(exit 3)", session="s", check="silent"))
    ignored = await box.run_in_session(Action(command="(exit 3)", session="s", check="ignore"))
    return {
        "created": [created.output, twice.output, default.output],
        "env": (await box.run_in_session(Action(command="echo $FROM"))).output,
        "kept": [kept.output, kept.exit_code],
        "codes": [silent.exit_code, ignored.exit_code],
        "failed": await error_of(box.arun("echo why; false", session="s")),
        "unknown": await error_of(box.arun("no-such-command", session="s")),
        "syntax": await error_of(box.arun("if then", session="s")),
        "missing": await error_of(box.arun("ls", session="zz")),
        "lines": (await box.arun("for i in 1 2 3; do\n  echo $i\ndone", session="s")).output.split(),
    }


async def slow(box: Any) -> dict[str, Any]:
    await box.create_session(CreateBashSessionRequest(session="s"))
    told = await error_of(box.run_in_session(Action(command="sleep 43", session="s", timeout=1)))
    began = time.monotonic()
    after = await box.arun("echo in step", session="s")
    return {"told": told[0], "after": after.output, "waited": time.monotonic() - began}


async def nohup(box: Any) -> dict[str, Any]:
    began = time.monotonic()
    plain = await box.arun("bash -c 'echo one; echo two >&2; exit 3'", mode="nohup")
    took = time.monotonic() - began
    await box.create_session(CreateBashSessionRequest(session="s"))
    limited = await box.arun("seq 1 1000", session="s", mode="nohup", response_limited_bytes_in_nohup=7)
    ignored = await box.arun("seq 1 1000", session="s", mode="nohup", ignore_output=True)
    missing = await box.arun("no-such-program", session="s", mode="nohup")
    syntax = await box.arun("echo (", session="s", mode="nohup")
    late = await box.arun("bash -c 'echo early; sleep 60'", session="s", mode="nohup", wait_timeout=2)
    return {
        "plain": [plain.output, plain.exit_code],
        "took": took,
        "limited": limited.output,
        "ignored": ignored.output,
        "missing": [missing.output, missing.exit_code],
        "syntax": [syntax.output, syntax.exit_code],
        "late": [late.output, late.exit_code, late.failure_reason],
    }


async def execute(box: Any) -> dict[str, Any]:
    script = ["sh", "-c", "echo out; echo err >&2; pwd; echo $A; exit 4"]
    seen = await box.execute(Command(command=script, cwd="/tmp", env={"A": "b"}))
    missing = await box.execute(Command(command=["no-such-program"]))
    late = await box.execute(Command(command=["sleep", "30"], timeout=0.5))
    return {
        "seen": [seen.stdout, seen.stderr, seen.exit_code],
        "missing": [missing.exit_code, missing.stderr],
        "late": late.exit_code,
    }


async def files(box: Any) -> dict[str, Any]:
    text = "héllo\n" * 3
    wrote = await box.write_file(WriteFileRequest(content=text, path="/tmp/a/b/c.txt"))
    read = await box.read_file(ReadFileRequest(path="/tmp/a/b/c.txt"))
    missing = await box.read_file(ReadFileRequest(path="/tmp/nothing"))
    refused = await box.write_file(WriteFileRequest(content=text, path="/proc/no/such"))
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small.bin"), Path(folder, "large.bin")
        small.write_bytes(bytes(range(256)))
        large.write_bytes(os.urandom(5 << 20))
        ups = [
            (await box.upload(UploadRequest(source_path=str(small), target_path="/tmp/small.bin"))).success,
            (await box.upload_by_path(str(large), "/tmp/up/large.bin")).success,
            (await box.upload_by_path("/no/such/file", "/tmp/x")).success,
            (await box.upload_by_path(str(small), "/proc/no/such")).success,
        ]
        sums = await box.execute(Command(command=["sha256sum", "/tmp/small.bin", "/tmp/up/large.bin"]))
        import hashlib

        same = [hashlib.sha256(path.read_bytes()).hexdigest() in sums.stdout for path in (small, large)]
    lines = await box.read_file_by_line_range("/tmp/a/b/c.txt", 2, 3)
    return {
        "wrote": wrote.success,
        "read": read.content == text,
        "missing": missing.content,
        "refused": refused.success,
        "uploads": ups,
        "same": same,
        "lines": lines.content,
    }


# ---- cases of newer versions ----------------------------------------------------------------------------------------


async def newer(box: Any) -> dict[str, Any]:
    """What came after 1.4."""
    from rock.actions import CloseSessionRequest
    from rock.actions.sandbox.request import ChmodRequest, ChownRequest

    alone = await box.arun("echo $((6 * 7))")
    kept = await box.arun("seq 1 3", mode="nohup", ignore_output=True, output_file="/tmp/new/out.txt")
    script = await box.process.execute_script("echo from a script\nexit 0\n")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "deep").mkdir()
        Path(folder, "deep", "file").write_text("content")
        up = await box.fs.upload_dir(folder, "/tmp/tree")
    tree = await box.execute(Command(command=["cat", "/tmp/tree/deep/file"]))
    modes = await box.fs.chmod(ChmodRequest(paths=["/tmp/tree"], mode="700", recursive=True))
    user = await box.remote_user.create_remote_user("agent")
    owners = await box.fs.chown(ChownRequest(remote_user="agent", paths=["/tmp/tree"], recursive=True))
    owner = await box.execute(Command(command=["stat", "-c", "%a %U", "/tmp/tree/deep"]))
    await box.create_session(CreateBashSessionRequest(session="s"))
    await box.close_session(CloseSessionRequest(session="s"))
    return {
        "alone": alone.output,
        "kept": [kept.output, (await box.read_file(ReadFileRequest(path="/tmp/new/out.txt"))).content],
        "script": [script.output, script.exit_code],
        "tree": [up.exit_code, tree.stdout],
        "rights": [modes.success, user, owners.success, owner.stdout.strip()],
        "closed": await error_of(box.arun("ls", session="s")),
    }


async def errors(box: Any) -> dict[str, Any]:
    seen = {
        "running": await error_of(box.delete()),
        "restart": await error_of(box.restart()),
        "archive": await error_of(box.archive()),
        "commit": await error_of(box.get_commit_status()),
        "image": await error_of(Sandbox(SandboxConfig(image="no/such:image")).start()),
        "memory": await error_of(Sandbox(SandboxConfig(image=IMAGE, memory="abc")).start()),
        "twice": await error_of(Sandbox(config(sandbox_id=box.sandbox_id)).start()),
    }
    other = Sandbox(config())
    await other.attach(box.sandbox_id)
    seen["attached"] = (await other.arun("echo here")).output
    await box.stop()
    states = (await box.get_status(include_all_states=True)).state
    await box.delete()
    return {**seen, "state": states, "after": await error_of(box.get_status(include_all_states=True))}


async def kept(box: Any) -> dict[str, Any]:
    """Stopped, restarted, archived, restored, deleted: a sandbox of its own, as the wish is told at the start."""
    other = Sandbox(config(auto_delete_seconds=600))
    await other.start()
    await other.execute(Command(command=["sh", "-c", "echo kept > /root/file"]))
    await other.stop()
    stopped = await other.get_status(include_all_states=True)
    await other.restart()
    restarted = (await other.execute(Command(command=["cat", "/root/file"]))).stdout
    await other.stop()
    await other.archive()
    while (state := (await other.get_status(include_all_states=True)).state) != "archived":
        assert state == "archiving", state
        await asyncio.sleep(0.1)
    await other.restart()
    restored = (await other.execute(Command(command=["cat", "/root/file"]))).stdout
    await other.stop()
    await other.delete()
    return {
        "stopped": str(getattr(stopped.state, "value", stopped.state)),
        "restarted": restarted,
        "restored": restored,
        "after": await error_of(other.get_status(include_all_states=True)),
    }


CASES = (life, sessions, slow, nohup, execute, files, newer, errors, kept)
BOXED: dict[str, Case] = {case.__name__: case for case in CASES}


async def in_box(case: Case) -> dict[str, Any]:
    more = {"user_id": "u1", "experiment_id": "e1"} if case is life else {}
    box = Sandbox(config(**more))
    began = time.monotonic()
    await box.start()
    started = time.monotonic() - began
    try:
        return {**await case(box), "started": started}
    finally:
        await box.stop()


# ---- cases without a sandbox of their own ---------------------------------------------------------------------------


def group() -> dict[str, Any]:
    async def work() -> dict[str, Any]:
        boxes = SandboxGroup(SandboxGroupConfig(image=IMAGE, memory="128m", cpus=1, size=4, start_concurrency=2))
        await boxes.start()
        try:
            seen = [await box.execute(Command(command=["echo", str(n)])) for n, box in enumerate(boxes.sandbox_list)]
            return {"seen": [one.stdout for one in seen], "ids": len({box.sandbox_id for box in boxes.sandbox_list})}
        finally:
            await boxes.stop()

    return asyncio.run(work())


def loops() -> dict[str, Any]:
    """Every call in an event loop of its own."""
    box = Sandbox(config())
    asyncio.run(box.start())
    try:
        asyncio.run(box.create_session(CreateBashSessionRequest(session="s")))
        asyncio.run(box.arun("A=1", session="s"))
        return {"kept": asyncio.run(box.arun("echo $A", session="s")).output}
    finally:
        asyncio.run(box.stop())


def gem() -> dict[str, Any]:
    env = rock.make("game:Sokoban-v0-easy")
    observation, info = env.reset(seed=5)
    again = env.reset(seed=5)
    step = env.step("\\boxed{up}")
    env.close()
    env.close()
    try:
        rock.make("game:Nothing-v0")
        told = ""
    except Exception as error:
        told = str(error)
    return {"same": [observation, info] == [*again], "text": observation, "step": [*step], "told": told}


def envhub() -> dict[str, Any]:
    from rock.sdk.envhub.client import EnvHubClient, EnvHubError

    async def work() -> dict[str, Any]:
        hub = EnvHubClient()
        made = await hub.register("maze", "a:1", owner="me", description="d", tags=["x"], extra_spec={"n": [1]})
        got = await hub.get_env("maze")
        listed = [env.env_name for env in await hub.list_envs(tags=["x"])]
        deleted = [await hub.delete_env("maze"), await hub.delete_env("maze")]
        try:
            await hub.get_env("maze")
            told = False
        except EnvHubError:
            told = True
        health = await hub.health_check()
        return {
            "same": made == got,
            "spec": got.extra_spec,
            "listed": listed,
            "deleted": deleted,
            "told": told,
            **health,
        }

    return asyncio.run(work())


def commit() -> dict[str, Any]:
    """An image made of a sandbox, pushed as the client asks for it, and refused with a wrong password."""
    base, tag, username, password = os.environ["TEST_COMMIT"].split(" ", 3)

    async def work() -> dict[str, Any]:
        box = Sandbox(SandboxConfig(image=base, memory="256m", cpus=1))
        await box.start()
        try:
            await box.execute(Command(command=["bash", "-c", "echo from a commit > /written"]))
            done = await box.commit(tag, username, password, interval=0.2)
            told = await box.get_commit_status()
            wrong = await box.commit(tag, username, "wrong", interval=0.2)
            local = await box.commit("team/local:1", "", "", interval=0.2)
        finally:
            await box.stop()
        other = Sandbox(SandboxConfig(image=tag, memory="256m", cpus=1))
        await other.start()
        try:
            read = (await other.execute(Command(command=["cat", "/written"]))).stdout
        finally:
            await other.stop()
        return {
            "done": [done.phase, done.image_tag, done.exit_code],
            "same": told == done,
            "wrong": [wrong.phase, wrong.failed_stage, wrong.error_code, bool(wrong.error_message)],
            "local": local.phase,
            "read": read,
        }

    return asyncio.run(work())


def commit_old() -> dict[str, Any]:
    """Of a client that knows no status: it takes what comes for the end of a command."""

    async def work() -> dict[str, Any]:
        box = Sandbox(config())
        await box.start()
        try:
            return {"seen": type(await box.commit("team/old:1", "", "")).__name__}
        finally:
            await box.stop()

    return asyncio.run(work())


ALONE = (group, loops, gem, envhub, commit, commit_old)
OTHER: dict[str, Callable[[], dict[str, Any]]] = {case.__name__: case for case in ALONE}


def main() -> None:
    case = sys.argv[1]
    seen = OTHER[case]() if case in OTHER else asyncio.run(in_box(BOXED[case]))
    print(json.dumps({**seen, "client": str(rock.__file__)}))


if __name__ == "__main__":
    main()
