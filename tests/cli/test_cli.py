"""The `rock` command as people run it: real processes against a real server."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from rock import __version__
from rock.sync import Client, Sandbox

IMAGE = "host"


def rock(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"capture_output": True, "text": True, "timeout": 200, **options}
    return subprocess.run([sys.executable, "-m", "rock.cli.main", *arguments], **options)


@pytest.fixture
def box(server: Any) -> Iterator[Sandbox]:
    with Sandbox(image=IMAGE, memory="512m", cpus=1.0) as made:
        yield made


def alive() -> set[str]:
    with Client() as client:
        return {info.sandbox_id for info in client.list_sandboxes("pending,running")}


# ---- without a server


EVERY_HELP = """
import sys
from rock.cli.main import main
ends = []
for command in sys.argv[1:]:
    sys.argv[1:] = [command, "--help"]
    try:
        main()
    except SystemExit as end:
        ends.append(end.code or 0)
print()
for end in ends: print(end, end=" ")
"""


def test_help_and_version() -> None:
    assert rock("--version").stdout == f"rock {__version__}\n"
    shown = rock("--help").stdout
    own = ("run", "ps", "exec", "shell", "cp", "port-forward", "logs", "stop", "commit", "rm")
    commands = [*own, "image", "env", "doctor", "admin"]
    for command in commands:
        assert f"\n  {command} " in shown
    every = subprocess.run([sys.executable, "-c", EVERY_HELP, *commands], capture_output=True, text=True, timeout=200)
    assert every.stdout.endswith("\n" + "0 " * len(commands)), every.stderr
    assert every.stdout.count("Usage: rock ") == len(commands)


def test_help_loads_nothing_heavy() -> None:
    heavy = ("pydantic", "asyncio", "uvicorn", "fastapi", "websockets")
    text = f"import sys, rock.cli.main; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", text], capture_output=True, text=True).stdout == "[]\n"


def test_no_server() -> None:
    done = rock("--base-url", "http://127.0.0.1:9", "ps")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: no ROCK server at http://127.0.0.1:9\nhint: start it with: rock admin start\n"
    assert "Traceback" in rock("-v", "--base-url", "http://127.0.0.1:9", "ps").stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["bogus"], ["run"], ["exec", "x"], ["cp", "a", "b"], ["stop"], ["rm", "x", "--all"], ["ps", "--nosuch"],
        ["run", "--cpus", "many", "host", "true"], ["run", "--network", "wifi", "host", "true"],
        ["run", "-d", "-i", "host", "true"], ["exec", "-t", "-s", "s", "x", "true"],
    ],
)  # fmt: skip
def test_wrong_calls(arguments: list[str]) -> None:
    done = rock(*arguments)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    first, second = done.stderr.splitlines()[:2]
    assert first.startswith("error: ") and second.startswith("hint: ")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["run", "--memory", "much", "host", "true"], 125, "Invalid memory size: much"),
        (["run", "-e", "NOVALUE", "host", "true"], 125, "--env NOVALUE: this environment has no such variable"),
        (["run", "-e", "=x", "host", "true"], 125, "'=x' is not K=V"),
        (["--base-url", "nonsense", "ps"], 1, "is not a URL like http://host:8080"),
    ],
)
def test_bad_values_are_one_clear_line(arguments: list[str], status: int, words: str) -> None:
    done = rock(*arguments)
    assert done.returncode == status and done.stderr.startswith("error: ") and words in done.stderr
    assert "Traceback" not in done.stderr


def test_servers_that_cannot_start(server: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    port = str(urlsplit(server.url).port)
    without_key = {key: value for key, value in os.environ.items() if key != "ROCK_API_KEY"}
    for home, words, error, hint in (
        ("file/home", ["--port", "0"], "Not a directory", "set ROCK_HOME"),
        ("home", ["--host", "0.0.0.0", "--port", "0"], "refusing to listen on 0.0.0.0 without an API key",
         "set ROCK_API_KEY"),
        ("home", ["--port", port], f"cannot listen on 127.0.0.1:{port}", "--port"),
    ):  # fmt: skip
        done = rock("admin", "start", *words, env={**without_key, "ROCK_HOME": str(tmp_path / home)})
        first, second = done.stderr.splitlines()
        assert done.returncode == 1 and first.startswith(f"error: {error}"), done.stderr
        assert second.startswith("hint: ") and hint in second, done.stderr


def test_images_need_no_server(tmp_path: Path) -> None:
    environ = {**os.environ, "ROCK_HOME": str(tmp_path / "home"), "ROCK_BASE_URL": "http://127.0.0.1:9"}
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "hostname").write_text("x")
    assert rock("image", "import", str(root), "my/image:1", env=environ).stdout.startswith("my/image:1  sha256:")
    assert rock("image", "from-host", "python:3.11", env=environ).returncode == 0
    listed = json.loads(rock("image", "ls", "--json", env=environ).stdout)
    assert {"host", "my/image:1", "python:3.11"} <= {record["name"] for record in listed}
    assert "my/image:1" in rock("image", "ls", env=environ).stdout
    assert json.loads(rock("image", "inspect", "my/image:1", env=environ).stdout)["kind"] == "image"
    assert rock("image", "rm", "my/image:1", env=environ).returncode == 0
    missing = rock("image", "rm", "my/image:1", env=environ)
    assert missing.returncode == 1 and "error: no image my/image:1" in missing.stderr
    assert "error: " in rock("image", "import", "/no/such", "a", env=environ).stderr


# ---- run and exec


def test_run(server: Any) -> None:
    before = alive()
    done = rock("run", "-e", "X=1 2", "-w", "/usr", IMAGE, "--", "sh", "-c", 'echo "$X $PWD"; echo err >&2; exit 3')
    assert (done.returncode, done.stdout, done.stderr) == (3, "1 2 /usr\n", "err\n")
    assert rock("run", IMAGE, "ls", "-d", "/usr").stdout == "/usr\n"  # its own options are its own
    assert rock("run", "-i", IMAGE, "cat", input="typed\n").stdout == "typed\n"
    assert rock("run", IMAGE, "--", "sh", "-c", "kill -9 $$").returncode == 137
    late = rock("run", "--timeout", "0.3", IMAGE, "--", "sleep", "9")
    assert late.returncode == 124 and "timed out" in late.stderr
    missing = rock("run", IMAGE, "--", "nosuchprogram")
    assert missing.returncode == 127 and "nosuchprogram" in missing.stderr
    assert rock("run", IMAGE, "--", "/etc/hostname").returncode == 126
    assert alive() == before


def test_output_is_shown_while_it_comes(server: Any) -> None:
    command = [sys.executable, "-m", "rock.cli.main", "run", IMAGE, "--", "sh", "-c", "echo first; sleep 20"]
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None and child.stdout.readline() == "first\n"
            began = time.monotonic()
            child.send_signal(number)
            assert child.wait(20) == status and time.monotonic() - began < 10
    assert not alive()


def test_keep_ps_exec_stop_rm(server: Any) -> None:
    done = rock("run", "--keep", IMAGE, "true")
    name = done.stderr.strip().splitlines()[-1]
    assert name in alive() and name[:12] in rock("ps").stdout and name in rock("ps", "-q").stdout.split()
    (info,) = [item for item in json.loads(rock("ps", "--json").stdout) if item["sandbox_id"] == name]
    assert info["state"] == "running"
    assert rock("exec", name[:8], "--", "echo", "by its beginning").stdout == "by its beginning\n"
    assert rock("exec", "-e", "A=b", name, "--", "sh", "-c", "echo $A; exit 5").returncode == 5
    rock("exec", "--session", "default", name, "--", "cd /usr")
    assert rock("exec", "--session", "default", name, "--", "pwd").stdout == "/usr\n"
    stopped = rock("stop", name, "nosuch")
    assert (stopped.returncode, stopped.stdout) == (1, f"{name}\n") and "nosuch" in stopped.stderr
    assert "stopped by its user" in rock("ps", "-a").stdout
    assert rock("rm", name).stdout == f"{name}\n"
    assert name[:12] not in rock("ps", "-a").stdout
    assert rock("exec", name, "--", "true").returncode == 125


def test_logs(box: Sandbox) -> None:
    name = box.sandbox_id or ""
    process = box.processes.start("for i in 1 2 3; do echo o$i; echo e$i >&2; sleep 0.1; done; exit 4")
    done = rock("logs", "-f", name, process.id)
    assert (done.returncode, done.stdout, done.stderr) == (0, "o1\no2\no3\n", "e1\ne2\ne3\n")
    assert rock("logs", name, process.id).stdout == "o1\no2\no3\n"
    assert rock("logs", name).stdout == "o1\no2\no3\n"
    assert "exit 4" in rock("processes", name).stdout
    assert json.loads(rock("processes", "--json", name).stdout)[0]["exit_code"] == 4
    assert rock("logs", name, "nosuch").returncode == 1


def test_cp(box: Sandbox, tmp_path: Path) -> None:
    name, inside = box.sandbox_id, f"/tmp/rock-test-{os.getpid()}-cp"
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "file").write_bytes(os.urandom(1 << 20))
    assert rock("cp", str(tree), f"{name}:{inside}").returncode == 0
    assert box.fs.read(f"{inside}/sub/file") == (tree / "sub" / "file").read_bytes()
    assert rock("cp", str(tree), f"{name}:{inside}").returncode == 0  # exists now: goes into it
    assert box.fs.exists(f"{inside}/tree/sub/file")
    assert rock("cp", str(tree / "sub" / "file"), f"{name}:{inside}/").returncode == 0
    assert box.fs.exists(f"{inside}/file")
    assert rock("cp", f"{name}:{inside}", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back" / "sub" / "file").read_bytes() == (tree / "sub" / "file").read_bytes()
    assert rock("cp", f"{name}:{inside}/file", str(tmp_path)).returncode == 0
    assert (tmp_path / "file").exists()
    assert rock("cp", f"{name}:/no/such", str(tmp_path)).returncode == 1
    assert rock("cp", str(tmp_path / "nosuch"), f"{name}:/tmp/").returncode == 1
    box.fs.remove(inside, recursive=True)


# ---- shell


class Terminal:
    """A terminal with `rock shell` in it."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            os.execv(sys.executable, [sys.executable, "-m", "rock.cli.main", "shell", *arguments])
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.handle, text.encode())

    def expect(self, text: str, seconds: float = 15.0) -> None:
        end = time.monotonic() + seconds
        while text not in self.text:
            ready, _, _ = select.select([self.handle], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.text!r}"
            try:
                self.text += os.read(self.handle, 65536).decode("utf-8", "replace")
            except OSError:
                break
        assert text in self.text, self.text

    def close(self) -> int:
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.handle)
        return status


