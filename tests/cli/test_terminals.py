"""The `rock` command in a real terminal and in pipelines: Ctrl-C, closed pipes, resizing, input, completion."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from tests.conftest import RunningServer
from tests.packages import CannotBeHad, tree

from rock.sync import Client, Sandbox

IMAGE = "host"
ROCK = [sys.executable, "-m", "rock.cli.main"]


@pytest.fixture
def box(server: Any) -> Iterator[Sandbox]:
    with Sandbox(IMAGE, memory="512m", cpus=1.0) as made:
        yield made


def rock(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ROCK, *words], **{"capture_output": True, "text": True, "timeout": 100, **options})


def terminal(*words: str, columns: int = 80) -> pexpect.spawn[str]:
    return pexpect.spawn(ROCK[0], [*ROCK[1:], *words], encoding="utf-8", dimensions=(24, columns), timeout=30)


def ended(child: pexpect.spawn[str], seconds: float = 5.0) -> int:
    """The exit code; it has to end within the time."""
    began = time.monotonic()
    child.expect(pexpect.EOF, timeout=seconds)
    child.close()
    assert time.monotonic() - began < seconds
    return child.exitstatus if child.exitstatus is not None else 128 + child.signalstatus


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A pipeline, in which `rock` is the command."""
    function = f'rock() {{ "{sys.executable}" -m rock.cli.main "$@"; }}\n'
    return subprocess.run(["bash", "-o", "pipefail", "-c", function + line], capture_output=True, timeout=60,
                          env={**os.environ, **environment})  # fmt: skip


# ---- logs


