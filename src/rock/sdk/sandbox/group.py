"""Many sandboxes handled as one."""

from __future__ import annotations

from functools import partial
from types import TracebackType
from typing import Any, Self

from rock import errors
from rock.protocol.action import BashObservation
from rock.protocol.sandbox import BaseConfig, SandboxConfig, SandboxGroupConfig
from rock.sdk import primitives
from rock.sdk.sandbox.sandbox import Sandbox

RETRY_AFTER = 1.0  # seconds
CLEAN_UP = 60.0


class SandboxGroup:
    """`config.size` equal sandboxes: `sandbox_list`. All of them run after `start`, or none does."""

    def __init__(self, config: SandboxGroupConfig | None = None, **fields: Any) -> None:
        self.config = config or SandboxGroupConfig(**fields)
        names = set(SandboxConfig.model_fields)
        given = {name: getattr(self.config, name) for name in self.config.model_fields_set & names}
        given |= {name: getattr(self.config, name) for name in BaseConfig.model_fields}
        self.sandbox_list: list[Sandbox] = []
        for number in range(self.config.size):
            if self.config.sandbox_id:
                given["sandbox_id"] = f"{self.config.sandbox_id}-{number}"
            self.sandbox_list.append(Sandbox(SandboxConfig(**given)))

    async def start(self) -> None:
        """Start all, `start_concurrency` at once. An error that may pass is tried again, `start_retry_times` in all;
        any other stops those that were started, and is raised."""
        calls = [partial(self._start_one, sandbox) for sandbox in self.sandbox_list]
        try:
            outcomes = await primitives.gather(calls, self.config.start_concurrency)
            _raise_first(outcomes)
        except BaseException:
            await primitives.settle(self.stop, CLEAN_UP)
            raise

    async def stop(self) -> None:
        """Stop all, at the same time. The first error is raised when all have been tried."""
        _raise_first(await primitives.gather([sandbox.stop for sandbox in self.sandbox_list], 64))

    async def arun_all(self, cmd: str, *, return_errors: bool = False, **options: Any) -> list[Any]:
        """Run a command line in each at the same time; `options` are those of `Sandbox.arun`.

        Observations in the order of `sandbox_list`. The first error is raised when all have ended; with `return_errors`
        each stands in its place.
        """
        calls = [partial(sandbox.arun, cmd, **options) for sandbox in self.sandbox_list]
        outcomes: list[BashObservation | BaseException] = await primitives.gather(calls)
        if not return_errors:
            _raise_first(outcomes)
        return list(outcomes)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _start_one(self, sandbox: Sandbox) -> None:
        tries = self.config.start_retry_times
        while True:
            tries -= 1
            try:
                return await sandbox.start()
            except errors.RockError as error:
                if not error.retryable or tries <= 0:
                    raise
            await primitives.sleep(RETRY_AFTER)


def _raise_first(outcomes: list[Any]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
