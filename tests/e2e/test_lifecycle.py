"""From create to tombstone: keys, deadlines, causes, groups, many at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest
from tests.conftest import IMAGE, RunningServer
from tests.waiting import until

from rock.errors import (
    Conflict,
    Expired,
    ImageError,
    InvalidConfig,
    NotFound,
    RockError,
    StartFailed,
    Unauthorized,
    Unavailable,
    Unsupported,
)
from rock.protocol.sandbox import Cause, State
from rock.sdk.sandbox.client import Sandbox as AsyncSandbox
from rock.sync import Client, Sandbox, SandboxConfig, SandboxGroup, SandboxGroupConfig


def config(server: RunningServer, **fields: object) -> SandboxConfig:
    return SandboxConfig.model_validate(
        {"base_url": server.url, "image": IMAGE, "memory": "256m", "cpus": 1.0, **fields}
    )


def test_a_life(server: RunningServer) -> None:
    sandbox = Sandbox(config(server, labels={"k": "v"}, experiment_id="e1"))
    sandbox.start()
    sandbox.arun("true")
    info = sandbox.info(usage=True)
    assert (info.state, info.is_alive, info.image) == (State.RUNNING, True, IMAGE)
    assert info.isolation is not None and set(info.enforced) >= {"memory", "cpus", "pids"}
    assert info.usage is not None and info.usage.memory_bytes
    assert sandbox.is_alive()
    with Client(server.url) as client:
        assert [i.sandbox_id for i in client.list_sandboxes(states="running", label="k=v")] == [sandbox.sandbox_id]
        assert client.list_sandboxes(experiment_id="other") == []
        sandbox.stop()
        gone = client.get_sandbox(sandbox.sandbox_id)
        assert (gone.state, gone.cause, gone.is_alive) == (State.STOPPED, Cause.USER, False)
        with pytest.raises(Expired, match=r"stopped by its user|it was stopped"):
            sandbox.arun("echo")
        client.delete_sandbox(sandbox.sandbox_id)
        with pytest.raises(NotFound):
            client.get_sandbox(sandbox.sandbox_id)


def test_an_idempotency_key_makes_one_sandbox(server: RunningServer) -> None:
    with Client(server.url) as client:
        body = config(server).model_dump(mode="json")
        made = [client.transport.json("POST", "/v1/sandboxes?wait=20", body, key="key-1") for _ in range(3)]
        assert len({m["sandbox_id"] for m in made}) == 1
        client.stop_sandbox(made[0]["sandbox_id"])


def test_idle_clean_up_is_exact_to_a_second(server: RunningServer) -> None:
    sandbox = Sandbox(config(server, auto_clear_seconds=2))
    sandbox.start()
    for _ in range(4):
        time.sleep(0.8)
        sandbox.arun("true")  # it is in use: not idle
    last = time.time()
    with Client(server.url) as client:
        while client.get_sandbox(sandbox.sandbox_id).state is not State.STOPPED:
            assert time.time() - last < 5
            time.sleep(0.05)
        assert 1.9 <= time.time() - last <= 3.0
        assert client.get_sandbox(sandbox.sandbox_id).cause is Cause.IDLE
    with pytest.raises(Expired, match="idle"):
        sandbox.arun("echo")


def test_a_running_command_is_no_idleness(server: RunningServer) -> None:
    with Sandbox(config(server, auto_clear_seconds=1)) as sandbox:
        assert sandbox.arun("sleep 2.5; echo done").output == "done\n"


def test_a_deadline(server: RunningServer) -> None:
    sandbox = Sandbox(config(server, timeout=1.0))
    sandbox.start()
    began = time.time()
    seen = None
    with pytest.raises(RockError):
        while time.time() - began < 5:
            seen = sandbox.arun("sleep 0.2")
    assert seen is not None and time.time() - began < 3
    with Client(server.url) as client:
        assert client.get_sandbox(sandbox.sandbox_id).cause is Cause.DEADLINE


def test_a_changed_deadline(server: RunningServer, own_server: Callable[..., RunningServer]) -> None:
    with Client(server.url) as client:
        longer, shorter = (Sandbox(config(server, timeout=3.0, auto_clear_seconds=0)) for _ in range(2))
        longer.start()
        shorter.start()
        info = client.update_sandbox(str(longer.sandbox_id), timeout=600)
        assert info.deadline is not None and 590 < info.deadline - time.time() <= 600
        assert abs((longer.info().auto_stop_at or 0) - info.deadline) < 1
        client.update_sandbox(str(shorter.sandbox_id), timeout=0.2)
        until(lambda: client.get_sandbox(str(shorter.sandbox_id)).state is State.STOPPED, 30)
        assert client.get_sandbox(str(shorter.sandbox_id)).cause is Cause.DEADLINE
        with pytest.raises(Conflict, match="it has no deadline"):
            client.update_sandbox(str(shorter.sandbox_id), timeout=5)
        with pytest.raises(InvalidConfig):
            client.update_sandbox(str(longer.sandbox_id), timeout=-1)
        time.sleep(max(0.0, 3.2 - (time.time() - (longer.info().started_at or 0))))
        assert longer.execute("echo here").stdout == "here\n"  # the timeout of its config is over
        assert client.update_sandbox(str(longer.sandbox_id), timeout=None).deadline == 0
        longer.stop()
    restarted = own_server()
    kept = Sandbox(config(restarted))
    kept.start()
    with Client(restarted.url) as client:
        client.update_sandbox(str(kept.sandbox_id), timeout=4)
        restarted.kill()
        restarted.start()
    with Client(restarted.url) as client:
        until(lambda: client.get_sandbox(str(kept.sandbox_id)).cause is Cause.DEADLINE, 30)


def test_a_sandbox_that_dies_under_a_call(server: RunningServer) -> None:
    sandbox = Sandbox(config(server))
    sandbox.start()
    failures: list[BaseException] = []

    def call() -> None:
        try:
            seen = sandbox.arun("sleep 30")
            failures.append(AssertionError(f"a status was made up: {seen}") if seen.exit_code == 0 else Expired("told"))
        except RockError as error:
            failures.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.5)
    with Client(server.url) as client:
        client.stop_sandbox(sandbox.sandbox_id)
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(failures[0], RockError)


def test_a_group(server: RunningServer) -> None:
    group = SandboxGroup(
        SandboxGroupConfig(base_url=server.url, image=IMAGE, memory="128m", size=6, start_concurrency=3)
    )
    group.start()
    try:
        assert len({s.sandbox_id for s in group.sandbox_list}) == 6
        assert [s.output for s in group.arun_all("echo $((6*7))")] == ["42\n"] * 6
    finally:
        group.stop()


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"image": "no/such:image"}, ImageError, "rock image import"),
        ({"cpus": 4096.0}, InvalidConfig, "exceed"),
        ({"memory": "900t"}, InvalidConfig, "exceed"),
        ({"disk": "1g", "auto_delete_seconds": 60}, Unsupported, "disk"),
        ({"network": "nat", "runtime": "process", "image": "host"}, Unsupported, "nat"),
        ({"egress": ["example.com"], "runtime": "process", "image": "host"}, Unsupported, "egress"),
        ({"egress": [], "runtime": "fake"}, Unsupported, "egress"),
        ({"num_gpus": 1.0}, Unsupported, "gpu"),
        ({"minimum_isolation": "microvm"}, Unsupported, "microvm"),
        ({"runtime": "nosuch"}, InvalidConfig, "nosuch"),
        ({"use_kata_runtime": True}, Unsupported, "kata"),
        ({"image_os": "windows"}, Unsupported, "windows"),
    ],
)
def test_what_cannot_be_given_is_refused_before_start(
    server: RunningServer, fields: dict[str, object], error: type[RockError], text: str
) -> None:
    sandbox = Sandbox(config(server, **fields))
    with pytest.raises(error) as caught:
        sandbox.start()
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [{"memory": "abc"}, {"memory": "-1g"}, {"cpus": 0}, {"image": "  "}, {"memroy": "1g"}, {"env": {"a=b": "c"}},
     {"egress": ["http://example.com/"]}, {"egress": ["example.com"], "network": "host"}],
)
def test_bad_config_is_an_error_at_once(server: RunningServer, fields: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        config(server, **fields)


def test_a_duplicate_id(server: RunningServer) -> None:
    with Sandbox(config(server, sandbox_id="mine")) as first, pytest.raises(Conflict, match="already exists"):
        Sandbox(config(server, sandbox_id="mine")).start()
    assert first.sandbox_id == "mine"
    with Client(server.url) as client:
        client.delete_sandbox("mine")


def test_unknown_sandbox(server: RunningServer) -> None:
    with pytest.raises(NotFound):
        Sandbox(config(server)).attach("0123456789")


def test_no_server_says_how_to_start_one() -> None:
    with pytest.raises(Unavailable, match="rock admin start"):
        Sandbox(SandboxConfig(base_url="http://127.0.0.1:9", image=IMAGE)).start()


def test_memory_is_held(server: RunningServer) -> None:
    with Sandbox(config(server, memory="64m")) as sandbox:
        seen = sandbox.arun("python3 -c 'import time; x = bytearray(200 << 20); time.sleep(2); print(len(x))'")
        assert seen.exit_code == 137
        assert sandbox.arun("echo fine").output == "fine\n"
        usage = sandbox.info(usage=True).usage
        assert usage is not None and usage.oom_kills


def test_every_call_in_its_own_loop_and_from_many_threads(server: RunningServer) -> None:
    with Sandbox(config(server)) as sandbox:
        twin = AsyncSandbox(config(server))
        asyncio.run(twin.attach(sandbox.sandbox_id))
        for number in range(5):
            assert asyncio.run(twin.arun(f"echo {number}")).output == f"{number}\n"
        results: list[str] = []

        def work(number: int) -> None:
            results.append(asyncio.run(twin.arun(f"echo {number}")).output)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == sorted(f"{n}\n" for n in range(16))


def test_a_warm_pool_is_claimed_and_refilled(own_server: Callable[..., RunningServer]) -> None:
    server = own_server(ROCK_POOL_SIZE="2")
    for _ in range(6):
        with Sandbox(config(server)) as sandbox:
            assert sandbox.arun("echo ready").output == "ready\n"
            assert sandbox.arun("ls -A /tmp | wc -l").output == "0\n"


def test_200_alive_at_once(own_server: Callable[..., RunningServer]) -> None:
    server = own_server()
    fields = {"size": 200, "start_concurrency": 8, "memory": "64m", "base_url": server.url, "image": IMAGE}
    group = SandboxGroup(SandboxGroupConfig.model_validate(fields))
    group.start()
    seen = group.arun_all("readlink /proc/self/ns/pid")
    assert len(seen) == 200 and all(s.exit_code == 0 for s in seen)
    assert len({s.output for s in seen}) == 200
    group.stop()


def test_a_key_is_asked_for(own_server: Callable[..., RunningServer]) -> None:
    server = own_server(ROCK_API_KEY="open sesame")
    server.environment["ROCK_API_KEY"] = "open sesame"
    for key in (None, "wrong"):
        with pytest.raises(Unauthorized), Client(server.url, key) as client:
            client.server_info()
        with pytest.raises(Unauthorized):
            Sandbox(config(server, api_key=key)).start()
    with Sandbox(config(server, api_key="open sesame")) as sandbox:
        assert sandbox.arun("echo in").output == "in\n"
        sandbox.stop()


def test_a_failed_start_is_told(server: RunningServer) -> None:
    with pytest.raises((StartFailed, InvalidConfig)):
        Sandbox(config(server, env={"PATH": ""}, startup_timeout=0.000001)).start()