def test_ctrl_c_ends_logs(box: Sandbox) -> None:
    process = box.processes.start("echo begun; echo wrong >&2; exec sleep 100")
    child = terminal("logs", "-f", str(box.sandbox_id), process.id[:6])
    child.expect("begun")
    child.sendintr()
    assert ended(child) == 130
    assert process.status().running
    with subprocess.Popen([*ROCK, "logs", "-f", str(box.sandbox_id)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"begun\n"
        other.send_signal(signal.SIGTERM)
        assert other.wait(5) == 143


def test_a_closed_pipe_ends_logs(box: Sandbox) -> None:
    """Also of a process that writes nothing more."""
    box.processes.start("echo one; exec sleep 100")
    began = time.monotonic()
    assert shell(f"rock logs -f {box.sandbox_id} | head -1").stdout == b"one\n"
    assert time.monotonic() - began < 8


def test_a_full_pipe_does_not_hold_up_ctrl_c(box: Sandbox) -> None:
    process = box.processes.start("yes | head -c 4000000; sleep 100")
    with subprocess.Popen([*ROCK, "logs", "-f", str(box.sandbox_id), process.id], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.read(2) == b"y\n"
        time.sleep(1)
        child.send_signal(signal.SIGINT)
        assert child.wait(5) == 130


def test_logs_of_what_run_and_exec_started(server: Any) -> None:
    made = rock("run", "-d", "--name", "logged", "-l", "job=7", IMAGE, "--", "sh", "-c", "echo main; sleep 100")
    assert made.returncode == 0, made.stderr
    try:
        process = rock("exec", "-d", "logged", "sh", "-c", "echo second; exit 3").stdout.strip()
        assert rock("wait", "--process", process, "logged").stdout == "3\n"
        assert rock("logs", "logged").stdout == "main\n"
        assert rock("logs", "logged", process[:5]).stdout == "second\n"
        assert rock("logs", "--tail", "3", "logged", process).stdout == "nd\n"
        assert sorted(rock("logs", "--all", "logged").stdout.split()) == ["main", "second"]
        info = Client().get_sandbox(made.stdout.strip())
        assert (info.name, info.labels) == ("logged", {"job": "7"})
        assert info.auto_stop_at is None  # a detached program runs without a client
    finally:
        rock("rm", "-f", "logged")


# ---- input


def test_streamed_input_ends_with_its_program(box: Sandbox) -> None:
    began = time.monotonic()
    done = shell(f"yes | rock exec -i {box.sandbox_id} -- head -1")
    assert done.stdout == b"y\n" and time.monotonic() - began < 15


def test_input_is_passed_on_while_it_comes(box: Sandbox) -> None:
    with subprocess.Popen([*ROCK, "exec", "-i", str(box.sandbox_id), "--", "cat"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, bufsize=0) as child:  # fmt: skip
        assert child.stdin is not None and child.stdout is not None
        for line in (b"first\n", b"\xff\xfe second\n"):
            child.stdin.write(line)
            assert child.stdout.readline() == line
        child.stdin.close()
        assert child.wait(10) == 0


def test_a_running_process_takes_input_at_once(box: Sandbox) -> None:
    """Each write waited half a second, because a running process has no exit code."""
    process = box.processes.start(["cat"])
    began = time.monotonic()
    for _ in range(10):
        process.write_stdin(b"x")
    assert time.monotonic() - began < 3
    process.kill()


def test_binary_input_is_exact(box: Sandbox, tmp_path: Path) -> None:
    data = os.urandom(3_000_001)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(data)
    name = str(box.sandbox_id)
    assert shell(f"tar c -C {tmp_path} tree | rock exec -i {name} -- tar x -C /tmp -f -").returncode == 0
    assert box.files.read("/tmp/tree/file") == data
    done = shell(f"rock exec -i {name} -- cat < {tmp_path}/tree/file | sha256sum")
    assert done.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()
    assert rock("run", "--rm", "-i", IMAGE, "cat", input="typed\n").stdout == "typed\n"
    box.files.remove("/tmp/tree", recursive=True)


# ---- terminals


def test_a_program_in_a_terminal(box: Sandbox) -> None:
    words = ("exec", "-it", "-e", "A=it's", "-w", "/usr", str(box.sandbox_id), "--", "bash", "--norc")
    child = terminal(*words, columns=91)
    child.sendline("stty size; echo [$A] $PWD")
    child.expect(r"24 91\s+\[it's\] /usr")
    child.setwinsize(31, 77)
    time.sleep(0.5)
    child.sendline("stty size")
    child.expect("31 77")
    child.sendline("sleep 50")
    time.sleep(0.5)
    child.sendintr()
    child.sendline("echo after-$((3+4))")
    child.expect("after-7")
    child.sendline("exit 9")
    assert ended(child, 10) == 9


def test_a_terminal_of_a_new_sandbox(server: Any) -> None:
    before = {info.sandbox_id for info in Client().list_sandboxes()}
    child = terminal("run", "-it", "--rm", IMAGE, "sh", "-c", "test -t 1 && echo a-tty; sleep 50")
    child.expect("a-tty")
    child.sendintr()
    assert ended(child, 15) == 130
    assert {info.sandbox_id for info in Client().list_sandboxes()} - before == set()
    late = terminal("exec", "-t", "--timeout", "0.5", "nosuch", "true")
    assert ended(late, 10) == 125


def test_ctrl_c_ends_run(server: Any) -> None:
    child = terminal("run", IMAGE, "--", "sh", "-c", "echo up; sleep 100")
    child.expect("up")
    child.sendintr()
    assert ended(child, 15) == 130
    assert not Client().list_sandboxes("pending,running")


def test_progress_is_for_terminals_only(server: Any) -> None:
    child = terminal("run", IMAGE, "--", "sleep", "0")
    text = child.read()
    child.close()
    assert rock("run", IMAGE, "true").stderr == ""
    assert "starting a sandbox" in text or child.exitstatus == 0  # it appears after 0.3 s
    assert text.count("\x1b[K") != 1  # what was drawn was cleared


def test_stats_are_redrawn_until_ctrl_c(box: Sandbox) -> None:
    child = terminal("stats", "--interval", "0.2", str(box.sandbox_id))
    for _ in range(3):
        child.expect(str(box.sandbox_id)[:12])
    child.sendintr()
    assert ended(child) == 130
    found = rock("top", "--no-stream", "--json")
    assert '"cpu_percent"' in found.stdout and str(box.sandbox_id) in found.stdout


def test_events_are_followed_until_ctrl_c(box: Sandbox) -> None:
    child = terminal("events", "-f", "--interval", "0.2", columns=200)
    time.sleep(1.5)
    box.stop()
    child.expect(f"{str(box.sandbox_id)[:12]}  -  stop  running -> stopping")
    child.expect("stopping -> stopped")
    child.sendintr()
    assert ended(child) == 130
    assert "pending -> running" in rock("events", str(box.sandbox_id)).stdout


def test_a_table_fits_the_terminal(server: Any) -> None:
    long = "a-name-of-forty-digits-to-be-completed"
    rock("run", "-d", "--name", long, IMAGE)
    try:
        child = terminal("ps", "-a", columns=80)
        lines = re.sub(r"\x1b\[[0-9;]*m", "", child.read()).splitlines()
        child.close()
        assert len(lines) >= 2 and all(len(line) <= 80 for line in lines), lines
        assert long in rock("ps", "--no-trunc").stdout
    finally:
        rock("rm", "-f", long)


# ---- completion


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder with `rock` in it, for a PATH."""
    script = tmp_path / "bin" / "rock"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m rock.cli.main "$@"\n')
    script.chmod(0o755)
    return script.parent


def test_completion_in_bash(server: RunningServer, commands: Path) -> None:
    rock("run", "-d", "--name", "completed-box", IMAGE)
    try:
        child = pexpect.spawn("bash", ["--norc", "-i"], encoding="utf-8", timeout=20, dimensions=(24, 200),
                              env={**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "PS1": "$ "})  # fmt: skip
        child.sendline('bind "set enable-bracketed-paste off"; eval "$(rock completion bash)"; echo load""ed')
        child.expect("loaded")
        for typed, completed in (("rock conn", "ections"), ("rock stop compl", "eted-box"), ("rock ps --no-", "trunc"),
                                 ("rock image imp", "ort")):  # fmt: skip
            child.sendcontrol("u")
            child.send(f"{typed}\t")
            child.expect_exact(typed + completed)
        child.sendcontrol("u")
        child.sendline("exit")
        child.close()
    finally:
        rock("rm", "-f", "completed-box")


def shell_of(name: str) -> tuple[list[str], dict[str, str]]:
    """The command and the environment of zsh or fish: of this machine, else of Debian's packages."""
    if shutil.which(name):
        return [name], {}
    try:
        root = tree(name, [name]) / "opt" / "programs"
    except CannotBeHad as error:
        pytest.skip(str(error))
    libraries = [root / "usr" / "lib" / f"{platform.machine()}-linux-gnu", root / "lib"]
    env = {"LD_LIBRARY_PATH": ":".join(map(str, libraries))}
    if name == "zsh":
        env["MODULES"] = str(next(libraries[0].glob("zsh/*")))
        env["FPATH"] = ":".join(str(path) for path in (root / "usr/share/zsh").rglob("*") if path.is_dir())
        return [str(root / "bin" / "zsh")], env
    return [str(root / "usr" / "bin" / "fish")], env


@pytest.mark.parametrize(("name", "options", "setup"), [
    ("zsh", ["-f", "-i"], "autoload -U compinit; compinit -D -u; PS1='$ '; "
                          "eval \"$(rock completion zsh)\"; echo load\"\"ed"),
    ("fish", ["--no-config", "-i"], "rock completion fish | source; echo load\"\"ed"),
])  # fmt: skip
def test_completion_in_other_shells(
    name: str, options: list[str], setup: str, server: RunningServer, commands: Path, tmp_path: Path
) -> None:
    shell, more = shell_of(name)
    rock("run", "-d", "--name", "completed-box", IMAGE)
    try:
        child = pexpect.spawn(
            shell[0], options, encoding="utf-8", timeout=30, dimensions=(24, 200),
            env={**os.environ, **more, "PATH": f"{commands}:{os.environ['PATH']}", "HOME": str(tmp_path),
                 "XDG_DATA_HOME": str(tmp_path), "TERM": "xterm"},
        )  # fmt: skip
        child.sendline(f"module_path=($MODULES); {setup}" if "MODULES" in more else setup)
        child.expect("loaded")
        for typed, rest in (("rock conn", "ections"), ("rock stop compl", "eted-box"), ("rock image imp", "ort")):
            child.send("\x15")
            time.sleep(0.3)
            child.send(typed)
            time.sleep(0.3)
            child.send("\t")
            child.expect_exact(rest)
        child.send("\x15")
        child.sendline("exit")
        child.close(force=True)
    finally:
        rock("rm", "-f", "completed-box")


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_completion_scripts(name: str, tmp_path: Path) -> None:
    script = rock("completion", name)
    assert script.returncode == 0 and "_ROCK_COMPLETE" in script.stdout
    if shutil.which(name):
        (tmp_path / "script").write_text(script.stdout)
        assert subprocess.run([name, "-n", str(tmp_path / "script")]).returncode == 0


def test_completion_without_a_server(tmp_path: Path) -> None:
    began = time.monotonic()
    done = rock(env={**os.environ, "_ROCK_COMPLETE": "bash_complete", "COMP_WORDS": "rock stop ", "COMP_CWORD": "2",
                     "ROCK_BASE_URL": "http://127.0.0.1:9", "ROCK_HOME": str(tmp_path)})  # fmt: skip
    assert (done.stdout.strip(), done.stderr) == ("", "") and time.monotonic() - began < 5
