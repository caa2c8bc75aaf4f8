"""Steps of environments through the server, next to the same ones in this process and in gymnasium's AsyncVectorEnv.

    python bench/environments.py --server http://127.0.0.1:8080 [--seconds 2] [--gem FOLDER] [--rlmesh]

Every row is measured in this run, one after the other: medians of single steps; steps a second where frames are large.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

import rock
from rock.gym import SandboxEnv, SandboxVectorEnv

FOLDER = Path(__file__).parent / "frames"


def median(env: Any, action: Any, seconds: float) -> float:
    """Microseconds of one step."""
    env.reset(seed=1)
    single = not hasattr(env, "num_envs")
    times: list[float] = []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        result = env.step(action)
        times.append(time.perf_counter() - begin)
        if single and (result[2] or result[3]):
            env.reset()
    return statistics.median(times) * 1e6


def measured(make: Callable[[], Any], action: Any, seconds: float) -> float:
    env = make()
    try:
        median(env, action, seconds / 4)
        return median(env, action, seconds)
    finally:
        env.close()


def cartpole(url: str, seconds: float) -> None:
    name = "CartPole-v1"
    here = measured(lambda: gymnasium.make(name), 0, seconds)
    there = measured(lambda: SandboxEnv(name, base_url=url), 0, seconds)
    print(f"CartPole, 1 env, step p50: in-process {here:.0f} us, ROCK {there:.0f} us")
    for count in (8, 64):
        action = np.zeros(count, np.int64)
        sync = measured(lambda n=count: gymnasium.make_vec(name, n, vectorization_mode="sync"), action, seconds)
        rocks = measured(lambda n=count: SandboxVectorEnv(name, n, base_url=url), action, seconds)
        workers = measured(lambda n=count: gymnasium.make_vec(name, n, vectorization_mode="async"), action, seconds)
        print(f"CartPole, {count} envs, step p50: in-process {sync:.0f} us, ROCK {rocks:.0f} us ({rocks / sync:.1f}x), "
              f"AsyncVectorEnv {workers:.0f} us ({workers / sync:.1f}x)")  # fmt: skip


def frames(url: str, seconds: float) -> None:
    def world() -> Any:
        sys.path.insert(0, str(FOLDER))
        import env

        return env.make_env()

    def steps(make: Callable[[], Any], action: Any, count: int) -> float:
        return count * 1e6 / measured(make, action, seconds)

    def rock_env() -> Any:
        return SandboxEnv(str(FOLDER), trust_remote_code=True, base_url=url)

    def rock_envs() -> Any:
        return SandboxVectorEnv(str(FOLDER), 8, trust_remote_code=True, base_url=url)

    print(f"210x160x3 frames a second, 1 env: in-process {steps(world, 0, 1):,.0f}, ROCK {steps(rock_env, 0, 1):,.0f}")
    action = np.zeros(8, np.int64)
    sync = steps(lambda: gymnasium.vector.SyncVectorEnv([world] * 8), action, 8)
    workers = steps(lambda: gymnasium.vector.AsyncVectorEnv([world] * 8), action, 8)
    print(f"210x160x3 frames a second, 8 envs: in-process {sync:,.0f}, ROCK {steps(rock_envs, action, 8):,.0f}, "
          f"AsyncVectorEnv {workers:,.0f}")  # fmt: skip


def sokoban(url: str, seconds: float, folder: str | None) -> None:
    name, action = "game:Sokoban-v0-easy", "\\boxed{up}"
    told = ""
    if folder is not None:
        sys.path.append(folder)
    try:
        import gem
    except ImportError:
        told = "not measured (--gem names a folder that has gem-llm)"
    else:
        env = gem.make(name)
        told = f"{median(env, action, seconds):.0f} us"
    there = measured(lambda: rock.make(name, base_url=url), action, seconds)
    begin = time.perf_counter()
    rock.make(name, base_url=url).close()
    again = (time.perf_counter() - begin) * 1e3
    print(f"Sokoban, step p50: in-process {told}, ROCK {there:.0f} us; a second make and close {again:.0f} ms")


def _connected(connect: Callable[[], Any]) -> Any:
    for _ in range(300):
        try:
            return connect()
        except ConnectionError:
            time.sleep(0.1)
    return connect()


def rlmesh(seconds: float) -> None:
    try:
        import rlmesh
    except ImportError:
        print("rlmesh is not installed: no figures of it")
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    code = ("import gymnasium, rlmesh, sys;"
            "rlmesh.EnvServer(gymnasium.make('CartPole-v1'), sys.argv[1]).serve()")  # fmt: skip
    server = subprocess.Popen([sys.executable, "-c", code, address])
    try:
        env = _connected(lambda: rlmesh.RemoteEnv(address))
        print(f"CartPole, 1 env, step p50: rlmesh {rlmesh.__version__} {median(env, 0, seconds):.0f} us")
        env.close()
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--server", default="http://127.0.0.1:8080")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each row")
    parser.add_argument("--gem", help="a folder with gem-llm, for the row of GEM in this process")
    parser.add_argument("--rlmesh", action="store_true", help="measure rlmesh too, where it is installed")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    cartpole(given.server, given.seconds)
    frames(given.server, given.seconds)
    sokoban(given.server, given.seconds, given.gem)
    if given.rlmesh:
        rlmesh(given.seconds)


if __name__ == "__main__":
    main()
