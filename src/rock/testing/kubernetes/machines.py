"""What runs in the pods of a fake cluster: nothing, a rocklet as a process, or a rocklet in this process with the fake
runtime. Each pod has a loopback address of its own, so that all of them may use the same port."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rock.cli.serve.serve import Rocklet, http_over, listen
from rock.runtime.fake import FakeRuntime
from rock.settings import Settings, child_environment


class Machine(Protocol):
    """What runs in one pod. environment: of its first container."""

    async def start(self, address: str, environment: Mapping[str, str]) -> None:
        """Start it; return when it serves."""
        ...

    async def ended(self) -> int:
        """Wait until it ends by itself; its exit status."""
        ...

    async def stop(self, grace: float) -> None:
        """End it, after at most `grace` seconds by force."""
        ...


class Idle:
    """A container that does nothing."""

    def __init__(self) -> None:
        self._over: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def start(self, address: str, environment: Mapping[str, str]) -> None:
        pass

    async def ended(self) -> int:
        return await asyncio.shield(self._over)

    async def stop(self, grace: float) -> None:
        if not self._over.done():
            self._over.set_result(0)


class RockletProcess:
    """A real `rocklet`, with the environment of the pod."""

    def __init__(self, home: Path, **more: str) -> None:
        self._home = home
        self._more = more
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, address: str, environment: Mapping[str, str]) -> None:
        self._home.mkdir(parents=True, exist_ok=True, mode=0o700)
        given = {**environment, "ROCK_HOST": address, "ROCK_HOME": str(self._home), **self._more}
        with open(self._home / "output.log", "ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", "from rock.cli.scripts import rocklet_main; rocklet_main()",
                env=child_environment(**given), stdin=subprocess.DEVNULL, stdout=log, stderr=log)  # fmt: skip
        note = self._home / "server.json"
        while not note.exists() and self._process.returncode is None:  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.02)

    async def ended(self) -> int:
        assert self._process is not None
        return await self._process.wait()

    async def stop(self, grace: float) -> None:
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM if grace else signal.SIGKILL)
            try:
                async with asyncio.timeout(grace):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
        await self._process.wait()


class EmbeddedRocklet:
    """A rocklet in this event loop with the fake runtime: hundreds of pods in one process."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._rocklet: Rocklet | None = None
        self._http: Any = None
        self._served: asyncio.Task[None] | None = None
        self._over: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def start(self, address: str, environment: Mapping[str, str]) -> None:
        os.makedirs(self._home, mode=0o700, exist_ok=True)
        given = {"pool_size": 0, "home": self._home, "runtime": "fake", "host": address}
        settings = Settings.read(environment, **given)
        listener = listen(address, settings.port)
        self._rocklet = Rocklet(settings, {"fake": FakeRuntime()})
        try:
            await self._rocklet.open()
        except BaseException:
            listener.close()
            self._rocklet = None
            raise
        self._http = http_over(self._rocklet.app)
        self._served = asyncio.create_task(self._http.serve(sockets=[listener]), name=f"pod {address}")

    async def ended(self) -> int:
        return await asyncio.shield(self._over)

    async def stop(self, grace: float) -> None:
        rocklet, self._rocklet = self._rocklet, None
        if rocklet is None:
            return
        rocklet.let_go()
        if self._http is not None:
            self._http.should_exit = True
            self._http.force_exit = True
        if self._served is not None:
            await asyncio.gather(self._served, return_exceptions=True)
        for sandbox_id in list(rocklet.node.supervisors):
            with contextlib.suppress(Exception):
                await rocklet.node.destroy(sandbox_id)
        await rocklet.close()
        if not self._over.done():
            self._over.set_result(137)
