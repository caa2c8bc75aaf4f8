"""The same task on every runtime: the oracle and an agent that does nothing get the same rewards, and commands the same
exit statuses, whatever made the sandbox."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import IMAGE, RunningServer
from tests.leaks import Inventory
from tests.runtime.docker import engines

from rock import errors
from rock.sync import SandboxConfig
from rock.training import HarborTasks

FOLDER = Path(__file__).parent.parent / "envs" / "harbor"
# a runtime, and the image to run the task in; docker-runsc is runtime "docker" with gVisor's kernel
IMAGES = {"fake": "anything:1", "namespace": IMAGE, "process": "host", "docker": "rock-test/hand:1",
          "docker-runsc": "rock-test/hand:1"}  # fmt: skip
STATUSES = {
    "true": 0,
    "false": 1,
    "(exit 7)": 7,
    "cd /no/such/folder 2>/dev/null || (exit 3)": 3,
    "no-such-program": 127,
    "/etc/passwd": 126,
    "sh -c 'kill -9 $$'": 137,
    "sh -c 'kill -TERM $$'": 143,
    "set -- a b c; (exit $#)": 3,
    "false | true": 0,
    "if grep -q root /etc/passwd; then (exit 5); fi": 5,
    "echo \"$GREETING\" | wc -c > /tmp/size; (exit $(cat /tmp/size))": 6,
}
# The task writes to /tests, /solution and /logs, and the process runtime has the host's root: so the server gets one
# that is thrown away, with all of the host's folders in it.
ANOTHER_ROOT = """
mount -t tmpfs none "$0"
for path in /*; do
    case $path in /tests|/solution|/logs) continue;; esac
    if [ -L "$path" ]; then cp -P "$path" "$0$path"
    elif [ -d "$path" ]; then mkdir "$0$path" && mount --rbind "$path" "$0$path"; fi
done
PATH=$PATH:/usr/sbin:/sbin exec chroot "$0" "$@"
"""


def bash(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": f"```bash\n{text}\n```"}


@pytest.fixture(scope="module")
def process_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose default is the process runtime, over a root of its own."""
    root = tmp_path_factory.mktemp("root")
    namespaces = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    prefix = [*namespaces, "--propagation", "private", "sh", "-ec", ANOTHER_ROOT, str(root)]
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare(1) to give the process runtime a root of its own")
    tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, timeout=60)
    if tried.returncode != 0:
        pytest.skip(f"the process runtime cannot be given a root of its own here: {tried.stderr.strip()}")
    running = RunningServer(tmp_path_factory.mktemp("home"), ROCK_RUNTIME="process")
    running.prefix = prefix
    running.start()
    yield running
    running.stop()
    running.assert_clean(Inventory())


@pytest.fixture(scope="module")
def docker_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    try:
        engine = engines.shared()
    except engines.CannotBeHad as error:
        pytest.skip(f"no container engine can be had: {error}")
    running = RunningServer(tmp_path_factory.mktemp("home"), ROCK_RUNTIME="docker", DOCKER_HOST=engine.host)
    running.start()
    yield running
    running.stop()
    running.assert_clean(Inventory())


@pytest.fixture(params=list(IMAGES))
def tasks(request: pytest.FixtureRequest) -> Iterator[HarborTasks]:
    if request.param == "docker-runsc" and not os.environ.get("ROCK_TEST_DOCKER"):
        pytest.skip("gVisor under Docker takes minutes: set ROCK_TEST_DOCKER=1, as `make docker` does")
    runtime, _, oci = request.param.partition("-")
    servers = {"process": "process_server", "docker": "docker_server"}
    server = request.getfixturevalue(servers.get(runtime, "server"))
    config = SandboxConfig(runtime=runtime, oci_runtime=oci or None)  # type: ignore[arg-type]
    with HarborTasks(FOLDER, image=IMAGES[request.param], base_url=server.url, config=config) as made:
        if request.param == "process":  # what one sandbox leaves on the host the next one finds
            made.create_instance("harbor", "greet", "before")
            made.step("before", bash("rm -rf /tmp/app"))
            made.release_instance("before")
        yield made
        if request.param == "process":
            made.create_instance("harbor", "greet", "after")
            made.step("after", bash("rm -rf /tmp/app"))


DONE = {"role": "assistant", "content": "It is done."}


def test_rewards(tasks: HarborTasks) -> None:
    tasks.create_instance("harbor", "greet", "null")
    done = tasks.step("null", DONE)
    assert done == {"state": [], "reward": 0.0, "is_terminated": True, "info": {"stop_reason": "completed"}}
    tasks.create_instance("harbor", "greet", "oracle")
    assert tasks.solve("oracle") == ""
    assert tasks.evaluate("oracle") == 1.0 and tasks.rewards("oracle") == {"reward": 1.0}
    tasks.create_instance("harbor", "greet", "agent")
    seen = tasks.step("agent", bash('mkdir -p /tmp/app && cd /tmp/app && echo "$GREETING, world" > greeting.txt; pwd'))
    assert seen["state"][0]["content"] == "/tmp/app\n\n[exit status 0]"
    assert tasks.step("agent", DONE)["reward"] == 1.0


def test_exit_statuses(tasks: HarborTasks) -> None:
    tasks.create_instance("harbor", "greet", "a")
    seen = {command: tasks.step("a", bash(command))["info"]["exit_code"] for command in STATUSES}
    assert seen == STATUSES


def test_an_oracle_that_fails(tasks: HarborTasks, tmp_path: Path) -> None:
    folder = tmp_path / "failing"
    shutil.copytree(FOLDER / "greet", folder)
    (folder / "solution/solve.sh").write_text("#!/bin/bash\nset -e\necho begun\nfalse\necho never\n")
    (folder / "tests/test.sh").write_text("echo 0.25 > /logs/verifier/reward.txt; exit 9\n")
    tasks.tasks.update(HarborTasks(folder).tasks)
    tasks.create_instance("harbor", "failing", "a")
    with pytest.raises(errors.CommandFailed) as caught:
        tasks.solve("a")
    assert caught.value.observation.exit_code == 1 and caught.value.observation.stdout == "begun\n"
    assert tasks.evaluate("a") == 0.25, "the tests' own status is no reward"


def test_a_time_out(tasks: HarborTasks, tmp_path: Path) -> None:
    folder = tmp_path / "slow"
    shutil.copytree(FOLDER / "greet", folder)
    told = (folder / "task.toml").read_text().replace("timeout_sec = 60.0", "timeout_sec = 1.0", 1)
    (folder / "task.toml").write_text(told)
    tasks.tasks.update(HarborTasks(folder).tasks)
    tasks.create_instance("harbor", "slow", "a")
    seen = tasks.step("a", bash("echo partial; sleep 1000"))
    assert seen["info"] == {"timed_out": True} and seen["state"][0]["content"].startswith("partial\n")
    assert tasks.step("a", bash("(exit 4)"))["info"]["exit_code"] == 4