def test_shell(box: Sandbox) -> None:
    import fcntl
    import struct
    import termios

    shell = Terminal(box.sandbox_id or "")
    before = termios.tcgetattr(shell.handle)
    shell.type("echo $((6*7))\n")
    shell.expect("42")
    assert not termios.tcgetattr(shell.handle)[3] & termios.ECHO  # raw while it lasts
    shell.type("test -t 0 && echo a-$((1+1))-tty\n")
    shell.expect("a-2-tty")
    fcntl.ioctl(shell.handle, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 111, 0, 0))
    time.sleep(0.5)
    shell.type("stty size\n")
    shell.expect("33 111")
    shell.type("sleep 50\n")
    time.sleep(0.3)
    shell.type("\x03")
    shell.type("echo after-$((3+4))\n")
    shell.expect("after-7")
    shell.type("exit 9\n")
    deadline = time.monotonic() + 10
    while termios.tcgetattr(shell.handle) != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert termios.tcgetattr(shell.handle) == before
    assert shell.close() == 9


def test_shell_of_an_image_stops_its_sandbox(server: Any) -> None:
    shell = Terminal(IMAGE)
    shell.type("echo up-$((1+2))\n")
    shell.expect("up-3")
    assert len(alive()) == 1
    shell.type("exit\n")
    assert shell.close() == 0
    assert not alive()


