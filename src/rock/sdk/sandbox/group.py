"""Many sandboxes handled as one."""

from __future__ import annotations

import os
import time
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack

from rock import errors
from rock.protocol.action import BashObservation, GroupInfo
from rock.protocol.routes import ROUTES
from rock.protocol.sandbox import BaseConfig, SandboxConfig, SandboxGroupConfig, State
from rock.sdk import primitives
from rock.sdk.http import query_string
from rock.sdk.sandbox.link import SLACK, new_id, parse, transport_of
from rock.sdk.sandbox.options import GroupOptions, RunOptions, config_of
from rock.sdk.sandbox.sandbox import Sandbox
from rock.sdk.sandbox.sessions import DEFAULT, TIMEOUT

RETRY_AFTER = 1.0  # seconds
CLEAN_UP = 60.0
POLL = 20.0


class SandboxGroup(primitives.Face):
    """`config.size` equal sandboxes: `sandbox_list`. All of them run after `start`, or none does; with
    mode="best_effort" those that could be started, and the list is as long as they are many."""

    def __init__(
        self,
        image: str | SandboxGroupConfig | None = None,
        *,
        config: SandboxGroupConfig | None = None,
        **options: Unpack[GroupOptions],
    ) -> None:
        self.config = config_of(SandboxGroupConfig, image, config, options)
        self.group_id: str | None = None
        self._transport = transport_of(self.config)
        self._given = {name: getattr(self.config, name) for name in BaseConfig.model_fields}
        names = set(SandboxConfig.model_fields) - {"sandbox_id"}
        self._given |= {name: getattr(self.config, name) for name in self.config.model_fields_set & names}
        self.sandbox_list = [self._sandbox(self.config.sandbox_id, number) for number in range(self.config.size)]

    def _sandbox(self, group_id: str | None, number: int) -> Sandbox:
        own = {"sandbox_id": f"{group_id}-{number}"} if group_id else {}
        return Sandbox(SandboxConfig(**{**self._given, **own}))

    async def start(self) -> None:
        """Ask for all in one request, and wait until they run. An error that may pass is tried again,
        `start_retry_times` in all; after any other nothing of it is left."""
        tries = self.config.start_retry_times
        while True:
            tries -= 1
            try:
                return await self._start()
            except errors.RockError as error:
                if not error.retryable or tries <= 0:
                    raise
            await primitives.sleep(RETRY_AFTER)

    async def _start(self) -> None:
        deadline = time.monotonic() + self.config.startup_timeout
        # The name is ours, so that even a group whose answer was lost can be stopped.
        self.group_id = self.config.sandbox_id or new_id(self.config)
        try:
            info = await self._create(os.urandom(16).hex(), deadline)
            while any(one.state is State.PENDING for one in info.sandboxes):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise errors.StartFailed(
                        f"the group did not run within startup_timeout={self.config.startup_timeout:g} seconds",
                        hint="increase startup_timeout",
                    )
                target = self._path("get_group", wait=round(min(left, POLL), 3))
                answer = await self._transport.json("GET", target, timeout=min(left, POLL) + SLACK)
                info = parse(GroupInfo, answer)
            self._take(info)
        except (errors.ClientError, errors.ImageError, errors.NoCapacity):
            self.group_id = None  # it was refused, or undone there
            raise
        except BaseException:
            await primitives.settle(self.stop, CLEAN_UP)
            raise

    def _take(self, info: GroupInfo) -> None:
        """Those of a started group that run. What keeps a gang from running is raised."""
        running = {one.sandbox_id: one for one in info.sandboxes if one.state is State.RUNNING}
        ended = [one for one in info.sandboxes if one.sandbox_id not in running]
        whole = self.config.mode == "gang"
        told = next((one.error for one in ended if one.error), None)
        if ended and (whole or not running):
            reason = next((one.reason for one in ended if one.reason), "it ended while it started")
            raise (
                errors.from_wire(told)
                if told
                else errors.StartFailed(
                    f"group {info.group_id} did not start: {reason}", hint="mode='best_effort' accepts a part of it"
                )
            )
        if not whole:
            self.sandbox_list = [
                self._sandbox(info.group_id, number)
                for number in range(self.config.size) if f"{info.group_id}-{number}" in running
            ]  # fmt: skip
        for sandbox, one in zip(self.sandbox_list, running.values(), strict=True):
            sandbox.sandbox_id = one.sandbox_id
            sandbox.host_name, sandbox.host_ip = one.host_name, one.host_ip
            sandbox.cluster = one.cluster or sandbox.cluster

    async def _create(self, key: str, deadline: float) -> GroupInfo:
        config = self.config.model_dump(mode="json", exclude_unset=True, include=set(SandboxConfig.model_fields))
        spec = {"config": {**config, "sandbox_id": self.group_id}, "size": self.config.size,
                "mode": self.config.mode, "placement": self.config.placement}  # fmt: skip
        left = max(1.0, deadline - time.monotonic())
        wait = min(left, POLL)
        target = ROUTES["create_group"].path + query_string({"wait": round(wait, 3)})
        answer = await self._transport.json("POST", target, spec, timeout=wait + SLACK, key=key, deadline=left)
        return parse(GroupInfo, answer)  # its key keeps it one group

    def _path(self, name: str, **query: object) -> str:
        return ROUTES[name].url(group_id=self.group_id or "") + query_string(query)

    async def stop(self) -> None:
        """Stop all, at the same time; those that are gone already are left as they are."""
        if self.group_id is None:
            return
        try:
            await self._transport.json("POST", self._path("stop_group"), timeout=CLEAN_UP + SLACK)
        except errors.NotFound:
            return

    async def run_all(
        self,
        command: str,
        *,
        session: str = DEFAULT,
        timeout: float | None = TIMEOUT,
        check: bool = False,
        return_errors: bool = False,
        **options: Unpack[RunOptions],
    ) -> list[Any]:
        """`Sandbox.run` in all sandboxes at the same time.

        Results in the order of `sandbox_list`. The first error is raised after all have ended; with `return_errors`,
        each error is in the place of its result.
        """
        return await self._all(
            [
                partial(sandbox.run, command, session=session, timeout=timeout, check=check, **options)
                for sandbox in self.sandbox_list
            ],
            return_errors,
        )

    async def arun_all(self, cmd: str, *, return_errors: bool = False, **options: Any) -> list[Any]:
        """`run_all` with ROCK's `arun`, whose options are `options`."""
        return await self._all([partial(sandbox.arun, cmd, **options) for sandbox in self.sandbox_list], return_errors)

    async def _all(self, calls: list[Any], return_errors: bool) -> list[Any]:
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


def _raise_first(outcomes: list[Any]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
