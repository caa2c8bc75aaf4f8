"""The docker runtime over a real engine: any image, few rights, nobody in pid 1's place, nothing left."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rock import errors
from rock.protocol.sandbox import Isolation, SandboxConfig
from rock.runtime.base import Liveness, Program
from rock.runtime.docker.engine import Engine
from rock.runtime.docker.runtime import DockerRuntime
from tests.image import registries
from tests.runtime.boxes import Box, read_all, run
from tests.runtime.docker import engines
from tests.runtime.docker.engines import TestEngine

HAND = "rock-test/hand:1"


def config(image: str = HAND, **values: Any) -> SandboxConfig:
    return SandboxConfig(**{"image": image, "memory": "256m", "cpus": 1, "pids": 256, "runtime": "docker",
                            "pull": "never", **values})  # fmt: skip


@asynccontextmanager
async def opened(engine: TestEngine, folder: Path) -> AsyncIterator[DockerRuntime]:
    runtime = DockerRuntime(folder / "run", engines.guest_python(), engine.host)
    await runtime.open()
    try:
        yield runtime
    finally:
        await runtime.close()


@asynccontextmanager
async def docker_box(engine: TestEngine, folder: Path, image: str = HAND, **values: Any) -> AsyncIterator[Box]:
    async with opened(engine, folder) as runtime:
        handle = await runtime.create("box", config(image, **values))
        box = Box(runtime, handle, Path("/work"), "/usr/bin/python3")
        try:
            yield box
        finally:
            box.close()
            await runtime.destroy(handle)
    assert engine.containers(rock__sandbox="box") == []


# ---- images ----


def test_an_image_without_a_c_library(engine: TestEngine, tmp_path: Path) -> None:
    async def main() -> None:
        async with docker_box(engine, tmp_path, "rock-test/busybox:1") as b:
            status, out, _ = await b.run("sh", "-c", "ls -d /lib /usr; id -u; exit 3", env={})
            assert (status.code, out) == (3, b"0\n")
            with pytest.raises(errors.PermissionDenied):  # /work is root's
                await b.runtime.open_write(b.handle, "/work/new", user="alice")
            fd, token = await b.runtime.open_write(b.handle, "/tmp/new", user="alice")
            os.close(fd)
            await b.runtime.commit_write(b.handle, token)
            assert (await b.runtime.stat(b.handle, "/tmp/new")).uid == 1000

    run(main())


def test_an_image_of_one_static_program(engine: TestEngine, tmp_path: Path) -> None:
    """As distroless ones are: no shell, no libraries, no users, no folders but what the engine makes."""
    static = next(path for path in (engines.programs() / "bin/busybox", engines.programs() / "usr/bin/busybox")
                  if path.exists())
    engine.make_image("rock-test/one:1", engines.packed({"echo": static}), "USER 65532")

    async def main() -> None:
        async with docker_box(engine, tmp_path, "rock-test/one:1") as b:
            status, out, _ = await b.run("/echo", "alone", env={})
            assert (status.code, out) == (0, b"alone\n")
            with pytest.raises(errors.NotFound, match="sh"):
                await b.run("sh")
            fd, token = await b.runtime.open_write(b.handle, "/data/x")
            os.write(fd, b"data")
            os.close(fd)
            await b.runtime.commit_write(b.handle, token)
            assert (await b.runtime.stat(b.handle, "/data/x")).size == 4
            assert [found.name for found in await b.runtime.list(b.handle, "/data")] == ["x"]

    run(main())


_MUSL = """
int write(int, const void *, unsigned long); void _exit(int);
char *getenv(const char *); unsigned long strlen(const char *);
void _start(void) { char *text = getenv("SAID"); write(1, text, strlen(text)); _exit(4); }
"""


def test_an_image_of_another_c_library(engine: TestEngine, tmp_path: Path) -> None:
    libc = next(engines.programs().glob("lib/*-linux-musl/libc.so"), None) \
        or next(engines.programs().glob("usr/lib/*-linux-musl/libc.so"))
    if shutil.which("gcc") is None:
        pytest.skip("no compiler here, to link a program with musl")
    (tmp_path / "said.c").write_text(_MUSL)
    loader = f"/lib/ld-musl-{os.uname().machine}.so.1"
    command = ["gcc", "-nostdlib", "-nostartfiles", "-fno-stack-protector", "-fPIE", "-pie", tmp_path / "said.c"]
    subprocess.run([*command, f"-L{libc.parent}", "-l:libc.so", f"-Wl,-dynamic-linker,{loader}", "-o",
                    tmp_path / "said"], check=True)  # fmt: skip
    files: dict[str, bytes | Path | str] = {"said": tmp_path / "said", loader[1:]: libc, "lib/libc.so": "-> " + loader}
    engine.make_image("rock-test/musl:1", engines.packed(files), "ENV SAID=musl", "ENV LD_PRELOAD=/nothing.so",
                      "ENV PYTHONHOME=/nowhere")

    async def main() -> None:
        async with docker_box(engine, tmp_path, "rock-test/musl:1") as b:
            status, out, _ = await b.run("/said", env={"LD_PRELOAD": ""})
            assert (status.code, out) == (4, b"musl")

    run(main())


def test_what_an_image_says_of_itself_is_no_program_of_ours(engine: TestEngine, tmp_path: Path) -> None:
    engine.make_image("rock-test/odd:1", engines.hand_made(), "ENTRYPOINT [\"/bin/false\"]", "CMD [\"x\"]",
                      "WORKDIR /made/by/engine", "USER alice", "HEALTHCHECK CMD touch /checked", "VOLUME /data",
                      "ENV PATH=/usr/bin:/bin")

    async def main() -> None:
        async with docker_box(engine, tmp_path, "rock-test/odd:1") as b:
            assert (await b.sh("id -un; pwd; ls -d /checked 2>&1", env={})).split("\n")[:2] == \
                ["alice", "/made/by/engine"]

    run(main())
    assert json.loads(engine.ask("GET", "/volumes")[1])["Volumes"] in (None, [])


# ---- isolation ----


def test_rights_are_few(engine: TestEngine, tmp_path: Path) -> None:
    async def main() -> None:
        async with docker_box(engine, tmp_path) as b:
            lines = (await b.sh("cat /proc/self/status")).splitlines()
            status = dict(line.split(":\t") for line in lines if ":\t" in line)
            assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
            kept = sum(1 << number for number in (0, 1, 3, 4, 5, 6, 7, 10, 18))
            for name in ("CapBnd", "CapEff", "CapPrm"):
                assert int(status[name], 16) == kept
            told = engine.json(f"/containers/{b.handle.data['container']}/json")["HostConfig"]
            assert told["Privileged"] is False and told["CapDrop"] == ["ALL"] and told["NetworkMode"] == "none"
            assert (told["Memory"], told["MemorySwap"], told["NanoCpus"], told["PidsLimit"]) == \
                (256 << 20, 256 << 20, 10**9, 256)
            out = await b.python(
                "import os, ctypes\n"
                "libc = ctypes.CDLL(None)\n"
                "for flags in (0x10000000, 0x20000, 0x40000000): print(libc.unshare(flags))\n"
                "print(libc.mount(b'x', b'/work', b'tmpfs', 0, None), libc.mknod(b'/work/x', 0o60666, 0x800))\n"
                "for name in ('environ', 'mem', 'fd/3', 'root/etc/passwd'):\n"
                "  try: open('/proc/1/' + name, 'rb').read(1); print('open', name)\n"
                "  except PermissionError: print('no')\n")
            assert out.split() == ["-1"] * 5 + ["no"] * 4, out

    run(main())


def test_nothing_of_ours_can_be_changed_from_inside(engine: TestEngine, tmp_path: Path) -> None:
    async def main() -> None:
        async with docker_box(engine, tmp_path) as b:
            for place in ("/.rock/x", "/.rock/link/x", "/.rock/boot.py", "/.rock/modules/rock/guest/init/pid1.py"):
                assert "ead-only" in await b.sh(f"echo 1 > {place}")
            assert "ead-only" in await b.sh("rm -f /.rock/ld.so")
            assert await b.sh("ls -A /.rock/link") == ""
            assert str(tmp_path) not in await b.sh("env; cat /proc/1/cmdline")

    run(main())


def test_nobody_takes_the_place_of_pid_1(engine: TestEngine, tmp_path: Path) -> None:
    """While a server looks for its sandbox, everybody inside can see its socket."""
    pose = ("import socket, time\n"
            "while True:\n"
            "  s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
            "  try:\n"
            "    s.connect('/.rock/link/s'); s.send(b'{\"id\": 1, \"ok\": true, \"pid\": 1, \"programs\": []}')\n"
            "    open('/work/connected', 'w').close()\n"
            "  except OSError: time.sleep(0.001)\n")

    async def main() -> None:
        async with opened(engine, tmp_path) as runtime:
            handle = await runtime.create("box", config())
            for user in ("root", "alice"):
                await runtime.spawn(handle, Program(["python3", "-c", pose], user=user, stdout="null", stderr="null"))
        async with opened(engine, tmp_path) as runtime:
            await asyncio.sleep(1)
            assert await runtime.recover(handle) is Liveness.RUNNING
            b = Box(runtime, handle, Path("/work"))
            assert await b.sh("echo true; ls /work") in ("true\n", "true\nconnected\n")
            await runtime.destroy(handle)

    run(main())


def test_open_files_and_shared_memory(engine: TestEngine, tmp_path: Path) -> None:
    look = ("import os, resource\nfound = os.statvfs('/dev/shm')\n"
            "print(*resource.getrlimit(resource.RLIMIT_NOFILE), found.f_blocks * found.f_frsize)")

    async def main() -> None:
        async with docker_box(engine, tmp_path, nofile=100, shm_size="8m") as b:
            assert (await b.python(look)).split() == ["100", "100", str(8 << 20)]
            assert b.handle.enforced["nofile"] == "rlimit" and b.handle.enforced["shm_size"] == "tmpfs"

    run(main())


# ---- what is refused ----


def test_what_the_engine_cannot_give_is_refused(engine: TestEngine, tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(engine, tmp_path) as runtime:
            for values, words in (
                ({"oci_runtime": "kata"}, "no kata"), ({"use_kata_runtime": True}, "no kata"),
                ({"disk": "1g"}, "disk"), ({"network": "nat"}, "private"),
                ({"network": "bridge"}, "has none"), ({"num_gpus": 1}, "accelerators"),
                ({"image": "host"}, "own system"), ({"minimum_isolation": Isolation.MICROVM}, "microvm"),
                ({"isolation": Isolation.GVISOR}, "runc gives container"),
                ({"isolation": Isolation.NAMESPACES}, "runc gives container"),
                ({"disk": "1g", "inodes": 1000}, "disk|inodes"), ({"nofile": 1 << 20}, "nofile"),
            ):  # fmt: skip
                with pytest.raises(errors.Unsupported, match=words) as caught:
                    await runtime.check(config(**values))
                assert caught.value.hint
            with pytest.raises(errors.InvalidConfig, match="exclude"):
                await runtime.check(config(use_kata_runtime=True, oci_runtime="runc"))
            with pytest.raises(errors.ImageError, match="never"):
                await runtime.create("x", config("no/such:image"))
        assert engine.containers(rock__sandbox="x") == []

    run(main())


def test_no_engine_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        for host, kind, words in (
            (f"unix://{tmp_path}/none", errors.Unavailable, "no container engine"),
            ("tcp://10.0.0.1:2375", errors.Unsupported, "not on this machine"),
        ):  # fmt: skip
            runtime = DockerRuntime(tmp_path / "run", tmp_path / "python", host)
            await runtime.open()
            with pytest.raises(kind, match=words) as caught:
                await runtime.check(config())
            assert caught.value.hint
            assert await runtime.sweep([]) == []
            await runtime.close()

    run(main(), 30)


# ---- what is left ----


def test_foreign_containers_are_not_touched(engine: TestEngine, tmp_path: Path) -> None:
    def foreign(name: str, **labels: str) -> str:
        body = json.dumps({"Image": "rock-test/busybox:1", "Cmd": ["sleep", "1000"], "Labels": labels,
                           "HostConfig": {"NetworkMode": "none"}}).encode()  # fmt: skip
        kind = {"Content-Type": "application/json"}
        status, answer = engine.ask("POST", f"/containers/create?name={name}", body, **kind)
        assert status == 201, answer
        return str(json.loads(answer)["Id"])

    async def main() -> None:
        others = [foreign("plain"), foreign("other-home", **{"rock.home": "0" * 16, "rock.sandbox": "lost"})]
        try:
            async with opened(engine, tmp_path) as runtime:
                made = [await runtime.create(name, config("rock-test/busybox:1")) for name in ("known", "lost")]
            shutil.rmtree(tmp_path / "run" / made[1].data["slot"])  # not even its folder is there
            async with opened(engine, tmp_path) as runtime:
                assert await runtime.sweep(["known"]) == ["lost"]
                assert await runtime.recover(made[0]) is Liveness.RUNNING
                assert await runtime.recover(made[1]) is Liveness.GONE
                there = {container["Id"] for container in engine.containers()}
                assert there == {*others, made[0].data["container"]}
                assert await runtime.sweep([]) == ["known"]
            assert {container["Id"] for container in engine.containers()} == set(others)
        finally:
            for id in others:
                engine.ask("DELETE", f"/containers/{id}?force=1")

    run(main())


def test_the_end_of_a_container_is_told_with_its_cause(engine: TestEngine, tmp_path: Path) -> None:
    async def main() -> None:
        async with docker_box(engine, tmp_path) as b:
            waiting = asyncio.create_task(b.runtime.wait(b.handle))
            await b.sh("true")
            engine.ask("POST", f"/containers/{b.handle.data['container']}/kill")
            assert await waiting == "exited: its container ended with status 137"
        async with docker_box(engine, tmp_path) as b:
            waiting = asyncio.create_task(b.runtime.wait(b.handle))
            engine.ask("DELETE", f"/containers/{b.handle.data['container']}?force=1")
            ended = "exited: its container ended with status 137"
            assert await waiting in ("its container was removed from outside", ended)

    run(main())


# ---- registries ----


def test_pull_policies_logins_and_progress(engine: TestEngine, tmp_path: Path) -> None:
    said: list[str] = []
    with registries.docker_registry(tmp_path, login=True) as address:
        name = f"{address}/team/tool:1"
        layer = engines.busybox()
        registries.push(name, [layer], tmp_path, registries.USER, Env=["A=1"])
        user = {"registry_username": registries.USER.username, "registry_password": registries.USER.password}

        async def main() -> None:
            async with opened(engine, tmp_path / "home") as runtime:
                with pytest.raises(errors.ImageError, match="never"):
                    await runtime.create("x", config(name))
                missing = config(name, pull="missing", **user)
                assert not await runtime.has_image(missing)
                with pytest.raises(errors.ImageError) as caught:
                    await runtime.prepare_image(config(name, pull="missing"), said.append)
                assert "registry_username" in (caught.value.hint or "")
                wrong = {**user, "registry_password": "wrong"}
                with pytest.raises(errors.ImageError):
                    await runtime.prepare_image(config(name, pull="missing", **wrong), said.append)
                said.clear()
                await runtime.prepare_image(missing, said.append)
                assert any("1 of 1 layers" in text for text in said), said
                assert await runtime.has_image(missing)
                first = (await runtime.engine.image(name) or {})["Id"]
                registries.push(name, [layer, engines.packed({"etc/second": b"2"})], tmp_path, registries.USER)
                await runtime.prepare_image(missing, said.append)
                assert (await runtime.engine.image(name) or {})["Id"] == first
                always = config(name, pull="always", **user)
                assert not await runtime.has_image(always)
                await runtime.prepare_image(always, said.append)
                assert (await runtime.engine.image(name) or {})["Id"] != first
                handle = await runtime.create("x", missing)
                assert (await runtime.stat(handle, "/etc/second")).size == 1
                await runtime.destroy(handle)
                absent = f"{address}/team/none:1"
                with pytest.raises(errors.ImageError):
                    await runtime.prepare_image(config(absent, pull="missing", **user), said.append)

        run(main())


# ---- an engine that is not well ----


def test_an_engine_that_hangs_is_left_alone(engine: TestEngine) -> None:
    async def main() -> None:
        client = Engine(engine.host, patience=0.3)
        await client.facts()
        clock = [time.monotonic()]
        client.breaker._clock = lambda: clock[0]
        assert engine.process is not None
        os.kill(engines.pid(), 19)
        try:
            with pytest.raises(errors.Unavailable, match="in time"):
                await client.facts(anew=True)
            with pytest.raises(errors.RockError):
                await asyncio.gather(*(client.list("a=b") for _ in range(8)))
            started = time.monotonic()
            with pytest.raises(errors.NoCapacity, match="times in a row") as caught:
                await client.list("a=b")
            assert time.monotonic() - started < 2 and "try again" in (caught.value.hint or "")
        finally:
            os.kill(engines.pid(), 18)
        with pytest.raises(errors.NoCapacity):
            await client.list("a=b")
        clock[0] += 100
        client._patience = 30
        assert await client.list("a=b") == []
        assert await asyncio.gather(*(client.list("a=b") for _ in range(8))) == [[]] * 8

    run(main())


@pytest.mark.skipif(not os.environ.get("ROCK_TEST_DOCKER"), reason="starts engines of its own: set ROCK_TEST_DOCKER=1")
@pytest.mark.parametrize("live", [True, False])
def test_an_engine_restarts(tmp_path: Path, live: bool) -> None:
    """With live-restore its containers go on; without, they end, and that is told."""
    try:
        engine = TestEngine(tmp_path / "e", {"live-restore": live})
        engine.folder.mkdir()
        engine.start()
    except engines.CannotBeHad as error:
        pytest.skip(str(error))

    async def main() -> None:
        engine.make_image("rock-test/busybox:1", engines.busybox())
        async with opened(engine, tmp_path) as runtime:
            handle = await runtime.create("box", config("rock-test/busybox:1"))
            b = Box(runtime, handle, Path("/work"))
            program = await b.spawn("sh", "-c", "read a; echo $a", stdin="pipe", env={})
            waiting = asyncio.create_task(runtime.wait(handle))
            await asyncio.to_thread(stop)
            if live:
                assert await b.sh("echo without", env={}) == "without\n"
            else:
                assert "engine" in await waiting
            await asyncio.to_thread(engine.start)
            if live:
                os.write(program.stdin or -1, b"through\n")
                assert await read_all(program.stdout or -1) == b"through\n"
                b.close()
                assert not waiting.done()
            await runtime.destroy(handle)
            assert await waiting
            again = await runtime.create("again", config("rock-test/busybox:1"))
            await runtime.destroy(again)

    def stop() -> None:
        assert engine.process is not None
        engine.process.terminate()
        engine.process.wait(60)

    try:
        run(main(), 100)
    finally:
        engine.remove()
