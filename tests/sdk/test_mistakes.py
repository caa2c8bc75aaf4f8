"""What a user sees after a mistake: a RockError with what happened, why, and what to do."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import RunningServer

import rock
from rock import errors
from rock.images.store import ImageStore
from rock.protocol.action import CommandResponse
from rock.sync import Client, Sandbox, SandboxConfig, SandboxGroup

ANY: Any = None


@pytest.fixture
def box(server: RunningServer) -> Iterator[Sandbox]:
    with Sandbox("host", memory="256m", cpus=1.0, base_url=server.url) as made:
        yield made


def raised(call: Callable[[], object], kind: type[errors.RockError]) -> str:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "pydantic" not in text and "\n" not in text
    return text


OPTIONS = [
    ({"memory": "2x"}, "memory: Invalid memory size: 2x", "'512m' or '8g'"),
    ({"memory": 512}, "memory: Invalid memory size: 512 (a sandbox needs at least 8m)", "write '512m' for 512 MiB"),
    ({"memmory": "2g"}, "Sandbox has no option 'memmory'", "did you mean 'memory'?"),
    ({"imag": "x"}, "Sandbox has no option 'imag'", "did you mean 'image'?"),
    ({"auto_clear_seconds": 5}, "Sandbox has no option 'auto_clear_seconds'", "its name is 'idle_timeout'"),
    ({"timeout": 5}, "Sandbox has no option 'timeout'", "'max_lifetime'"),
    ({"idle_timeout": -1}, "idle_timeout: it must be greater than or equal to 0, not -1", ""),
    ({"isolation": "userms"}, "not 'userms'", "did you mean 'userns'?"),
    ({"isolation": "userms"}, "'none', 'landlock', 'userns-shared-proc', 'userns', 'namespaces'", ""),
    ({"cpus": "many"}, "cpus: it must be a valid number", "not 'many'"),
    ({"env": {"A": 1}}, "env.A", "valid string"),
    ({"retain": 5, "archive_after": 5}, "exclude each other", ""),
    ({"base_url": "127.0.0.1:8080"}, "'127.0.0.1:8080' is not a URL like http://host:8080", ""),
]


@pytest.mark.parametrize(("options", "what", "hint"), OPTIONS)
@pytest.mark.parametrize("kind", [Sandbox, rock.Sandbox])
def test_options(kind: Any, options: dict[str, Any], what: str, hint: str) -> None:
    text = raised(lambda: kind("host", **options), errors.InvalidConfig)
    assert what in text and hint in text


def test_an_int_is_a_size_in_bytes() -> None:
    assert Sandbox("host", memory=512 << 20, disk=1 << 30).config.memory_bytes == 512 << 20


def test_a_config_that_is_built_directly() -> None:
    text = raised(lambda: SandboxConfig(memory="2x"), errors.InvalidConfig)
    assert text.startswith("memory: Invalid") and "'512m' or '8g'" in text
    assert "did you mean 'memory'?" in raised(lambda: SandboxConfig(memry="2g"), errors.InvalidConfig)  # type: ignore
    assert "'512m' for 512 MiB" in raised(lambda: SandboxConfig(memory=512), errors.InvalidConfig)  # type: ignore
    with pytest.raises(ValueError, match="memory"):  # as pydantic's own error, which older code catches
        SandboxConfig(memory="2x")
    config = SandboxConfig()
    assert "Invalid memory size" in raised(lambda: setattr(config, "memory", "2x"), errors.InvalidConfig)
    secret = raised(lambda: SandboxConfig(registry_password=["hunter2"]), errors.InvalidConfig)  # type: ignore
    assert "hunter2" not in secret


def test_ways_to_name_the_image() -> None:
    config = SandboxConfig(image="a:1")
    for made in (Sandbox("a:1"), Sandbox(image="a:1"), Sandbox(config), Sandbox(config=config)):
        assert made.config.image == "a:1"
    assert SandboxGroup("a:1", size=3).config.size == 3
    assert "config and options" in raised(lambda: Sandbox(config, memory="1g"), errors.InvalidConfig)
    assert 'Sandbox("python:3.11")' in raised(lambda: Sandbox(ANY or 5), errors.InvalidConfig)


def _unused() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_no_server() -> None:
    text = raised(Sandbox("host", base_url=f"http://127.0.0.1:{_unused()}").start, errors.Unavailable)
    assert "no ROCK server at" in text and "rock admin start" in text


def test_an_unknown_host() -> None:
    client = Client("http://no-such-host.invalid:8080", reconnect_timeout=0)
    text = raised(client.server_info, errors.Unavailable)
    assert "cannot reach" in text and "check the host name" in text and "rock admin start" not in text


def test_tls_to_a_plain_server(server: RunningServer) -> None:
    client = Client(server.url.replace("http:", "https:"), reconnect_timeout=0)
    text = raised(client.server_info, errors.Unavailable)
    assert "does not use TLS" in text and "use http://" in text


def start(server: RunningServer, image: str = "host", **options: Any) -> None:
    with Sandbox(image, base_url=server.url, **options):
        raise AssertionError("it started")


@pytest.mark.parametrize(("options", "kind", "texts"), [
    ({"memory": "900g"}, errors.InvalidConfig, ("memory 900g exceeds the largest machine's", "request less memory")),
    ({"cpus": 64}, errors.InvalidConfig, ("CPUs 64.0 exceed the maximum allowed", "request fewer CPUs")),
    ({"gpus": 1}, errors.Unsupported, ("no worker has 1 GPU", "leave gpus and gpu_type unset")),
    ({"image": "Big Name"}, errors.InvalidConfig, ("invalid image name 'Big Name'", "lower-case letters")),
])  # fmt: skip
def test_what_no_worker_has(
    server: RunningServer, options: dict[str, Any], kind: type[errors.RockError], texts: tuple[str, ...]
) -> None:
    text = raised(lambda: start(server, **options), kind)
    assert all(one in text for one in texts), text


def test_an_image_with_a_typo_and_no_network(server: RunningServer) -> None:
    with pytest.raises(errors.ImageError) as caught:
        start(server, image="localhost:9/pythn:3.11")
    assert "registry localhost:9 cannot be reached: " in caught.value.message
    assert "Connection(" not in str(caught.value), "no text of a library"
    local = Sandbox("host", base_url=server.url)
    with local:
        local.commit("localhost:9/python:3.11")
    try:
        text = raised(lambda: start(server, image="localhost:9/pythn:3.11"), errors.ImageError)
        assert "did you mean localhost:9/python:3.11" in text
    finally:
        ImageStore(server.home / "images").remove("localhost:9/python:3.11")


@pytest.mark.skipif(Path("/var/run/docker.sock").exists(), reason="a container engine runs on this machine")
def test_no_container_engine(server: RunningServer) -> None:
    for _ in range(3):  # after some failures the circuit breaker answers, and states the same cause
        with pytest.raises((errors.Unavailable, errors.NoCapacity)) as caught:
            start(server, runtime="docker")
        assert "no container engine listens on" in caught.value.message and caught.value.hint


def test_a_missing_program(box: Sandbox) -> None:
    assert "install it in the image" in raised(lambda: box.exec(["nosuch"]), errors.NotFound)


def test_a_restart_without_files(server: RunningServer) -> None:
    box = Sandbox("host", base_url=server.url)
    box.start()
    box.stop()
    assert "retain or archive_after" in raised(box.restart, errors.Conflict)


def test_an_unknown_environment(server: RunningServer) -> None:
    import rock.envs

    text = raised(lambda: rock.envs.make("game:Sokoban-v9", base_url=server.url), errors.NotFound)
    assert "did you mean game:Sokoban-v0" in text


def test_a_sandbox_that_was_not_started() -> None:
    assert "call start()" in raised(lambda: Sandbox("host").run("true"), errors.InvalidConfig)
    text = raised(lambda: Sandbox(sandbox_id="x").run("true"), errors.InvalidConfig)
    assert "Sandbox.connect('x')" in text


def test_sessions(box: Sandbox) -> None:
    text = raised(lambda: box.run("true", session="missing"), errors.NotFound)
    assert "missing" in text and "create_session" in text
    box.sessions.create("twice")
    raised(lambda: box.sessions.create("twice"), errors.Conflict)


def test_call_options(box: Sandbox) -> None:
    wrong: Any = box
    assert "did you mean 'cwd'" in raised(lambda: wrong.exec("true", cwdd="/"), errors.InvalidConfig)
    assert "did you mean 'timeout'" in raised(lambda: wrong.exec("true", tiemout=1), errors.InvalidConfig)
    assert "did you mean 'separate'" in raised(lambda: wrong.run("true", seperate=True), errors.InvalidConfig)
    assert "check is 'foo'" in raised(lambda: wrong.arun("true", check="foo"), errors.InvalidConfig)
    assert "check is 'raise'" in raised(lambda: wrong.run("true", check="raise"), errors.InvalidConfig)
    assert "wait(timeout)" in raised(lambda: wrong.processes.start("true", timeout=1), errors.InvalidConfig)
    assert "stdin is a int" in raised(lambda: wrong.exec("cat", stdin=5), errors.InvalidConfig)
    assert "no such program" in raised(lambda: box.exec(["no-such-program"]), errors.NotFound)


def test_files(box: Sandbox, tmp_path: Path) -> None:
    assert "folder" in raised(lambda: box.files.read("/tmp"), errors.InvalidConfig)
    (tmp_path / "one").write_text("text")
    box.files.upload(tmp_path / "one", "/tmp/copied")
    assert box.files.read("/tmp/copied") == b"text"
    box.files.download("/tmp/copied", tmp_path / "back")
    assert (tmp_path / "back").read_text() == "text"


def test_a_file_without_permission(box: Sandbox) -> None:
    assert "read-only" in raised(lambda: box.files.write("/sys/rock", b"x"), errors.PermissionDenied)
    assert errors.PermissionDenied.status == 403
    box.exec("mkdir -m 700 /tmp/mine && touch /tmp/program", check=True)
    assert "/tmp/program" in raised(lambda: box.exec(["/tmp/program"]), errors.PermissionDenied)
    if box.exec("id -u nobody").exit_code == 0 and box.info().isolation == "namespaces":
        raised(lambda: box.files.write("/tmp/mine/x", b"x", user="nobody"), errors.PermissionDenied)


def test_timeouts_are_timeout_errors(box: Sandbox) -> None:
    with pytest.raises(TimeoutError):
        box.exec("sleep 60", timeout=0.2, check=True)
    with pytest.raises(TimeoutError) as caught:
        box.run("sleep 60", timeout=0.2, check=True)
    assert isinstance(caught.value, errors.CommandTimeout)


def test_a_kill_for_memory_has_a_reason(box: Sandbox) -> None:
    if box.info().enforced.get("memory") not in ("cgroup-v1", "cgroup-v2"):
        pytest.skip("this host has no memory cgroup for the sandbox")
    hog = "python3 -c 'x = bytearray(1 << 30)'"
    result = box.exec(hog)
    assert result.exit_code == 137 and "memory limit of 256m was exceeded" in result.failure_reason
    seen = box.run(hog)
    assert seen.exit_code == 137 and "memory limit of 256m was exceeded" in seen.failure_reason
    import time

    time.sleep(1.1)
    assert "memory" not in box.run("sh -c 'kill -9 $$'").failure_reason


def test_a_stopped_sandbox(server: RunningServer) -> None:
    made = Sandbox("host", memory="256m", cpus=1.0, base_url=server.url)
    made.start()
    made.stop()
    text = raised(lambda: made.run("true"), errors.SandboxStopped)
    assert "stopped by its user" in text and errors.Expired is errors.SandboxStopped


def test_connect_and_list(box: Sandbox, server: RunningServer) -> None:
    same = Sandbox.connect(str(box.sandbox_id), base_url=server.url)
    assert same.run("echo here").output == "here\n" and same.sandbox_id == box.sandbox_id
    assert same.usage().memory_bytes
    raised(lambda: Sandbox.connect("no-such", base_url=server.url), errors.NotFound)
    with Sandbox("host", memory="256m", labels={"a": "1", "b": "2"}, base_url=server.url) as other:
        found = Sandbox.list(labels={"a": "1", "b": "2"}, states=["running"], base_url=server.url)
        assert [info.sandbox_id for info in found] == [other.sandbox_id]
        assert Sandbox.list(labels={"a": "1", "b": "3"}, base_url=server.url) == []


def test_the_asynchronous_class_in_blocking_code() -> None:
    def plain() -> None:
        made: Any = rock.Sandbox("host")
        with made:
            pass

    assert "from rock.sync import Sandbox" in raised(plain, errors.InvalidConfig)
    with pytest.raises(TypeError):
        plain()

    async def forgotten() -> str:
        result: Any = rock.Sandbox("host").run("true")
        try:
            return str(result.output)
        finally:
            result.close()

    assert "write `await`" in raised(lambda: asyncio.run(forgotten()), errors.InvalidConfig)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        rock.Sandbox("host").start()  # type: ignore[unused-coroutine]
    assert any("never awaited" in str(one.message) for one in seen)


def test_packages_that_are_missing() -> None:
    text = (
        "import sys; sys.modules['numpy'] = None\n"
        "import rock\n"
        "for name in ('make_vec', 'register_gem'):\n"
        "    try: getattr(rock, name)\n"
        "    except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.count("pip install 'rock-sandbox[gym]'") == 2, done


def test_python_m_rock() -> None:
    done = subprocess.run([sys.executable, "-m", "rock", "--help"], capture_output=True, text=True, check=True)
    assert "Usage: rock" in done.stdout


def test_notebooks_show_text_that_is_escaped(box: Sandbox) -> None:
    hostile = "<script>alert(1)</script>"
    assert "<script>" not in CommandResponse(stdout=hostile, stderr=hostile)._repr_html_()
    result = box.run(f"echo '{hostile}'")
    assert "&lt;script&gt;" in result._repr_html_() and "<script>" not in result._repr_html_()
    assert str(box.sandbox_id) in box._repr_html_() and "running" in box.info()._repr_html_()
    assert "<script>" not in Sandbox(hostile)._repr_html_()


def test_calls_are_coroutines_for_every_use(server: RunningServer) -> None:
    sandbox = rock.Sandbox("host", memory="256m", cpus=1.0, base_url=server.url)
    asyncio.run(sandbox.start())
    assert asyncio.run(sandbox.run("echo 1")).output == "1\n"

    async def main() -> list[str]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(sandbox.exec(["echo", str(number)])) for number in range(3)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sandbox.exec("sleep 60"), 0.3)
        gathered = await asyncio.gather(sandbox.run("echo 3"), sandbox.exec("echo 4"))
        return [task.result().stdout.strip() for task in tasks] + [one.stdout.strip() for one in gathered]

    assert asyncio.run(main()) == ["0", "1", "2", "3", "4"]
    asyncio.run(sandbox.delete())
