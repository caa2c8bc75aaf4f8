"""Every task of a training set, solved by what is known to solve it and by an agent that says nothing.

    python bench/training.py SET [SET ..] [--each N] [--data FOLDER] [--split SPLIT]

Needs a running server (ROCK_BASE_URL). --each: at most so many tasks of each set, evenly spread. Prints a row a set,
and fails when a solution does not get 1.0 or nothing gets more than 0.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from rock.errors import EnvironmentRaised, InvalidConfig
from rock.training import TrainingSandbox

NOTHING = {"role": "assistant", "content": ""}
MOST_STEPS = 60
THREADS = 4


@dataclass
class Seen:
    """Of one set: rewards of both agents by task, and seconds of calls."""

    solved: dict[str, float] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    idle: dict[str, float] = field(default_factory=dict)
    creates: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


def play(box: TrainingSandbox, env_type: str, task: str, seen: Seen | None, known: bool) -> float | None:
    """The reward of one episode; None where no solution is known."""
    instance = ""
    try:
        began = time.perf_counter()
        instance = box.create_instance(env_type, task)["info"]["instance_id"]
        if seen is not None:
            seen.creates.append(time.perf_counter() - began)
        messages = box.get_solution(instance) if known else [NOTHING] * MOST_STEPS
        reward = 0.0
        for message in messages:
            began = time.perf_counter()
            done = box.step(instance, message)
            if seen is not None:
                seen.steps.append(time.perf_counter() - began)
            if done["info"].get("failure") == "timeout":
                raise SystemExit(f"{task}: {done['info']}")
            reward = done["reward"]
            if done["is_terminated"]:
                return float(reward)
        return float(box.evaluate(instance, params={"sparse": True}))
    except EnvironmentRaised as error:
        print(f"    {task}: {error}")
        return -1.0
    except InvalidConfig:
        if known:
            return None
        raise
    finally:
        if instance:
            box.release_instance(instance)


def run(env_type: str, each: int | None, data: str | None, split: str) -> bool:
    seen = Seen()
    with TrainingSandbox(box_type=env_type, data=data) as box:
        tasks = box.get_env_profile(env_type, split)
        if each is not None and len(tasks) > each:
            tasks = [tasks[n * len(tasks) // each] for n in range(each)]
        for task in tasks:  # one after the other, for the times
            reward = play(box, env_type, task, seen, known=True)
            if reward is None:
                seen.unknown.append(task)
            else:
                seen.solved[task] = reward
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(lambda task: play(box, env_type, task, None, known=False), tasks)
            seen.idle = {task: float(reward or 0.0) for task, reward in zip(tasks, found, strict=True)}
        rate = creates(box, env_type, tasks)
    wrong = [task for task, reward in seen.solved.items() if reward != 1.0]
    lucky = [task for task, reward in seen.idle.items() if reward > 0]
    steps = sorted(seen.steps) or [0.0]
    print(f"{env_type:15} {len(tasks):5} {len(seen.solved) - len(wrong):6} {len(seen.unknown):8} {len(lucky):5} "
          f"{rate:9.0f} {statistics.median(seen.creates) * 1e3:9.2f} {statistics.median(steps) * 1e3:8.2f} "
          f"{steps[len(steps) * 99 // 100] * 1e3:8.2f}", flush=True)  # fmt: skip
    for name, tasks in (("not solved by its solution", wrong), ("rewards nothing said", lucky)):
        if tasks:
            print(f"    {name}: {', '.join(tasks[:10])}{' ..' * (len(tasks) > 10)}")
    return not wrong and not lucky


def creates(box: TrainingSandbox, env_type: str, tasks: list[str], count: int = 100) -> float:
    """Instances a second, made and released by THREADS clients."""
    def one(number: int) -> None:
        box.release_instance(box.create_instance(env_type, tasks[number % len(tasks)])["info"]["instance_id"])

    with ThreadPoolExecutor(THREADS) as pool:
        began = time.perf_counter()
        list(pool.map(one, range(count)))
        return count / (time.perf_counter() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="SET")
    parser.add_argument("--each", type=int)
    parser.add_argument("--data")
    parser.add_argument("--split", default="train")
    given = parser.parse_args()
    print("set             tasks  solved  no answer  lucky  creates/s  create ms  step p50  step p99", flush=True)
    results = [run(name, given.each, given.data, given.split) for name in given.sets]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
