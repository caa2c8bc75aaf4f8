"""Steps of many environments that threads of one trainer play at once, and how evenly they are shared.

    python bench/fairness.py [--count 300] [--seconds 10] [--id game:GuessTheNumber-v0-easy]

Uses the server of ROCK_BASE_URL. Prints how long making them took, in how many sandboxes they are, and the steps that
single environments made: the target is a slowest and a fastest one within a factor of 3 of the median.
"""

from __future__ import annotations

import argparse
import threading
import time

import rock


def at_once(count: int, work: object) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--id", default="game:GuessTheNumber-v0-easy")
    asked = parser.parse_args()
    envs: dict[int, rock.RockEnv] = {}

    def make(number: int) -> None:
        env = rock.make(asked.id)
        env.reset(seed=number)
        envs[number] = env

    began = time.monotonic()
    at_once(asked.count, make)
    took = time.monotonic() - began
    pipes = sum(bool(env.player.link.ways) for env in envs.values())
    print(f"{len(envs)} of {asked.count} made in {took:.1f} s, in {len({env.sandbox_id for env in envs.values()})} "
          f"sandboxes, {pipes} with pipes")  # fmt: skip
    steps = dict.fromkeys(envs, 0)
    end = time.monotonic() + asked.seconds

    def play(number: int) -> None:
        env = envs[number]
        while time.monotonic() < end:
            if env.step(f"\\boxed{{{steps[number] % 10}}}")[2]:
                env.reset()
            steps[number] += 1

    at_once(len(envs), play)
    found = sorted(steps.values())
    middle = max(1, found[len(found) // 2])
    print(f"{sum(found) / asked.seconds:,.0f} steps/s; of one: min {found[0]}, p50 {middle}, max {found[-1]}: "
          f"{found[0] / middle:.2f}x to {found[-1] / middle:.2f}x the median")  # fmt: skip
    for env in envs.values():
        env.close()


if __name__ == "__main__":
    main()
