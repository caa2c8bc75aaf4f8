"""The provider "rock" of NeMo Gym, which its entry point registers, by the facades of NeMo Gym."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from checks import check, raises
from nemo_gym.sandbox import (
    AsyncSandbox,
    Sandbox,
    SandboxCreateError,
    SandboxSpec,
    SandboxStatus,
    create_provider,
    get_provider_class,
    list_providers,
)

from rock import sync
from rock.errors import InvalidConfig
from rock.integrations.nemo_gym import LABELS, RockProvider

PLACE = {"rock": {"memory": "512m"}}


def running() -> int:
    return len(sync.Sandbox.list(states="running", labels=LABELS))


def spec(**fields: object) -> SandboxSpec:
    return SandboxSpec(**{"image": "host", **fields})  # type: ignore[arg-type]


with check("the entry point registers the provider"):
    assert "rock" in list_providers() and get_provider_class("rock") is RockProvider
    assert isinstance(create_provider(PLACE), RockProvider)
with check("the blocking facade: files, commands, status, stop"):
    with Sandbox(PLACE) as box:
        box.start(spec(workdir="/work/here", env={"WORD": "hello"}, files={"/data/f.txt": "text"},
                       metadata={"sample": "7"}, ttl_s=600, ready_timeout_s=120))  # fmt: skip
        assert box.status() is SandboxStatus.RUNNING and running() == 1
        done = box.exec("echo $WORD; pwd; cat /data/f.txt; exit 3")
        assert (done.stdout, done.return_code, done.error_type) == ("hello\n/work/here\ntext", 3, None)
        assert box.exec("id -un", user="daemon").stdout == "daemon\n"
        assert box.exec("pwd; echo $X", cwd="/tmp", env={"X": "y"}).stdout == "/tmp\ny\n"
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "up").write_bytes(b"\0\xff")
            box.upload(Path(folder, "up"), "/data/up")
            box.download("/data/up", Path(folder, "deep/down"))
            assert Path(folder, "deep/down").read_bytes() == b"\0\xff"
        assert len(sync.Sandbox.list(states="running", labels={**LABELS, "sample": "7"})) == 1
        box.stop()
        assert running() == 0
with check("a timeout is a result of its own"), Sandbox(PLACE) as box:
    box.start(spec())
    done = box.exec("echo begun; sleep 4321", timeout_s=1)
    assert (done.stdout, done.return_code, done.error_type) == ("begun\n", 125, "timeout")
with check("a sandbox that ended is an error of the sandbox, and its status is stopped"):

    async def ended() -> None:
        box = AsyncSandbox(PLACE)
        await box.start(spec())
        sync.Sandbox.connect(box._require_handle().sandbox_id).stop()
        done = await box.exec("true")
        assert (done.return_code, done.error_type) == (125, "sandbox"), done
        assert await box.status() is SandboxStatus.STOPPED
        await box.stop()

    asyncio.run(ended())
with check("resources"):

    async def sized() -> None:
        provider = RockProvider()
        handle = await provider.create(spec(resources={"cpu": 1.5, "memory_mib": 300}, ttl_s=600))
        config = handle.raw[0].config
        assert (config.cpus, config.memory, config.timeout) == (1.5, "300m", 600)
        await provider.close(handle)
        await provider.close(handle)
        await provider.aclose()

    asyncio.run(sized())
with check("what cannot be created is a SandboxCreateError with its cause"):
    for fields, text in (({"image": None}, "no image"), ({"entrypoint": ["x"]}, "entrypoint"),
                         ({"provider_options": {"no_such_option": 1}}, "no_such_option"),
                         ({"image": "localhost/no/such:image"}, "no/such"),
                         ({"workdir": "/etc/hostname/x"}, "workdir")):  # fmt: skip
        with raises(SandboxCreateError, text):
            asyncio.run(RockProvider(memory="512m").create(spec(**fields)))
    with raises(InvalidConfig, "no_such_option"):
        RockProvider("host", no_such_option=1)
    assert running() == 0
with check("many sandboxes at once"):

    async def many() -> None:
        async def one(number: int) -> None:
            async with AsyncSandbox(PLACE) as box:
                await box.start(spec())
                assert (await box.exec(f"echo {number}")).stdout == f"{number}\n"

        await asyncio.gather(*(one(number) for number in range(6)))

    asyncio.run(many())
    assert running() == 0
