"""Steps of environments through the server, next to the same ones in this process, in AsyncVectorEnv and in rlmesh.

    python bench/environments.py [--server URL] [--seconds 3] [--rlmesh FOLDER] [--json FILE]

Without --server one of its own is started, whose packages are kept in ROCK_TEST_CACHE. Every row plays all of its
kinds in turns, so that a slow moment of the machine meets each of them; what counts is the ratio in the same run.
--rlmesh: where rlmesh 0.1.0 is installed, when not here. `make bench-environments` does all of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

import rock
from rock.envhub.packages import GEM, SETS, image_of
from rock.gym import SandboxEnv, SandboxVectorEnv
from rock.images.packages import PackageSet, ensure, packages_folder
from rock.images.store import ImageStore

FOLDER = Path(__file__).parent / "frames"
ROUNDS = 6


@dataclass
class Kind:
    """One way to play: the environment, and seconds of single steps, of each round."""

    name: str
    env: Any
    rounds: list[list[float]] = field(default_factory=list)

    def play(self, action: Any, seconds: float) -> None:
        """A round."""
        single = not hasattr(self.env, "num_envs")
        times: list[float] = []
        self.env.reset(seed=1)
        end = time.perf_counter() + seconds
        while (begin := time.perf_counter()) < end:
            result = self.env.step(action)
            times.append(time.perf_counter() - begin)
            if single and (result[2] or result[3]):
                self.env.reset()
        self.rounds.append(times)

    def figures(self) -> dict[str, float]:
        """Microseconds."""
        times = sorted(value for part in self.rounds for value in part)
        return {"n": len(times), "min": times[0] * 1e6, "p50": times[len(times) // 2] * 1e6,
                "p95": times[int(len(times) * 0.95)] * 1e6}  # fmt: skip


class Rows:
    """What was measured. seconds: of each kind of each row."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.told: list[dict[str, Any]] = []

    def add(self, title: str, action: Any, makers: dict[str, Callable[[], Any]], frames: int = 0) -> None:
        """Play all kinds in turns; the others are compared with the first. frames: of a step, where they count."""
        with contextlib.ExitStack() as stack:
            kinds = []
            for name, make in makers.items():
                kind = Kind(name, make())
                stack.callback(getattr(kind.env, "close", lambda: None))
                kind.play(action, self._seconds / ROUNDS)  # to warm up
                kind.rounds.clear()
                kinds.append(kind)
            for _ in range(ROUNDS):
                for kind in kinds:
                    kind.play(action, self._seconds / ROUNDS)
        print(title)
        floor = [statistics.median(part) for part in kinds[0].rounds]
        for kind in kinds:
            ratio = statistics.median(
                statistics.median(part) / base for part, base in zip(kind.rounds, floor, strict=True)
            )
            row = {"row": title, "kind": kind.name, **kind.figures(), "ratio": ratio}
            if frames:
                row["frames_per_second"] = frames * 1e6 / row["p50"]
            self.told.append(row)
            speed = f"  {row['frames_per_second']:9,.0f} frames/s" if frames else ""
            print(f"  {kind.name:20} min {row['min']:8.0f}  p50 {row['p50']:8.0f}  p95 {row['p95']:8.0f} us"
                  f"  n {row['n']:6d}  {ratio:6.1f}x{speed}", flush=True)  # fmt: skip


    def calls(self, title: str, kinds: dict[str, Callable[[], None]], count: int = 30) -> None:
        """Time single calls, of all kinds in turns."""
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(count):
            for name, call in kinds.items():
                begin = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - begin) * 1e6)
        print(title)
        for name, found in times.items():
            least, middle, most = (sorted(found)[place] for place in (0, count // 2, count - 2))
            self.told.append({"row": title, "kind": name, "n": count, "min": least, "p50": middle, "p95": most})
            print(f"  {name:20} min {least:8.0f}  p50 {middle:8.0f}  p95 {most:8.0f} us  n {count:6d}", flush=True)


def cartpole(rows: Rows, url: str, peer: Callable[[], Any] | None) -> None:
    name = "CartPole-v1"
    single: dict[str, Callable[[], Any]] = {
        "in-process": lambda: gymnasium.make(name), "ROCK": lambda: SandboxEnv(name, base_url=url),
    }  # fmt: skip
    if peer is not None:
        single["rlmesh"] = peer
    rows.add("CartPole, 1 environment", 0, single)
    for count in (8, 64):
        rows.add(f"CartPole, {count} environments", np.zeros(count, np.int64), {
            "in-process": lambda n=count: gymnasium.make_vec(name, n, vectorization_mode="sync"),
            "ROCK": lambda n=count: SandboxVectorEnv(name, n, base_url=url),
            "AsyncVectorEnv": lambda n=count: gymnasium.make_vec(name, n, vectorization_mode="async"),
        })  # fmt: skip


def frames(rows: Rows, url: str) -> None:
    def world() -> Any:
        sys.path.insert(0, str(FOLDER))
        import env

        return env.make_env()

    def one() -> Any:
        return SandboxEnv(str(FOLDER), trust_remote_code=True, base_url=url)

    def eight() -> Any:
        return SandboxVectorEnv(str(FOLDER), 8, trust_remote_code=True, base_url=url)

    rows.add("210x160x3 frames, 1 environment", 0, {
        "in-process": world, "ROCK, shared memory": one, "ROCK, pipes": lambda: by_pipes(one),
        "ROCK over HTTP": lambda: over_http(one()),
    }, 1)  # fmt: skip
    rows.add("210x160x3 frames, 8 environments", np.zeros(8, np.int64), {
        "in-process": lambda: gymnasium.vector.SyncVectorEnv([world] * 8),
        "ROCK, shared memory": eight, "ROCK, pipes": lambda: by_pipes(eight),
        "AsyncVectorEnv": lambda: gymnasium.vector.AsyncVectorEnv([world] * 8),
    }, 8)  # fmt: skip


def by_pipes(make: Callable[[], Any]) -> Any:
    """Made without shared memory: large answers go through the environment's pipes."""
    os.environ["ROCK_ENV_SHARED"] = "0"
    try:
        return make()
    finally:
        del os.environ["ROCK_ENV_SHARED"]


def over_http(env: Any) -> Any:
    """Without the pipes that a client on the server's machine gets: the way from anywhere else."""
    for pipes in env._player.link.ways.values():
        pipes.close()
    env._player.link.ways.clear()
    return env


def sokoban(rows: Rows, url: str, images: Path | None) -> None:
    name = "game:Sokoban-v0-easy"
    rock.make(name, base_url=url).close()  # installs its packages
    makers: dict[str, Callable[[], Any]] = {}
    if images is not None:
        store = ImageStore(images)
        rootfs = ensure(store, PackageSet(image_of(GEM), SETS[GEM]))
        sys.path.append(str(packages_folder(rootfs) / "site"))
        import gem

        makers["in-process"] = lambda: gem.make(name)
    makers["ROCK"] = lambda: rock.make(name, base_url=url)
    rows.add("GEM Sokoban", "\\boxed{up}", makers)
    rows.calls("rock.make and close, warm", {"ROCK": lambda: rock.make(name, base_url=url).close()})
    with rock.make(name, base_url=url) as env:
        env.reset(seed=1)
        rows.calls("fork of Sokoban and close", {
            "os.fork and wait": bare_fork, "1 child": lambda: fork(env, 1), "16 children": lambda: fork(env, 16),
        })  # fmt: skip


def bare_fork() -> None:
    """This process has imported the same packages, and numpy and Gymnasium."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def fork(env: Any, count: int) -> None:
    for child in env.fork(count):
        child.close()


@contextlib.contextmanager
def rlmesh(folder: str | None) -> Iterator[Callable[[], Any] | None]:
    """What connects to a server of rlmesh with CartPole; None where rlmesh is not installed."""
    if folder is not None:
        sys.path.append(folder)
    try:
        import rlmesh as peer
    except ImportError:
        print("rlmesh is not installed: no figures of it")
        yield None
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    code = ("import sys; sys.path += sys.argv[2:]; import gymnasium, rlmesh;"
            "rlmesh.EnvServer(gymnasium.make('CartPole-v1'), sys.argv[1]).serve()")  # fmt: skip
    server = subprocess.Popen([sys.executable, "-c", code, address, *([folder] if folder else [])])

    def connected() -> Any:
        for _ in range(300):
            try:
                return peer.RemoteEnv(address)
            except ConnectionError:
                time.sleep(0.1)
        return peer.RemoteEnv(address)

    try:
        yield connected
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def own_server() -> Iterator[tuple[str, Path]]:
    """A server on a free port: its address, and where its images are."""
    home = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests") / "bench-home"
    home.mkdir(parents=True, exist_ok=True)
    (home / "server.json").unlink(missing_ok=True)
    server = subprocess.Popen([sys.executable, "-m", "rock.cli.server", "--host", "127.0.0.1", "--port", "0"],
                              env={**os.environ, "ROCK_HOME": str(home)}, stdout=subprocess.DEVNULL)  # fmt: skip
    try:
        for _ in range(600):
            if (home / "server.json").exists() or server.poll() is not None:
                break
            time.sleep(0.1)
        port = json.loads((home / "server.json").read_text())["port"]
        yield f"http://127.0.0.1:{port}", home / "images"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--server", help="its address; without it one is started")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each kind of each row")
    parser.add_argument("--rlmesh", help="a folder that rlmesh is installed in")
    parser.add_argument("--json", help="a file for the figures")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = Rows(given.seconds)
    with contextlib.ExitStack() as stack:
        url, images = (given.server, None) if given.server else stack.enter_context(own_server())
        cartpole(rows, url, stack.enter_context(rlmesh(given.rlmesh)))
        frames(rows, url)
        sokoban(rows, url, images)
    if given.json:
        Path(given.json).write_text(json.dumps(rows.told, indent=1))


if __name__ == "__main__":
    main()
