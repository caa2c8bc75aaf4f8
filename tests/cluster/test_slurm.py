"""Workers as a job of a real Slurm (Debian's packages) with two nodes on this machine; they open tunnels."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests import waiting
from tests.cluster.machines import KEY, TOKEN, server
from tests.conftest import IMAGE, RunningServer, give_image

from rock.protocol.node import WorkerState
from rock.sync import Client, Sandbox, SandboxConfig

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy" / "slurm" / "rock-workers.sbatch"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scancel")

pytestmark = [
    pytest.mark.skipif(os.environ.get("ROCK_TEST_CLUSTER") != "1", reason="takes a minute: set ROCK_TEST_CLUSTER=1"),
    pytest.mark.skipif(os.geteuid() != 0, reason="the daemons of Slurm run as root"),
    pytest.mark.skipif(not all(shutil.which(name) for name in NEEDED),
                       reason="Slurm is not installed: apt-get install slurm-wlm munge"),
]  # fmt: skip

CONFIG = """
ClusterName=rock
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=1
PartitionName=p Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def until(what: Callable[[], bool], seconds: float = 60.0, logs: Callable[[], str] = str) -> None:
    try:
        waiting.until(what, seconds)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{logs()}") from None


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Slurm:
    """A controller and two nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o755)
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        ctld, n1, n2 = free_ports(3)
        config = folder / "slurm.conf"
        config.write_text(CONFIG.format(host=socket.gethostname().partition(".")[0], ctld=ctld, n1=n1, n2=n2,
                                        folder=folder))  # fmt: skip
        self.environment = {**os.environ, "SLURM_CONF": str(config),
                            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
        self.processes: list[subprocess.Popen[bytes]] = []
        paths = [f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in ("socket", "pid-file", "log-file")]
        self._start("munged", "--foreground", "--force", f"--key-file={key}", f"--seed-file={folder}/munge.seed",
                    *paths)
        until((folder / "munge.socket").exists)
        self._start("slurmctld", "-D", "-i")
        self._start("slurmd", "-D", "-N", "n1")
        self._start("slurmd", "-D", "-N", "n2")
        until(lambda: self.run("sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"], 60, self.logs)

    def _start(self, *words: str) -> None:
        with open(self.folder / "daemons.log", "ab") as log:
            self.processes.append(subprocess.Popen(words, env=self.environment, stdout=log, stderr=log,
                                                   stdin=subprocess.DEVNULL))  # fmt: skip

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in self.folder.glob("*.log"))

    def run(self, *words: str, **environment: str) -> str:
        done = subprocess.run(words, env={**self.environment, **environment}, capture_output=True, text=True,
                              cwd=self.folder, timeout=60)  # fmt: skip
        return done.stdout if done.returncode == 0 else ""

    def end(self) -> None:
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    found = Slurm(tmp_path)
    try:
        yield found
    finally:
        found.end()


@pytest.fixture
def admin(tmp_path: Path) -> Iterator[RunningServer]:
    made = server(tmp_path / "server")
    yield made
    made.stop()


def test_a_job_brings_workers(slurm: Slurm, admin: RunningServer, tmp_path: Path) -> None:
    key = tmp_path / "worker-key"
    key.write_text(TOKEN)
    key.chmod(0o600)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for number in range(2):  # the images of the nodes
        home = scratch / f"rock-1-{number}"
        home.mkdir(mode=0o700)
        give_image(home)
    submitted = slurm.run("sbatch", "--nodes=2", "--parsable", f"--output={tmp_path}/job.log", str(SCRIPT),
                          ROCK_JOIN=admin.url, ROCK_WORKER_KEY_FILE=str(key), ROCK_SCRATCH=str(scratch),
                          ROCK_POOL_SIZE="0", ROCK_DRAIN_WAIT="20")  # fmt: skip
    assert submitted.strip() == "1", slurm.logs()
    with Client(admin.url, KEY) as client:
        until(lambda: sorted((found.name, found.state) for found in client.list_workers())
              == [("slurm-1-0", WorkerState.READY), ("slurm-1-1", WorkerState.READY)], 60,
              lambda: (tmp_path / "job.log").read_text())  # fmt: skip
        assert {found.url for found in client.list_workers()} == {"tunnel://slurm-1-0", "tunnel://slurm-1-1"}
        config = SandboxConfig(base_url=admin.url, api_key=KEY, image=IMAGE, memory="64m", cpus=0.2)
        sandboxes = [Sandbox(config) for _ in range(6)]
        for number, sandbox in enumerate(sandboxes):
            sandbox.start()
            assert sandbox.arun(f"echo {number}").output.strip() == str(number)
        assert {sandbox.info().worker for sandbox in sandboxes} == {"slurm-1-0", "slurm-1-1"}
        # The job is about to end: the workers accept no more sandboxes, and keep those that they have.
        slurm.run("scancel", "--batch", "--signal=TERM", "1")
        until(lambda: all(found.status is not None and found.status.sandbox_limit == 0
                          for found in client.list_workers()), 60, lambda: (tmp_path / "job.log").read_text())
        assert sandboxes[0].arun("echo still here").output.strip() == "still here"
        for sandbox in sandboxes:
            sandbox.stop()
        until(lambda: "1" not in slurm.run("squeue", "-h", "-o", "%i").split(), 60,
              lambda: (tmp_path / "job.log").read_text() + slurm.logs())
        began = time.monotonic()
        until(lambda: not any(found.state is WorkerState.READY for found in client.list_workers()), 90)
        print(f"the server noticed the end of the job within {time.monotonic() - began:.0f} s")
        for found in client.list_workers():
            client.remove_worker(found.name, force=True)
