"""Snapshots of containers, over a real engine: files, sessions, rollback, what stays in the engine, refusals."""

from __future__ import annotations

import json
import os
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import pytest

from rock import errors, faults
from rock.runtime.base import Forks
from rock.sync import Client, Sandbox
from tests.conftest import RunningServer
from tests.runtime.boxes import Box, run
from tests.runtime.docker.engines import TestEngine
from tests.runtime.docker.test_docker import config, opened
from tests.waiting import until

A, B = "a" * 32, "b" * 32
BASE = "rock-test/hand:1"


def images(engine: TestEngine) -> list[str]:
    """The ids of the images of snapshots that the engine has."""
    filters = urllib.parse.quote(json.dumps({"reference": ["rock-snapshot"]}))
    return sorted(str(image["Id"]) for image in engine.json(f"/images/json?filters={filters}"))


def test_files_of_a_container(engine: TestEngine, tmp_path: Path) -> None:
    async def main() -> None:
        before = images(engine)
        async with opened(engine, tmp_path) as runtime:
            assert isinstance(runtime, Forks)
            handle = await runtime.create("box", config(env={"OF": "parent"}))
            box = Box(runtime, handle, Path("/work"))
            await box.run("sh", "-c", "mkdir -p /root/d /etc/ssh; echo one > /root/d/f; echo id > /etc/machine-id; "
                                      "echo key > /etc/ssh/ssh_host_rsa_key; rm /etc/group", user="root")
            taken = await runtime.checkpoint(handle, A, "auto")
            assert (taken.files, taken.layers, taken.copied) == ("copy", 1, None) and taken.paused_ms > 0
            assert (await runtime.checkpoint(handle, A, "auto")).layers == 1, "a repetition is no error"
            assert runtime.parent(taken.handle) == A and runtime.parent(handle) is None
            await box.run("sh", "-c", "echo two >> /root/d/f", user="root")
            child = await runtime.create("child", config(snapshot=A))
            other = Box(runtime, child, Path("/work"))
            show = "cat /root/d/f /etc/machine-id; ls /etc/ssh /etc/group; echo $OF $FROM_IMAGE; pwd"
            _, out, _ = await other.run("sh", "-c", show, user="root")
            lines = out.decode().splitlines()
            assert lines[0] == "one" and len(lines[1]) == 32 and lines[-2:] == ["yes", "/work"], lines
            assert "ssh_host_rsa_key" not in out.decode() and "/etc/group" not in lines
            deeper = await runtime.checkpoint(child, B, "copy")
            assert deeper.layers == 2 and runtime.snapshots() == {A: ["child"], B: []}
            assert not await runtime.drop_snapshot(A), "a container uses it"
            assert runtime.snapshots() == {B: []}
            with pytest.raises(errors.NotFound):
                await runtime.create("late", config(snapshot=A))
            new = await runtime.replace(handle, config(), B)
            again = Box(runtime, new, Path("/work"))
            assert (await again.run("cat", "/root/d/f", user="root"))[1] == b"one\n"
            for one in (box, other, again):
                one.close()
            for living in (handle, child, new):
                await runtime.destroy(living)
            assert await runtime.drop_snapshot(B)
            assert images(engine) == before and not (tmp_path / "run/snapshots").exists()

    run(main(), timeout=120)


def test_what_is_refused(engine: TestEngine, tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(engine, tmp_path) as runtime:
            handle = await runtime.create("box", config())
            for files, processes, words in (("switch", False, "copies the files"), ("auto", True, "files alone")):
                with pytest.raises(errors.Unsupported, match=words):
                    await runtime.checkpoint(handle, A, files, processes)  # type: ignore[arg-type]
            assert await runtime.refusals(handle) and runtime.snapshots() == {}
            with pytest.raises(errors.NotFound, match="no snapshot"):
                await runtime.create("child", config(snapshot=A))
            assert await runtime.drop_snapshot(A)
            await runtime.destroy(handle)

    run(main())


def test_a_commit_that_fails_leaves_nothing(engine: TestEngine, tmp_path: Path) -> None:
    async def main() -> None:
        before = images(engine)
        async with opened(engine, tmp_path) as runtime:
            handle = await runtime.create("box", config())
            faults.arm("docker.checkpoint.committed=error")
            try:
                with pytest.raises(errors.RockError):
                    await runtime.checkpoint(handle, A, "auto")
            finally:
                faults.arm("")
            assert images(engine) == before and runtime.snapshots() == {}
            await runtime.checkpoint(handle, A, "auto")
            await runtime.close()
        async with opened(engine, tmp_path) as runtime:  # after a restart
            await runtime.recover(handle)
            child = await runtime.create("child", config(snapshot=A))
            assert not await runtime.drop_snapshot(A)
        async with opened(engine, tmp_path) as runtime:
            await runtime.recover(child)
            assert runtime.snapshots() == {}
            for one in (handle, child):
                await runtime.destroy(one)
            assert images(engine) == before, "the last user removes it"

    run(main(), timeout=120)


def test_forks_and_rollback_through_a_server(engine: TestEngine, own_server: Callable[..., RunningServer],
                                             tmp_path: Path) -> None:
    server = own_server(DOCKER_HOST=engine.host)
    before = images(engine)
    box = Sandbox(BASE, runtime="docker", memory="256m", cpus=1.0, base_url=server.url)
    box.start()
    box.run("cd /tmp; X=5; f() { echo called $1; }; echo one > file")
    taken = box.checkpoint(name="first")
    assert (taken.memory, taken.files, taken.layers) == ("session", "copy", 1)
    assert any("an engine commits files alone" in one for one in taken.left_out), taken.left_out
    with pytest.raises(errors.Unsupported, match="files alone"):
        box.checkpoint(memory="processes")
    children = box.fork(2)
    for number, child in enumerate(children):
        assert child.info().runtime == "docker"
        assert child.run(f"pwd; echo $X; f {number}; cat file; echo {number} >> file").output == \
            f"/tmp\n5\ncalled {number}\none\n"
    assert box.run("cat file; rm file; X=6").output == "one\n"
    box.rollback("first")
    assert box.run("cat file; echo $X; pwd").output == "one\n5\n/tmp\n"
    server.kill()
    server.start()
    with Sandbox(snapshot="first", memory="256m", cpus=1.0, base_url=server.url) as third:
        assert third.info().runtime == "docker" and third.run("cat file; f 3").output == "one\ncalled 3\n"
    with Client(server.url) as client:
        with pytest.raises(errors.Unsupported, match="cannot export"):
            client.export_snapshot("first", tmp_path / "x.tar")
        for sandbox_id in (box.sandbox_id, *(child.sandbox_id for child in children)):
            found = Sandbox.connect(sandbox_id, base_url=server.url)
            assert found.run("head -1 /tmp/file").output == "one\n"
            found.stop()
        for info in client.list_snapshots():
            client.delete_snapshot(info.snapshot_id)
    until(lambda: images(engine) == before, 20, "an image of a snapshot is left")
    assert os.listdir(server.home / "run/docker") == []
