"""One script that runs with both SDKs: rl-rock itself, and the one of this package. It prints what it saw as JSON.

Every step stands for itself, below its name. What is of one run alone (ids, times, folders) is replaced; trailing line
ends are cut. Of an error it is told which of ROCK's classes a handler may name to catch it, beside Exception.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)

import rock  # noqa: E402
from rock.actions import (  # noqa: E402
    Action,
    BashAction,
    CloseSessionRequest,
    Command,
    CreateBashSessionRequest,
    ReadFileRequest,
    UploadRequest,
    WriteFileRequest,
)
from rock.actions.sandbox.request import ChmodRequest, ChownRequest  # noqa: E402
from rock.sdk.common.exceptions import (  # noqa: E402
    BadRequestRockError,
    CommandRockError,
    InternalServerRockError,
    RockException,
    raise_for_code,
)
from rock.sdk.envhub.client import EnvHubClient, EnvHubError  # noqa: E402
from rock.sdk.envhub.schema import EnvHubClientConfig  # noqa: E402
from rock.sdk.sandbox.client import RunMode, Sandbox, SandboxGroup  # noqa: E402
from rock.sdk.sandbox.config import SandboxConfig, SandboxGroupConfig  # noqa: E402
from rock.sdk.sandbox.runtime_env import PythonRuntimeEnvConfig, RuntimeEnv  # noqa: E402
from rock.sdk.sandbox.speedup import SpeedupType  # noqa: E402

IMAGE = "python:3.11"
FAMILIES: dict[str, type[Exception]] = {
    "RockException": RockException, "BadRequestRockError": BadRequestRockError, "CommandRockError": CommandRockError,
    "InternalServerRockError": InternalServerRockError, "EnvHubError": EnvHubError, "ValueError": ValueError,
    "FileNotFoundError": FileNotFoundError,
}  # fmt: skip

seen: dict[str, Any] = {}


def plain(value: Any) -> Any:
    """A value without what differs from run to run."""
    if isinstance(value, str):
        value = value.replace("\r\n", "\n").rstrip("\n")
        value = re.sub(r"(?<![0-9a-z])(\d{16,}|[0-9a-f]{32})(?![0-9a-z])", "N", value)
        return re.sub(r"(/tmp/tmp[\w-]{8}|Process \d+|within [\d.]+s|process [0-9a-f]{12})", "X", value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return {name: plain(item) for name, item in value.items()} if isinstance(value, dict) else value


async def step(name: str, work: Awaitable[Any], *fields: str) -> Any:
    """Note what an answer has in these fields, or all of it when none is named."""
    try:
        answer = await work
    except Exception as error:
        seen[name] = {"raised": [name for name, kind in FAMILIES.items() if isinstance(error, kind)]}
        return None
    if fields:
        seen[name] = plain([getattr(answer, field) for field in fields])
    else:
        seen[name] = plain(answer) if isinstance(answer, (str, bool)) else "done"
    return answer


def config(**more: Any) -> Any:
    return SandboxConfig(image=IMAGE, memory="512m", cpus=1, **more)


# ---- parts of the session; they run at the same time


async def sessions(box: Any) -> None:
    await step("session", box.create_session(CreateBashSessionRequest(session="s")), "output", "session_type")
    await step("session twice", box.create_session(CreateBashSessionRequest(session="s")), "output")
    await step("cd", box.arun("cd /tmp; export A=5; f() { echo f $1; }", session="s"), "output", "exit_code")
    await step("kept", box.arun("echo $A $PWD; f x", session="s"), "output", "exit_code", "failure_reason")
    await step("mixed", box.arun("echo out; echo err >&2", session="s", mode=RunMode.NORMAL), "output")
    await step("lines", box.arun("for i in 1 2; do\n  echo $i\ndone\ncat <<X\nhere\nX", session="s"), "output")
    await step("status", box.arun("echo why; (exit 3)", session="s"), "output", "exit_code")
    await step("silent", box.run_in_session(BashAction(command="(exit 3)", session="s", check="silent")), "exit_code")
    await step("ignore", box.run_in_session(Action(command="(exit 3)", session="s", check="ignore")), "exit_code")
    await step("raise", box.run_in_session(Action(command="(exit 3)", session="s")), "exit_code")
    await step("syntax", box.run_in_session(Action(command="if then", session="s")), "output")
    await step("no program", box.run_in_session(Action(command="no-such", session="s", check="silent")), "exit_code")
    await step("after", box.arun("echo in step", session="s"), "output", "exit_code")
    await step("empty", box.arun("# nothing", session="s"), "output", "exit_code")
    await step("no session", box.arun("ls", session="zz"), "output")
    await step("mode", box.arun("ls", session="s", mode="other"), "output")
    await step("close", box.close_session(CloseSessionRequest(session="s")), "session_type")
    await step("close again", box.close_session(CloseSessionRequest(session="s")), "session_type")
    await step("closed", box.arun("ls", session="s"), "output")
    await step("without a session", box.arun("cd /tmp; pwd"), "output", "exit_code")
    await step("without a session again", box.arun("pwd"), "output")
    env = CreateBashSessionRequest(session="env", env_enable=True, env={"FROM": "me", "B": "x y'z"})
    await step("session with env", box.create_session(env), "output")
    await step("env", box.arun("echo $FROM $B", session="env"), "output")
    await step("rc", box.write_file_by_path("echo noise\nRC=1; alias hi='echo hello'\n", "/tmp/rc"), "success")
    source = CreateBashSessionRequest(session="src", startup_source=["/tmp/rc"])
    await step("session with a source", box.create_session(source), "output")
    await step("sourced", box.arun("echo $RC", session="src"), "output")


async def bashrc(box: Any) -> None:
    text = "[ -z \"$PS1\" ] && return\nexport PATH=/opt/conda/bin:$PATH\nactivate() { ENV=$1; }\nactivate base\n"
    await step("bashrc", box.write_file_by_path(text, "/root/.bashrc"), "success")
    await step("session that reads it", box.create_session(CreateBashSessionRequest(session="rc")), "output")
    await step("of bashrc", box.arun("echo $ENV ${PATH%%:*}; activate x; echo $ENV", session="rc"), "output")


async def nohup(box: Any) -> None:
    await box.create_session(CreateBashSessionRequest(session="bg"))
    await box.arun("cd /tmp; export A=5", session="bg")
    fields = ("output", "exit_code", "failure_reason")
    late = {"mode": "nohup", "wait_timeout": 2, "wait_interval": 1}
    await asyncio.gather(
        step("nohup", box.arun("bash -c 'echo one; echo two >&2'", mode="nohup"), *fields),
        step("nohup status", box.arun("bash -c 'echo one; exit 3'", mode="nohup"), *fields),
        step("nohup no program", box.arun("no-such", mode="nohup"), "exit_code"),
        step("nohup late", box.arun("bash -c 'echo early; sleep 60'", **late), *fields),
        step("nohup limited", box.arun("seq 1 1000", mode="nohup", response_limited_bytes_in_nohup=7), "output"),
        step("nohup file", box.arun("echo x", mode="nohup", output_file="/tmp/new/out.txt"), *fields),
        step("nohup no session", box.arun("ls", session="zz", mode="nohup"), "exit_code"),
        step("nohup of a session", box.arun("bash -c 'echo $A $PWD'", session="bg", mode="nohup"), "output"),
        step("nohup and wait", box.run_nohup_and_wait("echo x", "/tmp/waited.txt"), "success"),
        ignored(box),
        script(box),
    )
    await step("its file", box.read_file(ReadFileRequest(path="/tmp/new/out.txt")), "content")


async def ignored(box: Any) -> None:
    told = await box.arun("seq 1 1000", mode="nohup", ignore_output=True, output_file="/tmp/new/big.txt")
    lines = {line.partition(":")[0]: line for line in told.output.splitlines()}
    seen["nohup ignored"] = [told.exit_code, lines.get("Status"), lines.get("Output file")]
    seen["nohup size"] = lines.get("File size")


async def script(box: Any) -> None:
    run = box.process.execute_script
    await asyncio.gather(
        step("script", run("echo out; echo err >&2; echo $0 | tr 0-9 N | tr -s N"), "output", "exit_code"),
        step("script status", run("echo why\nexit 3\n"), "output", "exit_code"),
        step("script name", run("echo $0; cat $0", script_name="own.sh", cleanup=False), "output", "exit_code"),
        step("script late", run("echo early; sleep 60", wait_timeout=1, wait_interval=1), "output"),
    )
    await step("script kept", box.read_file(ReadFileRequest(path="/tmp/own.sh")), "content")


async def execute(box: Any) -> None:
    fields = ("stdout", "stderr", "exit_code")
    argv = ["sh", "-c", "echo out; echo err >&2; pwd; echo $A; exit 4"]
    await step("execute", box.execute(Command(command=argv, cwd="/tmp", env={"A": "b"})), *fields)
    await step("execute text", box.execute(Command(command="echo a | tr a b; exit 2")), *fields)
    await step("execute late", box.execute(Command(command=["sleep", "30"], timeout=0.5)), "exit_code")
    await step("execute no program", box.execute(Command(command=["no-such"])), "exit_code")
    await step("execute no folder", box.execute(Command(command=["ls"], cwd="/no/such")), "exit_code")


async def files(box: Any) -> None:
    text = "".join(f"héllo {n}\n" for n in range(1, 8))
    await step("write", box.write_file(WriteFileRequest(content=text, path="/srv/a/b.txt")), "success")
    await step("read", box.read_file(ReadFileRequest(path="/srv/a/b.txt")), "content")
    await step("read latin-1", box.read_file(ReadFileRequest(path="/srv/a/b.txt", encoding="latin-1")), "content")
    await step("read nothing", box.read_file(ReadFileRequest(path="/srv/none")), "content")
    await step("write nowhere", box.write_file_by_path("x", "/proc/no/such"), "success")
    for ends in ((2, 3), (None, 2), (6, None), (None, None), (7, 9), (9, 10), (0, 2), (3, 2)):
        await step(f"lines {ends}", box.read_file_by_line_range("/srv/a/b.txt", *ends), "content")
    await step("lines of nothing", box.read_file_by_line_range("/srv/none", 1, 2), "content")


async def uploads(box: Any, here: Path) -> None:
    small, large = here / "small", here / "large"
    small.write_text("content")
    large.write_bytes(bytes(range(256)) * 8192)
    up = box.upload_by_path
    await step("upload", box.upload(UploadRequest(source_path=str(large), target_path="/srv/up/x")), "success")
    await step("upload nothing", up(str(here / "none"), "/srv/x"), "success", "message")
    await step("upload direct", up(str(small), "/srv/up/y", "direct"), "success")
    await step("upload oss", up(str(large), "/srv/up/z", "oss"), "success")
    await step("upload nowhere", up(str(large), "/proc/no/such"), "success")
    await step("uploaded", box.execute(Command(command=["sha256sum", "/srv/up/x", "/srv/up/y"])), "stdout")
    await step("download", box.fs.download_file("/srv/up/x", here / "back"), "success")


async def folders(box: Any, here: Path) -> None:
    (here / "deep").mkdir(parents=True)
    (here / "deep" / "file").write_text("content")
    await step("folder", box.fs.upload_dir(str(here), "/srv/tree"), "exit_code", "failure_reason")
    (here / "deep" / "file").rename(here / "deep" / "other")
    await step("folder again", box.fs.upload_dir(here, "/srv/tree"), "exit_code")
    await step("folder is", box.execute(Command(command=["find", "/srv/tree", "-type", "f"])), "stdout")
    await step("folder to nowhere", box.fs.upload_dir(here, "srv"), "exit_code", "failure_reason")
    await step("folder of nothing", box.fs.upload_dir(here / "none", "/srv/x"), "exit_code", "failure_reason")
    await step("folder of a file", box.fs.upload_dir(here / "deep" / "other", "/srv/x"), "exit_code", "failure_reason")
    await rights(box)


async def rights(box: Any) -> None:
    await step("user", box.remote_user.create_remote_user("agent"))
    await step("user again", box.remote_user.create_remote_user("agent"))
    await step("bad user", box.remote_user.create_remote_user("no name"))
    await step("user there", box.remote_user.is_user_exist("agent"))
    await step("user not there", box.remote_user.is_user_exist("nobody9"))
    seen["user now"] = box.remote_user.current_user
    await step("chmod", box.fs.chmod(ChmodRequest(paths=["/srv/tree"], mode="750", recursive=True)), "success")
    await step("chown", box.fs.chown(ChownRequest(remote_user="agent", paths=["/srv/tree"], recursive=True)), "success")
    stat = ["stat", "-c", "%a %U %G", "/srv/tree", "/srv/tree/deep/other"]
    await step("rights", box.execute(Command(command=stat)), "stdout")
    await step("chmod nothing", box.fs.chmod(ChmodRequest(paths=["/srv/none"])), "success")
    await step("chown nobody", box.fs.chown(ChownRequest(remote_user="nobody9", paths=["/srv/tree"])), "success")
    await step("chmod no paths", box.fs.chmod(ChmodRequest(paths=[])), "success")
    user = CreateBashSessionRequest(session="u", remote_user="agent")
    await step("user's session", box.create_session(user), "output")
    await step("user's command", box.arun("id -un; echo $HOME; cat /srv/tree/deep/other", session="u"), "output")
    other = CreateBashSessionRequest(session="v", remote_user="nobody9")
    await step("nobody's session", box.create_session(other), "output")


async def deploy(box: Any, here: Path) -> None:
    (here / "deep").mkdir(parents=True)
    (here / "deep" / "other").write_text("content")
    seen["working dir before"] = [box.deploy.working_dir, box.deploy.format("${working_dir} $$")]
    found = await box.deploy.deploy_working_dir(str(here))
    seen["working dir"] = [plain(found), found == box.deploy.working_dir]
    await step("deployed", box.execute(Command(command=["cat", f"{found}/deep/other"])), "stdout")
    await step("deploy to", box.deploy.deploy_working_dir(str(here), "/srv/work"))
    text = "cd ${working_dir} && ${x} <<y>> $x $$ ${none} <<none>> ${x:-1} <<a b>>"
    seen["format"] = box.deploy.format(text, x="a", y="${x}", working_dir="other")
    await step("deploy nothing", box.deploy.deploy_working_dir(str(here / "none")))
    await step("deploy a file", box.deploy.deploy_working_dir(str(here / "deep" / "other")))
    await step("deploy to nowhere", box.deploy.deploy_working_dir(str(here), "work"))


async def mirrors(box: Any) -> None:
    await step("github", box.network.speedup(SpeedupType.GITHUB, "10.1.2.3"), "exit_code")
    await step("hosts", box.execute(Command(command=["grep", "github.com", "/etc/hosts"])), "stdout")
    await step("bad github", box.network.speedup(SpeedupType.GITHUB, "not an ip"), "exit_code")
    await step("pip", box.network.speedup(SpeedupType.PIP, "http://mirror.example"), "exit_code")
    get = ["pip3", "config", "get", "global.index-url"]
    await step("pip asks", box.execute(Command(command=get, env={"HOME": "/root"})), "stdout")


async def runtime_env(box: Any) -> None:
    spec = PythonRuntimeEnvConfig(env={"Q": "1"}, pip_index_url=None)
    env = await RuntimeEnv.create(box, spec)
    seen["runtime env"] = [env.initialized, env.bin_dir.replace(env.runtime_env_id, "N"), len(box.runtime_envs)]
    tell = "echo $Q; command -v python | tr 0-9a-f N | tr -s N"
    await step("runtime env run", env.run(tell, mode="normal"), "output")
    await step("runtime env fails", env.run("exit 3", mode="normal"), "output")
    seen["wrapped"] = env.wrapped_cmd("a 'b'", prepend=False).replace(env.runtime_env_id, "N")


# ---- and what is not of one sandbox


async def start(**fields: Any) -> None:
    await Sandbox(SandboxConfig(image=IMAGE, **fields)).start()


async def life() -> None:
    box = Sandbox(config(user_id="u", experiment_id="e", namespace="n"))
    seen["before"] = box.sandbox_id is None
    seen["url"] = box.url.removeprefix(box.config.base_url)
    await step("start", box.start())
    fields = ("is_alive", "state", "image", "user_id", "experiment_id", "namespace", "cpus", "memory")
    status = await step("status of it", box.get_status(), *fields)
    seen["ids"] = [status.sandbox_id == box.sandbox_id, bool(box.host_name), bool(box.host_ip)]
    seen["phases"] = {name: phase["status"] for name, phase in status.status.items()}
    await step("alive", box.is_alive(), "is_alive")
    other = Sandbox(config())
    await step("attach", other.attach(box.sandbox_id))
    await step("attached", other.execute(Command(command=["echo", "here"])), "stdout")
    await step("attach to nothing", Sandbox(config()).attach("no-such-sandbox"))
    await step("same id", Sandbox(config(sandbox_id=box.sandbox_id)).start())
    await step("stop", box.stop())
    await step("stop again", box.stop())
    await step("stop what never was", Sandbox(config()).stop())
    await step("run after", box.arun("ls", session="s"), "output")
    await step("execute after", box.execute(Command(command=["ls"])), "stdout")
    await step("status after", box.get_status(), "is_alive")
    await step("bad memory", start(memory="abc"))
    await step("no image", Sandbox(SandboxConfig(image="no/such:image")).start())


async def group() -> None:
    boxes = SandboxGroup(SandboxGroupConfig(image=IMAGE, memory="128m", cpus=1, size=3, start_concurrency=3))
    await step("group", boxes.start())
    tell = [box.execute(Command(command=["echo", str(n)])) for n, box in enumerate(boxes.sandbox_list)]
    seen["group runs"] = [answer.stdout for answer in await asyncio.gather(*tell)]
    seen["group ids"] = len({box.sandbox_id for box in boxes.sandbox_list})
    await step("group stop", boxes.stop())


async def envhub() -> None:
    hub = EnvHubClient()
    made = await hub.register("maze", "a:1", owner="me", description="d", tags=["x"], extra_spec={"n": [1]})
    seen["registered"] = [made.env_name, made.image, made.owner, made.description, made.tags, made.extra_spec]
    seen["same"] = [made == await hub.get_env("maze"), type(made).from_dict(made.to_dict()) == made]
    seen["fields"] = sorted(made.to_dict())
    specs: list[dict[str, Any]] = [{"tags": ["x"]}, {"owner": "q"}]
    seen["listed"] = [[env.env_name for env in await hub.list_envs(**spec)] for spec in specs]
    seen["deleted"] = [await hub.delete_env("maze"), await hub.delete_env("maze")]
    seen["health"] = await hub.health_check()
    await step("not registered", hub.get_env("maze"))
    await step("registered badly", hub.register("", "a:1"))
    await step("no hub", EnvHubClient(EnvHubClientConfig(base_url="http://127.0.0.1:1")).health_check())


async def codes() -> None:
    async def check(code: Any) -> None:
        raise_for_code(code, "words")

    for code in (None, 2000, 2999, 4000, 4999, 5000, 6001, 3000):
        await step(f"code {code}", check(code))
    seen["codes"] = [[int(code), code.name, code.phrase] for code in rock.codes]


async def main() -> None:
    box = Sandbox(config())
    await box.start()
    try:
        with tempfile.TemporaryDirectory() as here:
            work = [part(box) for part in (sessions, nohup, execute, files, mirrors, runtime_env)]
            for part in (uploads, folders, deploy):
                place = Path(here, part.__name__)
                place.mkdir()
                work.append(part(box, place))
            await asyncio.gather(*work, life(), group(), envhub(), codes())
        await bashrc(box)  # by itself: the sessions of all others would read it
    finally:
        await box.stop()


if __name__ == "__main__":
    asyncio.run(main())
    sys.stdout.write(json.dumps({"client": str(rock.__file__), "seen": seen}) + "\n")
