"""Steps of environments over a network: trainer and server in two network namespaces with a veth pair between them.

    sudo python bench/steps_network.py [--seconds 2] [--delays 0,0.1,0.5] [--json FILE]

Each row stands next to a bare TCP echo of the same link: a veth pair, or for a delay (ms, of each direction) a pair of
TUN devices, see delayed_link.py. "think" rows are on one machine, by pipes: the policy sleeps 10 or 50 ms
between two steps; they stand next to a bare pipe echo in the same pattern. `ROCK_MULTIPLEX=off` measures plain HTTP.

The namespaces have names of this process and are removed at the end, with the server in them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from delayed_link import delayed_link

FRAMES = Path(__file__).parent / "frames"
ROUNDS = 4
MOST = 20_000  # steps of one round
OURS, THEIRS = "10.213.87.1", "10.213.87.2"
DELAYED = ("10.213.88.1", "10.213.88.2")  # of the link with a delay, over which the route to THEIRS leads then
KEY = "steps-network"
SOKOBAN = "game:Sokoban-v0-easy"


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


# ---- network ----

@contextlib.contextmanager
def namespaces() -> Iterator[tuple[str, str]]:
    """(trainer, server): two namespaces with a veth pair."""
    trainer, server = f"rock-train-{os.getpid()}", f"rock-envs-{os.getpid()}"
    made = []
    try:
        for name in (trainer, server):
            run("ip", "netns", "add", name)
            made.append(name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "-n", trainer, "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", server)
        for name, address in ((trainer, OURS), (server, THEIRS)):
            run("ip", "-n", name, "address", "add", f"{address}/30", "dev", "veth0")
            run("ip", "-n", name, "link", "set", "veth0", "up")
        yield trainer, server
    finally:
        for name in made:
            run("ip", "netns", "delete", name)


@contextlib.contextmanager
def serving(namespace: str | None) -> Iterator[str]:
    """The URL of a server, in a namespace or here."""
    home = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests") / "bench-home"
    home.mkdir(parents=True, exist_ok=True)
    (home / "server.json").unlink(missing_ok=True)
    prefix = [] if namespace is None else ["ip", "netns", "exec", namespace]
    host = "127.0.0.1" if namespace is None else THEIRS
    server = subprocess.Popen(
        [*prefix, sys.executable, "-m", "rock.cli.server", "--host", host, "--port", "0"],
        env={**os.environ, "ROCK_HOME": str(home), "ROCK_API_KEY": KEY, "ROCK_POOL_SIZE": "0"},
        stdout=subprocess.DEVNULL)  # fmt: skip
    try:
        for _ in range(600):
            if (home / "server.json").exists() or server.poll() is not None:
                break
            time.sleep(0.1)
        yield f"http://{host}:{json.loads((home / 'server.json').read_text())['port']}"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


# ---- baselines ----

def _echo(address: str, ready: Any) -> None:
    with socket.create_server((address, 0)) as listener:
        ready.send(listener.getsockname()[1])
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := connection.recv(1 << 16):
                connection.sendall(data)


class TcpEcho:
    """A bare echo of 64 bytes by a process in the namespace of the server."""

    def __init__(self, namespace: str) -> None:
        words = ["ip", "netns", "exec", namespace, sys.executable, __file__, "--echo", THEIRS]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        port = int(self._process.stdout.readline())
        self._socket = socket.create_connection((THEIRS, port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def step(self) -> None:
        self._socket.sendall(b"x" * 64)
        self._socket.recv(1 << 16)

    def close(self) -> None:
        self._socket.close()
        self._process.wait(10)


class PipeEcho:
    """A bare echo of 64 bytes by a forked process, over two pipes."""

    def __init__(self) -> None:
        there, self._write = os.pipe()
        self._read, back = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._write)
            os.close(self._read)
            while data := os.read(there, 4096):
                os.write(back, data)
            os._exit(0)
        os.close(there)
        os.close(back)

    def step(self) -> None:
        os.write(self._write, b"x" * 64)
        os.read(self._read, 4096)

    def close(self) -> None:
        os.close(self._write)
        os.close(self._read)
        os.waitpid(self._pid, 0)


# ---- rows ----

class Environment:
    """An environment or a vector, and what it is stepped with. remote: without the pipes of the same machine."""

    def __init__(self, env: Any, action: Any, *, remote: bool = True) -> None:
        self._env, self._action = env, action
        self._single = not hasattr(env, "num_envs")
        link = getattr(env, "_player", None) or env.player
        if remote:
            for pipes in link.link.ways.values():
                pipes.close()
            link.link.ways.clear()
        env.reset(seed=1)

    def step(self) -> None:
        result = self._env.step(self._action)
        if self._single and (result[2] or result[3]):
            self._env.reset()

    def close(self) -> None:
        self._env.close()


def play(step: Callable[[], None], seconds: float, think: float = 0.0) -> list[float]:
    """Seconds of each step of one round."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and len(times) < MOST:
        if think:
            time.sleep(think)
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return times


