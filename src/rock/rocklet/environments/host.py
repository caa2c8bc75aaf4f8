"""The environment host of one sandbox: the program guest/environments/host.py, its start and end, and its operations.

exchange.py implements the requests and responses, and the lending of pipes to clients.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from rock.errors import Conflict, ImageError, InvalidConfig, Lost, NotFound, RockError, SandboxError, Unsupported
from rock.guest.environments.frames import CALL, CLOSE, HELLO, MAKE, NO_INDEX, PLAIN, RESET, STEP, Frame
from rock.guest.environments.host import PIPES
from rock.images.packages import CURRENT
from rock.rocklet.environments.exchange import Exchange, PipeLending, json_of, plain_of
from rock.rocklet.environments.pipes import program
from rock.rocklet.environments.registry import Answered, Batch, Hosted
from rock.runtime.base import Handle, Process, Runtime

ENV_LEASE = 50.0  # seconds
_CLOSE_TIMEOUT = 10.0  # seconds for the close of an environment; then it is killed
_OPEN_TIMEOUT = 180.0  # seconds; importing takes some seconds, and more on a busy machine


class EnvHost:
    """The environments of one sandbox.

    folder: the path of the packages inside: a link `python`, and a folder `site`; None for an image whose own Python
    has them. timeout: seconds for one make, reset or step, after which the environment is killed. adapter: of the
    training set that it hosts, for guest/environments/tasks.py. lease: seconds without a renewal by an environment's
    owner after which the environment is released.
    """

    KEY = "rock.envs"

    def __init__(
        self,
        runtime: Runtime,
        handle: Handle,
        *,
        folder: str | None = CURRENT,
        python: str | None = None,
        timeout: float = 600.0,
        adapter: str = "",
        lease: float = ENV_LEASE,
    ) -> None:
        self._runtime = runtime
        self._handle = handle
        self._folder = folder
        self._pythons = [python] if python else ["python3", "python"] if folder is None else [f"{folder}/python"]
        self._adapter = adapter
        self.lease = lease
        self._exchange = Exchange(handle.id, timeout, lease)
        self._next_env = 1
        self._forks = False
        self.recorded = False  # whether all requests have to pass the proxy
        self.pipe_lending = PipeLending(self._exchange)

    # ---- start and end ----

    async def open(self) -> None:
        """Start the host inside and wait until it has imported its packages.

        ImageError when the sandbox's image has no packages; SandboxError, with its last lines of output, when it does
        not start.
        """
        await self._connect(await self._start())

    async def _start(self) -> Process:
        told = ""
        for python in self._pythons:
            try:
                host = program(self._folder, python, self.KEY, self._adapter)
                return await self._runtime.spawn(self._handle, host)
            except NotFound as error:
                told = error.message
        if self._folder is None:
            raise ImageError(f"the image has no Python to host environments with ({told})", sandbox_id=self._handle.id,
                             hint="use an image with python3 in its PATH, and gymnasium")  # fmt: skip
        raise ImageError(f"this sandbox has no environment packages ({told})", sandbox_id=self._handle.id,
                         hint="rock.make starts a sandbox that has them")  # fmt: skip

    async def attach(self) -> None:
        """Attach to the host and its environments after a restart of the rocklet; NotFound when there is none."""
        process = await self._runtime.attach(self._handle, self.KEY)
        if not process.channels.keys() >= set(PIPES):  # a host of an older release has other pipes
            with contextlib.suppress(RockError):
                await process.kill_tree()
            process.close()
            raise NotFound("the process that hosts the environments is of an older release", sandbox_id=self._handle.id,
                           hint="open the environments again")
        await self._connect(process)

    async def _connect(self, process: Process) -> None:
        link = self._exchange.connect(process)
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT):
                answers = await self._exchange.zygote(HELLO, link.inlet.token.encode())
        except TimeoutError:
            await self.close()
            raise SandboxError(
                f"the host of environments did not start in {_OPEN_TIMEOUT:.0f} s",
                sandbox_id=self._handle.id,
                details={"stderr": link.tail.text},
            ) from None
        except BaseException:
            await self.close()
            raise
        self._forks = answers.get("forks") is True
        for number, (env_id, pipe, *known) in answers["there"].items():
            hosted = self._exchange.envs[int(number)] = Hosted(env_id, pipe)
            if known:  # a host of an older release sends no names
                self._exchange.names.add(int(number), known[0])
                self._exchange.names.watch(int(number), hosted, known[1])
                self._exchange.owners.add(int(number), known[2] if len(known) > 2 else None)
            if pipe is not None:
                self._exchange.greet(int(number), pipe)
        taken = {hosted.pipe for hosted in self._exchange.envs.values()}
        self._exchange.free = [pipe for pipe in PIPES if pipe not in taken]
        self._next_env = max((0, *self._exchange.envs)) + 1

    async def detach(self) -> None:
        """Detach from the host and leave it running, for `attach` by the next rocklet."""
        self._exchange.let_go(Lost("the rocklet is stopping", sandbox_id=self._handle.id))

    async def close(self) -> None:
        """Kill the host and all its environments. Idempotent; the sandbox may have ended already."""
        if self._exchange.link is not None:
            with contextlib.suppress(RockError):
                await self._exchange.link.process.kill_tree()
        self._exchange.let_go(NotFound("the environments of this sandbox were closed", sandbox_id=self._handle.id,
                                       hint="open a new environment"))

    # ---- environments ----

    async def make(
        self, env_id: str, kwargs: Mapping[str, Any] | None = None, *, timeout: float | None = None, **more: Any
    ) -> int:
        """Make an environment in a process of its own; returns its number, which identifies it in requests.

        timeout: seconds for each later request, instead of the host's timeout. more: "protocol" and its parameters for
        guest/environments/hosting.py; "name", by which `number_of` finds it; "idle", seconds without a request after
        which it is closed; "owner", whose lease it is released with. NotFound for an unknown id, with the nearest one;
        ActionError with the traceback when the constructor fails.
        """
        number = self._next_env
        self._next_env += 1
        self._exchange.names.add(number, more.get("name"))
        free = self._exchange.free
        hosted = self._exchange.envs[number] = Hosted(env_id, free.pop() if free else None)
        spec = {"env_id": env_id, "kwargs": dict(kwargs or {}), "pipe": hosted.pipe, **more}
        batch = Batch(1)
        try:
            self._exchange.send(batch, 0, MAKE, PLAIN, number, 0, NO_INDEX, json_of(spec))
            plain_of((await batch.future)[0])
        except BaseException:
            self._exchange.forget(number)
            raise
        hosted.timeout = timeout
        if hosted.timer is not None:  # that timer was for the construction
            hosted.timer.cancel()
            hosted.timer = None
        self._exchange.names.watch(number, hosted, more.get("idle"))
        self._exchange.owners.add(number, more.get("owner"))
        return number

    async def fork(
        self,
        number: int,
        count: int = 1,
        *,
        reseed: bool = False,
        names: Sequence[str] | None = None,
        idle: float | None = None,
        owner: str | None = None,
    ) -> list[int | RockError]:
        """Copy an environment's process `count` times, between two of its requests; returns the number of each child,
        or the error in its place. Children are independent of their parent, and have its timeout.

        reseed: draw new seeds in each child. names, idle, owner: of the children, as for `make`. Unsupported: a fork
        would not continue as its parent; Conflict: a name is in use.
        """
        parent = self._exchange.usable(number)
        if not self._forks:
            raise Unsupported("the process that hosts the environments cannot fork them", sandbox_id=self._handle.id,
                              hint="gVisor has no child subreaper, which a fork needs; with another runtime, the "
                                   "process is of an older release: use a new sandbox")  # fmt: skip
        numbers = range(self._next_env, self._next_env + count)
        named: dict[int, str | None] = dict(zip(numbers, names, strict=True)) if names else dict.fromkeys(numbers)
        self._next_env += count
        try:
            for child, name in named.items():
                self._exchange.names.add(child, name)
        except Conflict:
            for child in named:
                self._exchange.names.drop(child)
            raise
        children: dict[int, dict[str, Any]] = {}
        for child, name in named.items():
            free = self._exchange.free
            hosted = self._exchange.envs[child] = Hosted(parent.env_id, free.pop() if free else None)
            hosted.timeout = parent.timeout
            children[child] = {"env_id": parent.env_id, "pipe": hosted.pipe, "name": name, "idle": idle, "owner": owner}
        try:
            answers = await self._exchange.fork(number, children, reseed).future
        except BaseException:
            for child in children:
                self._exchange.forget(child)
            raise
        return [self._forked(child, answered, idle, owner) for child, answered in zip(children, answers, strict=True)]

    def _forked(self, number: int, answered: Answered, idle: float | None, owner: str | None) -> int | RockError:
        hosted = self._exchange.envs.get(number)
        if isinstance(answered, RockError) or hosted is None:
            self._exchange.forget(number)
            return answered if isinstance(answered, RockError) else NotFound(
                f"environment {number} was closed", sandbox_id=self._handle.id, hint="fork again")
        if hosted.timer is not None:  # that timer was for the fork
            hosted.timer.cancel()
            hosted.timer = None
        self._exchange.names.watch(number, hosted, idle)
        self._exchange.owners.add(number, owner)
        return number

    async def reset(
        self, number: int, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode: (observation, info) as JSON values."""
        spec = {"seed": seed} if options is None else {"seed": seed, "options": options}
        observation, info = await self._plain(RESET, number, spec)
        return observation, info

    async def step(
        self, number: int, action: Any, index: int | None = None
    ) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Execute one step: (observation, reward, terminated, truncated, info) as JSON values.

        index: number of the step in the episode: the same index again gets the same response, and any index other than
        the next one is a Conflict. EnvironmentRaised with the traceback when the environment raised (it stays usable),
        CommandTimeout when the step exceeded its timeout (the environment was killed), EnvironmentEnded with its last
        lines of output when its process has ended, NotFound when it was closed.
        """
        index = NO_INDEX if index is None else index
        observation, reward, terminated, truncated, info = await self._plain(STEP, number, action, index)
        return observation, reward, terminated, truncated, info

    async def call(self, number: int, what: str, arguments: Sequence[Any]) -> Any:
        """Call another method of an environment; its protocol defines the methods."""
        return await self._plain(CALL, number, [what, *arguments])

    def number_of(self, name: str) -> int:
        """The number of the environment that was made with that name; NotFound."""
        return self._exchange.names.number_of(name)

    async def close_env(self, number: int) -> None:
        """Close an environment in any state. Idempotent."""
        hosted = self._exchange.envs.get(number)
        if hosted is None or hosted.closed:
            return
        try:
            if hosted.lent is not None:
                hosted.lent(NotFound(f"environment {number} was closed", sandbox_id=self._handle.id,
                                     hint="open a new environment"))
                self.pipe_lending.take_back(number)
            if hosted.ended is None and self._exchange.failed is None:
                async with asyncio.timeout(_CLOSE_TIMEOUT):
                    await self._plain(CLOSE, number, None)
        except (RockError, TimeoutError):
            pass
        finally:
            self._exchange.forget(number)

    def renew(self, owner: str) -> int:
        """The client process `owner` is alive. Returns the number of its environments here."""
        return self._exchange.owners.renew(owner)

    async def release(self, owner: str) -> int:
        """Close all environments of an owner. Returns their number."""
        numbers = self._exchange.owners.of(owner)
        await asyncio.gather(*(self.close_env(number) for number in numbers))
        return len(numbers)

    def load(self) -> tuple[int, int]:
        """(existing environments, environments made since the rocklet started)."""
        return len(self.environments()), self._next_env - 1

    async def exchange(self, asked: Sequence[Frame]) -> list[Answered]:
        """Responses of environments to these frames, in the same order; each may be an error of its own.

        Frames of several environments run in parallel, those of one environment in order. A response is a complete
        frame with the id of its request.
        """
        for _, _, number, *_ in asked:
            if self._exchange.is_lent(number):
                await self.pipe_lending.at_home(number)
        batch = Batch(len(asked))
        for place, (op, flags, number, id, index, payload) in enumerate(asked):
            try:
                if op not in (RESET, STEP, CALL):
                    raise InvalidConfig(f"a frame has the unknown op {op}",
                                        hint="use reset, step or call; update the client when the server is older")
                self._exchange.send(batch, place, op, flags, number, id, index, payload)
            except RockError as error:
                batch.put(place, error)
        return await batch.future

    def environments(self) -> dict[int, str]:
        """Numbers and ids of the existing environments."""
        return {number: h.env_id for number, h in self._exchange.envs.items() if h.ended is None and not h.closed}

    async def _plain(self, op: int, number: int, value: Any, index: int = NO_INDEX) -> Any:
        await self.pipe_lending.at_home(number)
        return await self._exchange.plain(op, number, value, index)

    @property
    def failed(self) -> RockError | None:
        """The reason why the host has ended; None while it serves. The sandbox may then start a new one."""
        return self._exchange.failed
