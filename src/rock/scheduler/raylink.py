"""Ray as the admin sees it: a child process, the driver of scheduler/ray.py, that is spoken to in lines of JSON.

    admin ── {"id", "call", ...} ──► python -m rock.scheduler.ray ──► Ray
          ◄── {"id", "answer"|"error"} ──

Ray ends its driver's process when the head is gone for a minute, and has threads, signals and logs of its own: none of
that may be the admin's. A driver that ended is started again until there is a cluster to speak to.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import sys
from collections.abc import Mapping
from typing import Any

from rock.errors import Conflict, InvalidConfig, NoCapacity, RockError, Unavailable
from rock.protocol.sandbox import SandboxConfig
from rock.scheduler.base import MachineEnd

log = logging.getLogger("rock.ray")

RESOURCE_LABEL = "rock.resource."  # label rock.resource.NAME=AMOUNT asks for a custom resource of Ray
_PREFIX = "rock-"
_AGAIN = 2.0  # seconds after which a driver that ended is started again
_PATIENCE = 15.0  # seconds for an answer that needs no resources
_LONGEST_LINE = 16 << 20
_KINDS: dict[str, type[RockError]] = {"InvalidConfig": InvalidConfig, "NoCapacity": NoCapacity, "Conflict": Conflict}


def bundle_of(config: SandboxConfig) -> dict[str, float]:
    """What a sandbox takes, in Ray's words. InvalidConfig for a custom resource without an amount."""
    found = {"CPU": config.cpus, "memory": float(config.memory_bytes)}
    if config.num_gpus:
        found["GPU"] = config.num_gpus
    if config.accelerator_type:
        found[f"accelerator_type:{config.accelerator_type}"] = 0.001
    for name, text in config.labels.items():
        if name.startswith(RESOURCE_LABEL):
            try:
                amount = float(text)
            except ValueError:
                amount = 0.0
            if not 0 < amount < 1e9:
                raise InvalidConfig(f"label {name}={text!r} is not an amount of the Ray resource",
                                    hint=f"give a positive number, as in {name}=1")
            found[name.removeprefix(RESOURCE_LABEL)] = amount
    return found


class RayReservations:
    """A placement group of Ray's for each sandbox. options: what the driver has to know, see scheduler/ray.py."""

    exclusive = False

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._process: asyncio.subprocess.Process | None = None
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count(1)
        self._ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._task = asyncio.create_task(self._run(), name="ray driver")

    async def close(self) -> None:
        """End the driver. Rocklets and reservations stay, for the next server."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    # ---- the driver ----

    async def _run(self) -> None:
        while True:
            try:
                await self._drive()
            except Exception as error:
                log.warning("Ray's driver: %r", error)
            await asyncio.sleep(_AGAIN)

    async def _drive(self) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "rock.scheduler.ray", limit=_LONGEST_LINE,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(self._options).encode() + b"\n")
            self._process = process
            async for line in process.stdout:
                self._received(line)
        finally:
            self._process = None
            self._ready.clear()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(Unavailable("Ray's driver ended", hint="retry when the cluster is back"))
            with contextlib.suppress(OSError):
                process.stdin.close()
            try:
                async with asyncio.timeout(_AGAIN):
                    await process.wait()
            except (TimeoutError, asyncio.CancelledError):
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
            log.warning("Ray's driver ended with status %s", process.returncode)

    def _received(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            log.info("ray: %s", line[:300])  # something in it prints
            return
        if message.get("ready"):
            log.info("in the Ray cluster at %s", message["ready"])
            self._ready.set()
            return
        future = self._waiting.get(message.get("id", 0))
        if future is None or future.done():
            return
        if "error" in message:
            kind = _KINDS.get(message.get("kind", ""), Unavailable)
            future.set_exception(kind(f"Ray: {message['error']}"))
        else:
            future.set_result(message.get("answer"))

    async def _call(self, call: str, **values: Any) -> Any:
        await self._ready.wait()
        if self._process is None or self._process.stdin is None:
            raise Unavailable("Ray's driver ended", hint="retry when the cluster is back")
        number = next(self._numbers)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._process.stdin.write(json.dumps({"id": number, "call": call, **values}).encode() + b"\n")
            return await future
        finally:
            del self._waiting[number]

    async def _soon(self, call: str, **values: Any) -> Any:
        try:
            async with asyncio.timeout(_PATIENCE):
                return await self._call(call, **values)
        except TimeoutError:
            raise Unavailable("the Ray cluster does not answer", hint="retry when its head is back") from None

    # ---- Reservations ----

    def check(self, config: SandboxConfig) -> None:
        bundle_of(config)

    def failures(self) -> Mapping[str, MachineEnd]:
        return {}

    async def reserve(self, sandbox_id: str, config: SandboxConfig, worker: str | None = None) -> str:
        bundle = bundle_of(config)
        while True:
            try:
                return str(await self._call("reserve", name=_PREFIX + sandbox_id, bundle=bundle, worker=worker))
            except Unavailable as error:  # the head is away: the caller decides how long to wait
                log.info("reservation of %s: %s", sandbox_id, error)
                await asyncio.sleep(_AGAIN)

    async def release(self, sandbox_id: str) -> None:
        await self._soon("release", name=_PREFIX + sandbox_id)

    async def held(self) -> set[str]:
        names = await self._call("held")
        return {name.removeprefix(_PREFIX) for name in names}