def row(title: str, kinds: dict[str, Any], seconds: float, frames: int = 0, think: float = 0.0) -> list[dict[str, Any]]:
    """Measure all kinds in turns, and print them; ratios are to the first kind."""
    rounds: dict[str, list[list[float]]] = {name: [] for name in kinds}
    for kind in kinds.values():
        play(kind.step, min(seconds, 0.5), think)
    for _ in range(ROUNDS):
        for name, kind in kinds.items():
            rounds[name].append(play(kind.step, seconds / ROUNDS, think))
    found = []
    floor = [statistics.median(part) for part in rounds[next(iter(kinds))]]
    for name, parts in rounds.items():
        times = sorted(value for part in parts for value in part)
        ratio = statistics.median(statistics.median(part) / base for part, base in zip(parts, floor, strict=True))
        told = {"row": title, "kind": name, "n": len(times), "min": times[0] * 1e6,
                "p50": times[len(times) // 2] * 1e6, "p95": times[int(len(times) * 0.95)] * 1e6,
                "ratio": ratio}  # fmt: skip
        if frames and name != next(iter(kinds)):
            told["frames_per_second"] = frames * 1e6 / told["p50"]
        found.append(told)
        speed = f"  {told['frames_per_second']:8,.0f} frames/s" if "frames_per_second" in told else ""
        print(f"{title:34} {name:12} min {told['min']:7.0f}  p50 {told['p50']:7.0f}  p95 {told['p95']:7.0f} us"
              f"  n {told['n']:6d}  {ratio:5.2f}x{speed}", flush=True)  # fmt: skip
    for kind in kinds.values():
        kind.close()
    return found


def _made(make: Callable[[], Any]) -> Any:
    """The host of an earlier run may have ended with its server: then the next make starts another one."""
    from rock.errors import SandboxError

    try:
        return make()
    except SandboxError:
        return make()


def over_network(url: str, namespace: str, seconds: float, title: str) -> list[dict[str, Any]]:
    """All rows of one delay."""
    import rock
    from rock.gym import SandboxEnv, SandboxVectorEnv

    given: dict[str, Any] = {"base_url": url, "api_key": KEY}
    frames = {**given, "trust_remote_code": True}
    makers: list[tuple[str, Callable[[], Environment], int]] = [
        ("CartPole", lambda: Environment(SandboxEnv("CartPole-v1", **given), 0), 0),
        ("CartPole, 8 environments", lambda: Environment(
            SandboxVectorEnv("CartPole-v1", 8, **given), np.zeros(8, np.int64)), 0),
        ("CartPole, 64 environments", lambda: Environment(
            SandboxVectorEnv("CartPole-v1", 64, **given), np.zeros(64, np.int64)), 0),
        ("Sokoban", lambda: Environment(rock.make(SOKOBAN, **given), "\\boxed{up}"), 0),
        ("210x160x3 frames", lambda: Environment(SandboxEnv(str(FRAMES), **frames), 0), 1),
        ("210x160x3 frames, 8 environments", lambda: Environment(
            SandboxVectorEnv(str(FRAMES), 8, **frames), np.zeros(8, np.int64)), 8),
    ]  # fmt: skip
    found = []
    for name, make, count in makers:
        try:
            made = _made(make)
        except rock.errors.RockError as error:
            print(f"{name}{title}: not measured: {error}", flush=True)
            continue
        found += row(name + title, {"TCP echo": TcpEcho(namespace), "ROCK": made}, seconds, count)
    return found


def thinking(seconds: float) -> list[dict[str, Any]]:
    """Rows with a pause between two steps, on one machine."""
    import rock
    from rock.gym import SandboxEnv

    found = []
    with serving(None) as url:
        # The namespaces have no way to a package index, so the packages of Sokoban are installed here.
        with contextlib.suppress(rock.errors.RockError), _made(lambda: rock.make(SOKOBAN, base_url=url, api_key=KEY)):
            pass
        for think in (0.0, 0.01, 0.05):
            env = _made(lambda: SandboxEnv("CartPole-v1", base_url=url, api_key=KEY))
            kinds = {"pipe echo": PipeEcho(), "ROCK, pipes": Environment(env, 0, remote=False)}
            found += row(f"CartPole, think time {think * 1000:g} ms", kinds, seconds, think=think)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each kind of each row; at most 60")
    parser.add_argument("--delays", default="0,0.1,0.5", help="ms of each direction")
    parser.add_argument("--json", help="a file for the figures")
    parser.add_argument("--echo", help=argparse.SUPPRESS)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    given = parser.parse_args()
    seconds = min(given.seconds, 60.0)
    if given.echo:
        reader, writer = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.Process(target=_echo, args=(given.echo, writer))
        child.start()
        print(reader.recv(), flush=True)
        child.join()
        return
    if given.inside:
        url, namespace, title = json.loads(given.inside)
        print("\n" + json.dumps(over_network(url, namespace, seconds, title)))
        return
    print(f"load {os.getloadavg()[0]:.1f}")
    found = thinking(seconds)
    if os.geteuid() != 0 or not shutil.which("ip"):
        sys.exit("the rows over a network need root and `ip`")
    with namespaces() as names, serving(names[1]) as url:
        for text in given.delays.split(","):
            title, link = "", contextlib.ExitStack()
            if float(text):
                title, link = f", {text} ms", delayed_link(names, DELAYED, THEIRS, float(text))
            inside = [sys.executable, __file__, "--seconds", str(seconds), "--inside",
                      json.dumps([url, names[1], title])]  # fmt: skip
            words = ["ip", "netns", "exec", names[0], *inside]
            with link, subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as part:
                assert part.stdout is not None
                for line in part.stdout:
                    if line.startswith("["):
                        found += json.loads(line)
                    elif line.strip():
                        print(line, end="", flush=True)
            if part.returncode:
                sys.exit(part.returncode)
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