def test_shell_without_a_terminal(box: Sandbox) -> None:
    done = rock("shell", box.sandbox_id or "", input="echo got-$((2+3))\nexit 6\n")
    assert "got-5" in done.stdout and done.returncode == 6
    done = rock("shell", "--command", "stty size; exit 2", box.sandbox_id or "", stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and len(done.stdout.split()) == 2


def test_commit(server: Any, box: Sandbox, tmp_path: Path) -> None:
    name = box.sandbox_id or ""
    box.arun("echo 41 > /root/answer")
    done = rock("commit", name[:12], "team/cli:1")
    assert done.returncode == 0 and done.stdout.startswith("team/cli:1  sha256:"), done.stderr
    assert rock("run", "team/cli:1", "--", "cat", "/root/answer").stdout == "41\n"
    told = rock("commit", name, "localhost:1/team/cli:1", "--push")
    assert told.returncode == 1 and "no registry can hold" in told.stderr and "commit without a push" in told.stderr
    assert rock("commit", name, "A b").returncode == 1
    home = {**os.environ, "ROCK_HOME": str(server.home)}
    for command in (("push", "team/cli:1"), ("export", "team/cli:1", str(tmp_path / "x"))):
        told = rock("image", *command, env=home)
        assert told.returncode == 1 and "this machine's own system" in told.stderr
    assert rock("image", "rm", "team/cli:1", env=home).returncode == 0


def test_restart_archive_and_rm(server: Any) -> None:
    done = rock("run", "--keep-files", "600", IMAGE, "--", "sh", "-c", "echo kept > /root/file")
    assert done.returncode == 0, done.stderr
    name = done.stderr.split()[-1]
    try:
        for commands in (("restart",), ("stop", "archive", "restart")):
            for command in commands:
                told = rock(command, name)
                assert (told.returncode, told.stdout) == (0, f"{name}\n"), (command, told.stderr)
            assert rock("exec", name, "--", "cat", "/root/file").stdout == "kept\n"
        twice = rock("restart", name)
        assert twice.returncode == 1 and "stop it first" in twice.stderr
    finally:
        assert rock("rm", "--force", name).stdout == f"{name}\n"
    assert rock("restart", name).returncode == 1
