"""`rock.make`: the client of environments, against a server that answers as the test says."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import orjson
import pytest
from wire_server import Request, Wire, answer, serve

import rock
from rock import errors
from rock.guest.environments import frames, values
from rock.protocol.sandbox import SandboxInfo, State
from rock.sdk.envs import RockEnv


class Game:
    """A server with one environment, whose observation is the number of its steps."""

    def __init__(self, pending: int = 0, breaks_at: int | None = None) -> None:
        self.pending = pending
        self.breaks_at = breaks_at
        self.done: list[int] = []

    def info(self) -> bytes:
        state = State.PENDING if self.pending > 0 else State.RUNNING
        self.pending -= 1
        made = SandboxInfo(sandbox_id="host1", state=state, image="x")
        return bytes(answer(orjson.dumps(made.model_dump(mode="json"))))

    def play(self, op: int, _flags: int, env: int, id: int, index: int, payload: bytes) -> bytes:
        value = values.decode(payload)
        if op == frames.RESET:
            self.done = []
            result: object = ["start", {"seed": value["seed"]}]
        else:
            if index not in self.done:
                self.done.append(index)
            result = [len(self.done), 1, False, True, {}]
        (body,) = values.encode(result)
        return frames.HEAD.pack(len(body), frames.OK, 0, env, id, index) + body

    async def __call__(self, request: Request, writer: asyncio.StreamWriter, wire: Wire) -> bool:
        method, target, _ = request.line.split()
        body = None if target.endswith("/frames") else orjson.loads(request.body or b"null")
        if target.startswith("/v1/envs?") or (method == "GET" and target.startswith("/v1/sandboxes/host1?")):
            writer.write(self.info())
        elif target.endswith("/envs"):
            writer.write(answer(orjson.dumps({"env": 7, "env_id": body["env_id"], "sandbox_id": "host1"})))
        elif target.endswith("/envs/frames"):
            replies = [self.play(*frame) for frame in frames.split(request.body)]
            if self.breaks_at == len(wire.requests):
                return True  # it was done, and the answer is lost
            writer.write(answer(b"".join(replies)))
        else:
            writer.write(answer(b"{}"))
        return False


def test_an_episode() -> None:
    with serve(Game(pending=2)) as wire:
        with rock.make("game:X-v0", base_url=wire.url, size=3) as env:
            assert isinstance(env, RockEnv) and env.unwrapped is env
            assert (env.env_id, env.sandbox_id, env.env_number) == ("game:X-v0", "host1", 7)
            assert env.reset(seed=42) == ("start", {"seed": 42})
            assert env.step("left") == (1, 1.0, False, True, {})
            assert env.step(action="right")[0] == 2
            assert env.reset() == ("start", {"seed": None})
            assert env.step("up")[0] == 1
        env.close()
        with pytest.raises(errors.Conflict, match="closed"):
            env.step("up")
    bodies = [orjson.loads(request.body) for request in wire.requests if request.body[:1] == b"{"]
    steps = [next(frames.split(request.body)) for request in wire.requests if "/frames" in request.line]
    assert bodies[0] == {"env_id": "game:X-v0", "exclusive": False}
    assert bodies[1].pop("owner")
    assert bodies[1] == {"env_id": "game:X-v0", "kwargs": {"size": 3}, "timeout": 300.0}
    assert [index for op, _, _, _, index, _ in steps if op == frames.STEP] == [0, 1, 0]
    assert [request.line for request in wire.requests if "DELETE" in request.line] == [
        "DELETE /v1/sandboxes/host1/envs/7 HTTP/1.1"
    ]


def test_a_step_whose_answer_was_lost_is_done_once() -> None:
    game = Game(breaks_at=5)
    with serve(game) as wire:
        env = rock.make("game:X-v0", base_url=wire.url)
        env.reset(seed=1)
        assert [env.step("up")[0] for _ in range(3)] == [1, 2, 3]
        assert game.done == [0, 1, 2]
        lost, again = wire.requests[4:6]
        assert lost.body == again.body and lost.headers["idempotency-key"] == again.headers["idempotency-key"]
        env.close()


def test_a_sandbox_of_its_own_is_stopped_with_it() -> None:
    with serve(Game()) as wire:
        config = rock.SandboxConfig(base_url=wire.url, memory="1g")
        env = rock.make("game:X-v0", config=config)
        env.close()
        assert orjson.loads(wire.requests[0].body) == {
            "env_id": "game:X-v0", "exclusive": True, "config": {"memory": "1g"},
        }  # fmt: skip
        assert wire.requests[-1].line.startswith("POST /v1/sandboxes/host1/stop ")


def test_errors() -> None:
    async def unknown(request: Request, writer: asyncio.StreamWriter, wire: Wire) -> None:
        writer.write(answer(orjson.dumps(errors.NotFound("Environment x not found").to_wire()), "404 Not Found"))

    with serve(unknown) as wire, pytest.raises(errors.NotFound, match="Environment x"):
        rock.make("x", base_url=wire.url)
    with serve(Game(pending=1_000_000)) as wire, pytest.raises(errors.StartFailed, match="not ready"):
        rock.make("game:X-v0", base_url=wire.url, start_timeout=0.1)
    with pytest.raises(errors.Unavailable, match="rock admin start"):
        rock.make("game:X-v0", base_url="http://127.0.0.1:9")
    with serve(Game()) as wire:
        env = rock.make("game:X-v0", base_url=wire.url)
        with pytest.raises(errors.InvalidConfig, match="cannot be sent"):
            env.step(object())
        env.close()


def test_the_address_is_read_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(Game()) as wire:
        monkeypatch.setenv("ROCK_BASE_URL", wire.url)
        monkeypatch.setenv("ROCK_API_KEY", "secret")
        rock.make("game:X-v0").close()
        assert all(request.headers["authorization"] == "Bearer secret" for request in wire.requests)


def test_many_threads_each_with_its_environment() -> None:
    with serve(Game()) as wire:

        def play(number: int) -> int:
            with rock.make("game:X-v0", base_url=wire.url) as env:
                env.reset(seed=number)
                return sum(isinstance(env.step("up")[0], int) for _ in range(20))

        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(play, range(8))) == [20] * 8
        assert wire.connections <= 8
