"""The defined warm pools of this machine (decision 57).

The admin sends all definitions again and again, so nothing is stored here. An image is prepared before its pool is
defined; a long preparation delays no other pool.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping

from rock.errors import RockError, Unsupported
from rock.protocol.pools import NodePool, NodePools, NodePoolState, NodePoolStates
from rock.rocklet.runtimes import Runtimes
from rock.runtime.pools import DefinesPools, PoolTarget

log = logging.getLogger("rock.node")
_RETRY = 30.0  # seconds after a failed preparation of an image


class Pools:
    """The pools of the runtimes."""

    def __init__(self, runtimes: Runtimes) -> None:
        self._runtimes = runtimes
        self._preparing: dict[str, asyncio.Task[None]] = {}  # by image
        self._failed: dict[str, tuple[float, str]] = {}  # by image: when it is tried again, and the reason
        self._errors: dict[str, str] = {}  # of the last definitions, by pool
        self._lock = asyncio.Lock()

    async def close(self) -> None:
        for task in self._preparing.values():
            task.cancel()
        await asyncio.gather(*self._preparing.values(), return_exceptions=True)

    async def define(self, spec: NodePools) -> NodePoolStates:
        """Set all pools, and return their states. A pool that is not possible has an error in its state."""
        async with self._lock:
            self._errors = {}
            targets: dict[str, list[PoolTarget]] = {name: [] for name in self._runtimes.names()}
            for pool in spec.pools:
                try:
                    name = self._runtime_of(pool)
                    if await self._prepared(name, pool):
                        targets[name].append(PoolTarget(pool.pool, pool.config, pool.minimum, pool.maximum))
                except RockError as error:
                    self._errors[pool.pool] = error.message
            for name, wanted in targets.items():
                runtime = self._runtimes[name]
                if isinstance(runtime, DefinesPools):
                    found = await runtime.define_pools(wanted, spec.budget)
                    self._errors |= {one: state.error for one, state in found.items() if state.error}
            images = {pool.config.image for pool in spec.pools}
            self._failed = {image: failed for image, failed in self._failed.items() if image in images}
        return self.states()

    def states(self) -> NodePoolStates:
        """The state of each pool."""
        found = {name: NodePoolState(error=error) for name, error in self._errors.items()}
        for name in self._runtimes.names():
            runtime = self._runtimes[name]
            if isinstance(runtime, DefinesPools):
                for pool, state in runtime.pool_states().items():
                    values: Mapping[str, object] = state._asdict()
                    found[pool] = NodePoolState.model_validate(values)
        return NodePoolStates(pools=found)

    def _runtime_of(self, pool: NodePool) -> str:
        runtime = self._runtimes.of(pool.config)
        if not isinstance(runtime, DefinesPools):
            raise Unsupported(f"runtime {runtime.name!r} has no warm pools", hint="use the namespace runtime")
        return runtime.name

    async def _prepared(self, name: str, pool: NodePool) -> bool:
        """Whether the image of a pool is here; else its preparation begins, or its last error is raised."""
        image = pool.config.image
        if await self._runtimes.has_image(self._runtimes[name], pool.config):
            return True
        if image in self._preparing:
            self._errors[pool.pool] = f"image {image} is being prepared"
            return False
        until, reason = self._failed.get(image, (0.0, ""))
        if until > time.monotonic():
            self._errors[pool.pool] = reason
            return False
        task = asyncio.create_task(self._prepare(name, pool), name=f"image of pool {pool.pool}")
        self._preparing[image] = task
        task.add_done_callback(lambda _: self._preparing.pop(image, None))
        self._errors[pool.pool] = f"image {image} is being prepared"
        return False

    async def _prepare(self, name: str, pool: NodePool) -> None:
        try:
            await self._runtimes.prepare_image(self._runtimes[name], pool.config)
        except RockError as error:
            log.warning("pool %s: %s", pool.pool, error)
            self._failed[pool.config.image] = time.monotonic() + _RETRY, error.message
