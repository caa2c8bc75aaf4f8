"""`make demo`: a complete run of the main use case, with timings; it removes everything that it creates.

Its server uses a separate home beside the virtual environment, which retains only the environment packages, so that the
next run is fast.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import rock
from rock.errors import RockError
from rock.settings import child_environment
from rock.sync import Client, Sandbox, SandboxGroup

HOME = Path(sys.prefix) / "rock-demo"
IMAGE = "python:3.11"
GROUP = 8


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Print the duration of a step. A terminal shows its name while it runs."""
    terminal = sys.stdout.isatty()
    if terminal:
        print(f"  {what} ...", end="", flush=True)
    began = time.perf_counter()
    yield
    if terminal:
        print("\r\033[K", end="")
    print(f"  {what:<58} {(time.perf_counter() - began) * 1000:9.1f} ms", flush=True)


def run_cli(home: Path, *arguments: str) -> str:
    """Run the `rock` command in a subprocess."""
    done = subprocess.run(
        [sys.executable, "-m", "rock.cli.main", *arguments], capture_output=True, text=True, timeout=120,
        env=child_environment(ROCK_HOME=str(home)),
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"rock {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def server(home: Path) -> str:
    """Start a server on a free port; its URL."""
    with timed("rock admin start"):
        said = run_cli(home, "admin", "start", "--port", "0")
    return next(word for word in said.split() if word.startswith("http://"))


def one_sandbox(url: str, folder: Path) -> None:
    sandbox = Sandbox(IMAGE, memory="1g", cpus=1.0, base_url=url)
    with timed("start a sandbox"):
        sandbox.start()
    try:
        with timed("first command"):
            result = sandbox.run("echo hello from $(hostname); id -un; ls /root /home | wc -l")
        print("      " + " | ".join(result.output.split("\n")))
        with timed("100 commands in its session"):
            for number in range(100):
                assert sandbox.run(f"echo {number}").output == f"{number}\n"
        with timed("a Python program in it"):
            program = sandbox.exec(["python3", "-c", "print(sum(range(10**6)))"])
        print(f"      it printed {program.stdout.strip()}, exit code {program.exit_code}")
        result = sandbox.run("kill -9 $$")
        print(f"      a shell that kills itself: exit code {result.exit_code}, {result.failure_reason}")
        files(sandbox, folder)
        info = sandbox.info(usage=True)
        print(f"      isolation: {info.isolation}; limits enforced by {dict(info.enforced)}")
    finally:
        with timed("stop it"):
            sandbox.stop()


def files(sandbox: Sandbox, folder: Path) -> None:
    source, back = folder / "there.bin", folder / "back.bin"
    source.write_bytes(os.urandom(1 << 20) * 32)
    with timed("32 MB in"):
        sandbox.files.upload(source, "/tmp/there.bin")
    with timed("32 MB out"):
        sandbox.files.download("/tmp/there.bin", back)
    assert source.read_bytes() == back.read_bytes()


def group(url: str) -> None:
    sandboxes = SandboxGroup(IMAGE, size=GROUP, memory="512m", base_url=url)
    with timed(f"start a group of {GROUP}"):
        sandboxes.start()
    try:
        with timed("a command in each"):
            results = sandboxes.run_all("echo $((6 * 7))")
        assert [result.output for result in results] == ["42\n"] * GROUP
    finally:
        with timed("stop the group"):
            sandboxes.stop()


def progress() -> Callable[[str], None] | None:
    """How the installation of the environment packages is reported: by `rock.make` itself on a terminal, as a line per
    phase elsewhere."""
    if sys.stderr.isatty():
        return None
    phases: list[str] = []

    def show(message: str) -> None:
        phase = message.partition(" ")[0]
        if phase not in phases:
            phases.append(phase)
            print(f"      {message}", flush=True)

    return show


def episode(url: str, home: Path) -> None:
    if not (home / "images" / "packages").exists():
        print("  (the first run installs 70 MB of packages for the games)", flush=True)
    with timed('rock.make("game:Sokoban-v0-easy")'):
        env = rock.make("game:Sokoban-v0-easy", base_url=url, progress=progress())
    try:
        with timed("reset"):
            _, info = env.reset(seed=42)
        print("\n".join("      " + line for line in str(info.get("suffix", "")).strip().splitlines()))
        moves, steps, total, over = random.Random(7), 0, 0.0, False
        with timed("an episode of random moves"):
            while not over:
                action = f"\\boxed{{{moves.choice(['up', 'left', 'right', 'down'])}}}"
                _, reward, terminated, truncated, info = env.step(action)
                steps, total, over = steps + 1, total + reward, terminated or truncated
        print(f"      {steps} steps, reward {total:.2f}")
    finally:
        env.close()


def main(home: Path) -> int:
    """Run the demo with this ROCK_HOME; returns 1 when a step failed or something was left behind."""
    began = time.perf_counter()
    home.mkdir(parents=True, exist_ok=True)
    print(f"ROCK {rock.__version__}, {'root' if os.geteuid() == 0 else 'an ordinary user'}, home {home}")
    with timed(f"rock image from-host {IMAGE}"):
        run_cli(home, "image", "from-host", IMAGE)
    url = server(home)
    try:
        with tempfile.TemporaryDirectory() as folder:
            one_sandbox(url, Path(folder))
        group(url)
        episode(url, home)
        with Client(url) as client:
            left = client.list_sandboxes(states="running")
            print(f"  still running: {len(left)} (the host of environments, kept warm)")
    except RockError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        with timed("rock admin stop"):
            said = run_cli(home, "admin", "stop")
        print("      " + said.replace("\n", ", "))
    kept = ("staging", "probe", "base")  # folders of the runtime itself
    left_over = sorted(
        str(path) for path in (home / "run").glob("*/*")
        if path.name not in kept and (path.is_dir() or path.parent.name == "records")
    )  # fmt: skip
    print(f"  left behind: {left_over or 'nothing'}")
    print(f"done in {time.perf_counter() - began:.1f} s")
    return 1 if left_over else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else HOME))
