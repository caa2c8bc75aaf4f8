"""The console script `rocklet`: a machine's sandboxes over the wire, as an admin elsewhere would command them."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.leaks import Inventory, take_inventory

from rock.admin.workers.client import StreamTransport, Transport, WireWorker
from rock.errors import Conflict, ImageError, InvalidConfig, Lost, NotFound, Unsupported
from rock.images.store import ImageStore
from rock.protocol.node import NodeCommit
from rock.protocol.sandbox import ArchivedFiles, Cause, SandboxConfig

SCRIPT = Path(sys.executable).with_name("rocklet")


@pytest.fixture
def rocklet(tmp_path: Path) -> Iterator[tuple[str, Path, int]]:
    """(URL, home, pid) of one with a key."""
    home = tmp_path / "home"
    environment = {**os.environ, "ROCK_HOME": str(home), "ROCK_API_KEY": "open sesame", "ROCK_POOL_SIZE": "0"}
    with subprocess.Popen([SCRIPT, "--port", "0"], env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        try:
            note = json.loads((home / "server.json").read_text())
            yield f"http://127.0.0.1:{note['port']}", home, child.pid
        finally:
            child.send_signal(signal.SIGTERM)
            assert child.wait(30) == 0, line


def ask(url: str, method: str, path: str, body: bytes = b"", key: str = "open sesame") -> tuple[int, bytes]:
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    request = urllib.request.Request(url + path, data=body or None, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return int(reply.status), reply.read()
    except urllib.error.HTTPError as error:
        return int(error.code), error.read()


def wire_to(url: str) -> Transport:
    async def transport(method: str, path: str, query: str, body: bytes) -> tuple[int, bytes]:
        return await asyncio.to_thread(ask, url, method, f"{path}?{query}" if query else path, body)

    return transport


def test_an_admin_elsewhere_commands_it(rocklet: tuple[str, Path, int]) -> None:
    url, home, pid = rocklet

    transport = wire_to(url)

    async def main() -> Inventory:
        worker = WireWorker("there", transport)
        config = SandboxConfig(image="host", memory="256m", cpus=1.0)
        await worker.check(config)
        with pytest.raises(ImageError, match="rock image import"):
            await worker.check(SandboxConfig(image="no-such:1", memory="256m", pull="never"))
        seen = await worker.image("host")
        assert seen.is_ready and seen.digest is not None and seen.digest.startswith("sha256:")
        for name in ("no-such:1", "rock.local/env/gem"):
            assert not (await worker.image(name)).is_ready
        with pytest.raises(ImageError, match="cannot be reached"):  # whoever waits for it has it pulled
            await worker.image("127.0.0.1:1/no-such:1", 60)
        before = take_inventory(home, pid)
        made = await worker.create("one", config)
        assert made.alive and made.enforced
        assert (await worker.create("one", config)).sandbox_id == "one"  # asked again, made once
        with pytest.raises(Conflict):
            await worker.create("one", SandboxConfig(image="host", memory="512m"))
        target = "/v1/sandboxes/one/sessions/default/run"
        status, answer = await transport("POST", target, "", b'{"command": "echo hi"}')
        assert (status, json.loads(answer)["output"]) == (200, "hi\n")
        assert [s.sandbox_id for s in (await worker.list()).sandboxes] == ["one"]
        assert (await worker.get("one", usage=True)).usage is not None
        assert (await worker.status()).sandboxes == 1
        image = await worker.commit("one", NodeCommit(image_tag="team/one:1"))
        assert image.name == "team/one:1" and image.pushed is None
        ImageStore(home / "images").remove(image.name)
        with pytest.raises(InvalidConfig, match="named by a digest") as refused:
            await worker.commit("one", NodeCommit(image_tag="team/one@sha256:" + "0" * 64))
        assert refused.value.details == {"stage": "commit"}
        boot = (await worker.events(0, 0)).boot
        await transport("POST", "/v1/sandboxes/one/execute", "", b'{"command": ["/bin/sh", "-c", "kill -9 -1"]}')
        await worker.destroy("one")
        assert (await worker.destroy("one")).alive is False
        with pytest.raises(NotFound):
            await worker.get("one")
        assert (await worker.events(0, 0)).boot == boot
        return before

    before = asyncio.run(main())
    end = time.monotonic() + 5
    while (left := take_inventory(home, pid) - before) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left


def test_connections_are_told_over_the_wire(rocklet: tuple[str, Path, int]) -> None:
    url, home, pid = rocklet
    transport = wire_to(url)
    code = "import socket; socket.create_connection(('169.254.169.254', 80), 20).recv(1)"
    body = json.dumps({"command": ["python3", "-c", code]}).encode()

    async def main() -> Inventory:
        worker = WireWorker("there", transport)
        before = take_inventory(home, pid)
        try:
            await worker.create("one", SandboxConfig(image="host", memory="256m", cpus=1.0, network="nat"))
        except Unsupported as error:
            pytest.skip(str(error))
        await transport("POST", "/v1/sandboxes/one/execute", "", body)
        for _ in range(2):  # while it lives, and afterwards
            [seen] = (await worker.connections("one")).items
            assert (seen.address, seen.allowed, seen.reason) == ("169.254.169.254", False, "metadata address")
            await worker.destroy("one")
        assert (await worker.connections("unknown")).items == []
        return before

    before = asyncio.run(main())
    end = time.monotonic() + 5
    while (left := take_inventory(home, pid) - before) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left


def test_it_tells_of_a_sandbox_that_ended(rocklet: tuple[str, Path, int]) -> None:
    url, home, _ = rocklet

    transport = wire_to(url)

    async def main() -> None:
        worker = WireWorker("there", transport)
        await worker.create("two", SandboxConfig(image="host", memory="64m", cpus=1.0))
        waiting = asyncio.create_task(worker.events(0, 20))
        handle = json.loads((home / "run" / "records" / "two").read_text())["handle"]
        os.kill(handle["data"]["pid"], signal.SIGKILL)
        (event,) = (await waiting).events
        assert (event.sandbox_id, event.cause) == ("two", Cause.EXITED)

    asyncio.run(main())


def test_it_asks_for_its_key_and_answers_for_its_health(rocklet: tuple[str, Path, int]) -> None:
    url, _, _ = rocklet
    assert ask(url, "GET", "/healthz", key="wrong")[0] == 200
    assert ask(url, "GET", "/node/v1/sandboxes", key="wrong")[0] == 401
    assert ask(url, "POST", "/v1/sandboxes", b"{}")[0] == 404  # that is an admin's


def streams_to(url: str) -> StreamTransport:
    """Requests whose bodies and answers are long, a piece at a time."""

    async def stream(
        method: str, path: str, query: str, body: AsyncIterator[bytes] | None, content: bytes
    ) -> AsyncGenerator[int | bytes]:
        address = url.removeprefix("http://")
        connection = http.client.HTTPConnection(address, timeout=60)
        try:
            headers = {"authorization": "Bearer open sesame"}
            if body is not None:
                headers["transfer-encoding"] = "chunked"
            elif content:
                headers["content-length"] = str(len(content))
            connection.putrequest(method, f"{path}?{query}" if query else path)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            if body is not None:
                async for part in body:
                    await asyncio.to_thread(connection.send, b"%x\r\n%s\r\n" % (len(part), part))
                connection.send(b"0\r\n\r\n")
            elif content:
                await asyncio.to_thread(connection.send, content)
            reply = await asyncio.to_thread(connection.getresponse)
            yield reply.status
            while part := await asyncio.to_thread(reply.read, 1 << 18):
                yield part
        finally:
            connection.close()

    return stream


def test_files_come_and_go_over_the_wire(rocklet: tuple[str, Path, int]) -> None:
    url, home, pid = rocklet
    worker = WireWorker("there", wire_to(url), streams_to(url))
    config = SandboxConfig(image="host", memory="64m", cpus=1.0, auto_delete_seconds=600)

    async def run(command: str) -> str:
        body = json.dumps({"command": ["sh", "-c", command]}).encode()
        status, answer = await wire_to(url)("POST", "/v1/sandboxes/one/execute", "", body)
        assert status == 200, answer
        return str(json.loads(answer)["stdout"])

    async def main() -> Inventory:
        before = take_inventory(home, pid)
        await worker.create("one", config)
        await run("head -c 3M /dev/urandom > /root/data; rm -f /etc/hostname")
        digest = await run("sha256sum /root/data; ls /etc")
        assert (await worker.rest("one")).kept and (await worker.rest("one")).kept
        assert ((await worker.list()).sandboxes, (await worker.list()).kept) == ([], ["one"])
        items = [item async for item in worker.pack("one", 1 << 30)]
        files, data = items.pop(), [item for item in items if isinstance(item, bytes)]
        assert isinstance(files, ArchivedFiles) and len(b"".join(data)) == files.size > 3 << 20
        with pytest.raises(InvalidConfig, match="over the limit"):
            [item async for item in worker.pack("one", 1 << 20)]
        await worker.destroy("one")
        assert not (await worker.rest("one")).kept
        with pytest.raises(Lost):
            await worker.wake("one", config)
        with pytest.raises(Lost):
            [item async for item in worker.pack("one", 1 << 30)]

        async def given(parts: list[bytes]) -> AsyncIterator[bytes]:
            for part in parts:
                yield part

        with pytest.raises(InvalidConfig, match=r"differs from the archive|in the middle"):
            await worker.unpack("one", config, files, given(data[:-1]))
        with pytest.raises(ImageError, match="not the one"):
            other = files.model_copy(update={"image_digest": "another"})
            await worker.unpack("one", config, other, given(data))
        assert (await worker.list()).kept == []
        assert (await worker.unpack("one", config, files, given(data))).kept
        assert (await worker.wake("one", config)).alive
        assert await run("sha256sum /root/data; ls /etc") == digest
        await worker.destroy("one")
        return before

    before = asyncio.run(main())
    end = time.monotonic() + 5
    while (left := take_inventory(home, pid) - before) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left
