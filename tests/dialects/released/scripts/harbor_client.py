"""Harbor with sandboxes: trials of its oracle, images from Dockerfiles, network policies, failures, an interrupt."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from checks import check, raises
from harbor.models.task.config import EnvironmentConfig, NetworkMode, NetworkPolicy
from harbor.models.trial.paths import TrialPaths

from rock.errors import InvalidConfig, Unsupported
from rock.integrations.harbor import LABELS, RockEnvironment
from rock.sync import Sandbox

CLASS = "rock.integrations.harbor:RockEnvironment"
ENVIRON = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # else it is downloaded
ROOT = Path(tempfile.mkdtemp())
REWARD = "mkdir -p /logs/verifier\n"
PLAIN = {"task.toml": '[environment]\ndocker_image = "host"\nmemory_mb = 512\ncpus = 1\n',
         "instruction.md": "Write 42.", "solution/solve.sh": "echo 42 > /tmp/answer; echo solved\n",
         "tests/test.sh": REWARD + 'grep -q 42 /tmp/answer && echo 1 > /logs/verifier/reward.txt'
                                   ' || echo 0 > /logs/verifier/reward.txt\n'}  # fmt: skip


def task(name: str, **changes: str) -> Path:
    """The plain task with changed and further files."""
    folder = ROOT / name
    for place, text in {**PLAIN, **changes}.items():
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return folder


def command(path: Path, *words: str, agent: str = "oracle") -> list[str]:
    return [sys.executable, "-m", "harbor.cli.main", "run", "-p", str(path), "-a", agent, "-e", CLASS, "-q", "-y",
            "-o", str(ROOT / "jobs"), "--job-name", f"{path.name}-{time.monotonic_ns()}", *words]  # fmt: skip


def run(path: Path, *words: str, agent: str = "oracle") -> list[dict[str, Any]]:
    """The results of the trials of a job."""
    given = command(path, *words, agent=agent)
    done = subprocess.run(given, capture_output=True, text=True, timeout=300, env=ENVIRON)
    place = ROOT / "jobs" / given[given.index("--job-name") + 1]
    found = [json.loads(file.read_text()) for file in sorted(place.glob("*/result.json"))]
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return [{**one, "place": str(place / one["trial_name"])} for one in found]


def reward(result: dict[str, Any]) -> Any:
    assert result["exception_info"] is None, result["exception_info"]
    return result["verifier_result"]["rewards"]["reward"]


def failure(result: dict[str, Any]) -> str:
    return f"{result['exception_info']['exception_type']}: {result['exception_info']['exception_message']}"


def running() -> int:
    return len(Sandbox.list(states=("pending", "running"), labels=LABELS))


def made(policy: NetworkPolicy | None = None, config: EnvironmentConfig | None = None, **options: Any) -> Any:
    folder = task("direct")
    (folder / "environment").mkdir(exist_ok=True)
    return RockEnvironment(folder / "environment", "direct", "direct__1", TrialPaths(Path(tempfile.mkdtemp())),
                           config or EnvironmentConfig(docker_image="host", memory_mb=512),
                           logging.getLogger("direct"), network_policy=policy, **options)  # fmt: skip


with check("an oracle trial: reward 1, with logs"):
    (result,) = run(task("plain"))
    assert reward(result) == 1.0 and running() == 0
    assert "solved" in Path(result["place"], "agent/oracle.txt").read_text()
with check("an agent that does nothing: reward 0"):
    assert reward(run(ROOT / "plain", agent="nop")[0]) == 0.0
with check("a wrong solution: reward 0"):
    assert reward(run(task("wrong", **{"solution/solve.sh": "echo 41 > /tmp/answer\n"}))[0]) == 0.0
with check("a Dockerfile: COPY, RUN, ENV and WORKDIR; three attempts share one build"):
    docker = task("docker", **{
        "task.toml": "[environment]\nmemory_mb = 512\n",
        "environment/data.txt": "42\n",
        "environment/Dockerfile": "FROM host\nENV WORD=answer\nWORKDIR /app/work\nCOPY data.txt /data/\n"
                                  "RUN echo built > /data/built\n",
        "solution/solve.sh": "pwd; cat /data/built; cp /data/data.txt $WORD\n",
        "tests/test.sh": REWARD + "cmp /data/data.txt /app/work/answer && echo 1 > /logs/verifier/reward.txt\n"})
    results = run(docker, "-k", "3", "-n", "3", "--ek", "build_network=none")
    assert [reward(one) for one in results] == [1.0] * 3 and running() == 0
    assert "/app/work\nbuilt" in Path(results[0]["place"], "agent/oracle.txt").read_text()
with check("a Dockerfile that fails: a typed error with its line"):
    (result,) = run(task("broken", **{"task.toml": "[environment]\nmemory_mb = 512\n",
                                      "environment/Dockerfile": "FROM host\nRUN exit 7\n"}),
                    "--ek", "build_network=none")  # fmt: skip
    assert failure(result).startswith("CommandFailed") and "line 2: RUN ended with status 7" in failure(result)
    assert running() == 0
with check("no reward file"):
    (result,) = run(task("silent", **{"tests/test.sh": "true\n"}))
    assert failure(result).startswith("RewardFileNotFoundError") and running() == 0
with check("an agent that takes too long is killed"):
    slow = task("slow", **{"task.toml": PLAIN["task.toml"] + "[agent]\ntimeout_sec = 3.0\n",
                           "solution/solve.sh": "echo 42 > /tmp/answer; sleep 4321\n"})
    (result,) = run(slow)
    assert failure(result).startswith("AgentTimeoutError") and running() == 0
with check("several rewards, artifacts and variables"):
    rich = task("rich", **{
        "task.toml": PLAIN["task.toml"] + '[environment.env]\nWORD = "hello"\n[verifier.env]\nWANTED = "hello"\n',
        "solution/solve.sh": "echo $WORD > /tmp/word; echo kept > /logs/artifacts/file.txt\n",
        "tests/test.sh": REWARD + '[ "$(cat /tmp/word)" = "$WANTED" ] && '
                                  'echo \'{"reward": 0.5, "speed": 2}\' > /logs/verifier/reward.json\n'})
    (result,) = run(rich)
    assert result["exception_info"] is None, result["exception_info"]
    assert result["verifier_result"]["rewards"] == {"reward": 0.5, "speed": 2}
    assert any(path.read_text() == "kept\n" for path in Path(result["place"]).rglob("file.txt"))
with check("a user of the agent"):
    user = task("user", **{
        "task.toml": PLAIN["task.toml"] + '[agent]\nuser = "daemon"\n',
        "solution/solve.sh": "id -un > /tmp/answer\n",
        "tests/test.sh": REWARD + "grep -q daemon /tmp/answer && echo 1 > /logs/verifier/reward.txt\n"})
    assert reward(run(user)[0]) == 1.0
with check("no network"):
    alone = task("alone", **{
        "task.toml": PLAIN["task.toml"] + 'network_mode = "no-network"\n',
        "solution/solve.sh": "grep -c : /proc/net/dev > /tmp/answer\n",
        "tests/test.sh": REWARD + 'grep -q "^1$" /tmp/answer && echo 1 > /logs/verifier/reward.txt\n'})
    assert reward(run(alone)[0]) == 1.0
with check("a list of allowed destinations"):
    allowed = ["example.com", "*.example.org", "203.0.113.7", "203.0.113.0/24", "2001:db8::7"]
    env = made(NetworkPolicy(network_mode=NetworkMode.ALLOWLIST, allowed_hosts=allowed))

    async def limited() -> None:
        await env.start(False)
        config = env.sandbox.config
        assert config.network == "nat" and len(config.egress) == 5, config
        await env.exec("python3 -c \"import socket; socket.create_connection(('198.51.100.1', 80), 3).recv(1)\"")
        (refused,) = (await env.sandbox.egress_log()).items
        assert refused.address == "198.51.100.1" and not refused.allowed
        await env.stop(True)

    asyncio.run(limited())
with check("the calls of the interface by their keywords"):

    async def calls() -> None:
        env = made()
        await env.start(force_build=False)
        source = Path(tempfile.mkdtemp())
        (source / "a/b").mkdir(parents=True)
        (source / "a/b/c.sh").write_text("echo ran")
        (source / "a/b/c.sh").chmod(0o755)
        await env.upload_dir(source_dir=source / "a", target_dir="/data/new")
        await env.upload_file(source_path=source / "a/b/c.sh", target_path="/data/other/c.sh")
        assert (await env.exec("/bin/sh b/c.sh; cat", cwd="/data/new")).stdout == "ran\n"
        assert (await env.exec("echo $X; exit 3", env={"X": "y"})).model_dump() == {
            "stdout": "y\n", "stderr": "", "return_code": 3}  # fmt: skip
        with raises(TimeoutError, "1 seconds"):
            await env.exec("sleep 4321", timeout_sec=1)
        assert await env.is_dir("/data/new") and not await env.is_dir("/data/new/b/c.sh")
        assert await env.is_file("/data/new/b/c.sh") and not await env.is_file("/no/such")
        await env.download_file(source_path="/data/other/c.sh", target_path=source / "got/c.sh")
        await env.download_dir(source_dir="/data", target_dir=source / "back")
        assert (source / "got/c.sh").read_text() == (source / "back/new/b/c.sh").read_text() == "echo ran"
        await env.download_dir_with_exclusions(source_dir="/data", target_dir=source / "part", exclude=["new"])
        assert (source / "part/other/c.sh").exists() and not (source / "part/new").exists()
        await env.stop(delete=False)
        (info,) = Sandbox.list(states="running", labels=LABELS)
        Sandbox.connect(info.sandbox_id).stop()
        await env.stop(delete=True)

    asyncio.run(calls())
with check("resources of the task"):
    env = made(config=EnvironmentConfig(docker_image="host", memory_mb=600, cpus=1.5),
               cpu_enforcement_policy="limit", memory_enforcement_policy="limit")  # fmt: skip
    config = env._sandbox_of("host").config
    assert (config.cpus, config.limit_cpus, config.memory) == (1.5, 1.5, "600m")
with check("options: unknown ones, and those of the task, are rejected by their names"):
    with raises(InvalidConfig, "no_such_option"):
        made(no_such_option=1)
    with raises(Unsupported, "memory"):
        made(memory="1g")
    with raises(InvalidConfig, "bridge"):
        made(build_network="bridge")
    assert made(idle_timeout=60)._options["idle_timeout"] == 60
with check("a task of Docker Compose is rejected"):
    compose = task("compose", **{"task.toml": "[environment]\nmemory_mb = 512\n",
                                 "environment/docker-compose.yaml": "services: {main: {image: x}}\n"})
    (result,) = run(compose)
    assert failure(result).startswith("Unsupported") and "Docker Compose" in failure(result)
with check("an interrupt leaves no sandbox"):
    process = subprocess.Popen(command(task("interrupted", **{"solution/solve.sh": "sleep 4321\n"})),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRON)  # fmt: skip
    end = time.monotonic() + 60
    while not running() and time.monotonic() < end:
        time.sleep(0.1)
    assert running() == 1
    process.send_signal(signal.SIGINT)
    process.wait(60)
    while running() and time.monotonic() < end:
        time.sleep(0.1)
    assert running() == 0
