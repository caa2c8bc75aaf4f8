"""The client of environments: their host sandbox, frames over a kept-alive connection, and leases.

Every request has a number that identifies it, so a request whose response was lost is repeated and executed once.

One daemon thread renews the leases of all environments of this process. At the interpreter's exit they are released at
once; after a kill the renewals stop, and the server releases them when the lease expires. A forked child has its own
owner id. It also renews its parent's leases once it uses an inherited environment.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import secrets
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from rock import errors, settings
from rock.envs.local_transport import LocalTransport, TransportUnavailable, reach
from rock.envs.progress import INTERVAL, StartProgress
from rock.envs.progress import Report as Report
from rock.guest.environments import frames, values
from rock.guest.environments.frames import ERROR, HEAD, RESET
from rock.protocol.env import MOST_FORKS, EnvAbout, EnvInfo, ForkedEnvs, OpenEnv
from rock.protocol.routes import FRAMES_TYPE, ROUTES
from rock.protocol.sandbox import SandboxConfig, SandboxInfo, State
from rock.sync.sandbox.link import end_of, parse, path, transport_of
from rock.sync.transport import Transport

POLL = 20.0  # seconds of one long poll
SLACK = 30.0
_CLOSE = 5.0  # seconds of retries of a close; afterwards the lease of the environment expires

Graph = Callable[[Any, Any, Any], Any]


# ---- requests ----

_NO_WAYS: dict[int, LocalTransport] = {}


class EnvironmentCall:
    """A request to an environment: `op` and `value` as in guest/environments/frames.py; `index` of a step, else any
    number. `ways`: pipes by environment, of the client that created it."""

    __slots__ = ("env", "index", "op", "value", "ways")

    def __init__(
        self, env: int, op: int, value: Any, index: int | None = None, ways: dict[int, LocalTransport] | None = None
    ) -> None:
        self.env = env
        self.ways = _NO_WAYS if ways is None else ways
        self.op = op
        self.value = value
        self.index = secrets.randbits(62) if index is None else index

    def parts(self) -> list[bytes]:
        """The value as byte strings; InvalidConfig for a value that cannot be encoded."""
        try:
            return values.encode(self.value)
        except values.Unsendable as error:
            raise errors.InvalidConfig(f"the value cannot be sent to an environment: {error}",
                                       hint="send plain data: None, bool, int, float, str, bytes, lists, dictionaries "
                                            "and NumPy arrays") from None

    def frame(self, id: int, parts: list[bytes]) -> bytes:
        length = sum(len(part) for part in parts)
        return b"".join((HEAD.pack(length, self.op, 0, self.env, id, self.index), *parts))


class EnvironmentClient:
    """A sandbox that hosts environments.

    base_url, api_key: default to ROCK_BASE_URL and ROCK_API_KEY. config: limits of a dedicated sandbox, which `close`
    stops; `exclusive` requests one too. timeout: seconds for one reset, step or call, after which the environment is
    killed; None uses the server's default. progress: how `open` reports the phases of the start: see `Report`.
    """

    def __init__(
        self,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        config: SandboxConfig | None = None,
        exclusive: bool = False,
        timeout: float | None = None,
        graph: Graph | None = None,
        progress: Report = None,
    ) -> None:
        if config is not None and base_url is None and api_key is None:
            self.transport = transport_of(config)
        else:
            self.transport = Transport(base_url or settings.base_url(), api_key or settings.api_key())
        if timeout is not None and not 0 < timeout < math.inf:  # rejects nan too
            raise errors.InvalidConfig(
                f"step_timeout={timeout!r} is not a number of seconds above 0",
                hint="pass a positive number, or None for the server's limit",
            )
        self.exclusive = exclusive or config is not None
        self.sandbox_id = ""
        self._config = config
        self._limit = timeout
        self._timeout = None if timeout is None else timeout + SLACK  # the server reports the timeout first
        self._graph = graph
        self._progress = progress
        self._target = ""
        self.ways: dict[int, LocalTransport] = {}
        self._lock = threading.Lock()
        self._users = 0  # open environments of this client
        self._owners: dict[int, str] = {}  # by environment: the owner of its lease

    def open(self, spec: OpenEnv, timeout: float) -> None:
        """Find or start the sandbox. The first use installs the packages of its family."""
        spec.exclusive = self.exclusive
        if self._config is not None:
            spec.config = self._config
        with StartProgress(spec.env_id, self._progress) as progress:
            info = self._opened(spec, timeout, progress)
            if info.state is not State.RUNNING:
                raise end_of(info)
        self.sandbox_id = info.sandbox_id
        self._target = ROUTES["env_frames"].url(sandbox_id=self.sandbox_id)

    def _opened(self, spec: OpenEnv, timeout: float, progress: StartProgress) -> SandboxInfo:
        """The sandbox once it is no longer pending. StartFailed after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        poll = INTERVAL if progress.wanted else POLL
        target = f"{ROUTES['open_env'].path}?wait={min(poll, timeout):.3f}"
        body = spec.model_dump(mode="json", exclude_unset=True)
        info = parse(SandboxInfo, self.transport.json("POST", target, body, timeout=POLL + SLACK))
        while info.state is State.PENDING:
            progress.show(info)
            left = deadline - time.monotonic()
            if left <= 0:
                raise errors.StartFailed(f"{spec.env_id} was not ready within {timeout:g} seconds",
                                         sandbox_id=info.sandbox_id,
                                         hint="raise start_timeout, or check with `rock ps` whether the server has "
                                              "free capacity")
            target = f"{path('get_sandbox', info.sandbox_id)}?wait={min(left, poll):.3f}"
            info = parse(SandboxInfo, self.transport.json("GET", target, timeout=POLL + SLACK))
        return info

    def make(self, spec: dict[str, Any], timeout: float) -> int:
        """Create an environment (fields of MakeEnv); returns its number."""
        target = ROUTES["make_env"].url(sandbox_id=self.sandbox_id)
        spec = {**spec, "owner": LEASES.owner}
        if self._limit is not None:
            spec["timeout"] = self._limit
        try:
            body = orjson.dumps(spec, option=orjson.OPT_SERIALIZE_NUMPY)
        except TypeError as error:
            raise errors.InvalidConfig(f"the arguments of the environment cannot be written as JSON: {error}",
                                       hint="use strings, numbers, bools, None, lists and dictionaries with text "
                                            "keys") from None
        try:
            answer = orjson.loads(self.transport.call("POST", target, body, timeout=timeout))
        except orjson.JSONDecodeError as error:
            raise errors.ServerError(f"malformed answer: {error}") from None
        made = parse(EnvInfo, answer)
        self._hold(made)
        return made.env

    def _hold(self, made: EnvInfo) -> None:
        """Renew the lease of an environment from now on, and borrow its pipes where possible."""
        with self._lock:
            self._users += 1
        if made.lease is not None:  # an older server returns none
            self._owners[made.env] = LEASES.hold(self.transport, self.sandbox_id, made.lease)
        if settings.env_pipes():
            pipes = reach(made, self.transport.address.host, shared=settings.env_shared())
            if pipes is not None:
                self.ways[made.env] = pipes

    def fork(self, number: int, count: int, reseed: bool, partial: bool) -> list[int]:
        """Fork an environment; returns the numbers of its children. Without `partial`, an error of one child closes the
        others and is raised."""
        if type(count) is not int or not 1 <= count <= MOST_FORKS:
            raise errors.InvalidConfig(f"n={count!r} is no number of children",
                                       hint=f"a fork has 1 to {MOST_FORKS} children; fork again for more")
        target = ROUTES["fork_env"].url(sandbox_id=self.sandbox_id, env=str(number))
        body = {"count": count, "reseed": bool(reseed), "owner": LEASES.owner}
        made = parse(ForkedEnvs, self.transport.json("POST", target, body, timeout=self._timeout)).items
        started = [child for child in made if child.error is None]
        for child in started:
            self._hold(child)
        failures = [child.error for child in made if child.error is not None]
        if len(made) != count or (failures and not partial):
            for child in started:
                self.close_env(child.env)
                self.close()
            raise errors.from_wire(failures[0]) if failures else errors.ServerError("malformed answer: no children")
        return [child.env for child in started]

    def ask(self, wanted: EnvironmentCall) -> Any:
        """The response of an environment. Raises its error, Unavailable, ServerError."""
        found = self.ask_all([wanted])[0]
        if isinstance(found, errors.RockError):
            raise found
        return found

    def ask_all(self, wanted: Sequence[EnvironmentCall]) -> list[Any]:
        """Responses in the order of the requests, concurrent across environments; an error takes the place of its
        response."""
        parts = [ask.parts() for ask in wanted]
        answers: list[Any] = [None] * len(wanted)
        if len(wanted) == 1 and (pipes := wanted[0].ways.get(wanted[0].env)) is not None:
            over_http: list[int] = []
            if self._begun(pipes, wanted[0], parts[0], 0, answers, over_http):
                self._finish(pipes, wanted[0], 0, answers, over_http)
            return self._over_http(wanted, parts) if over_http else answers
        if not any(ask.env in ask.ways for ask in wanted):
            return self._over_http(wanted, parts)
        left = sorted(range(len(wanted)), key=lambda place: wanted[place].env)  # a common lock order
        while left:
            left = self._round(wanted, parts, left, answers)
        return answers

    def _round(
        self, wanted: Sequence[EnvironmentCall], parts: list[list[bytes]], places: list[int], answers: list[Any]
    ) -> list[int]:
        """Send one request to each environment; returns the requests for the next round."""
        begun: list[tuple[int, LocalTransport]] = []
        over_http: list[int] = []
        later: list[int] = []
        try:
            for place in places:
                ask = wanted[place]
                pipes = ask.ways.get(ask.env)
                if pipes is None:
                    over_http.append(place)
                elif begun and wanted[begun[-1][0]].env == ask.env:
                    later.append(place)
                elif self._begun(pipes, ask, parts[place], place, answers, over_http):
                    begun.append((place, pipes))
        finally:
            for place, pipes in begun:
                self._finish(pipes, wanted[place], place, answers, over_http)
        if over_http:
            over_http.sort()
            found = self._over_http([wanted[place] for place in over_http], [parts[place] for place in over_http])
            for place, answer in zip(over_http, found, strict=True):
                answers[place] = answer
        return later

    def _begun(
        self,
        pipes: LocalTransport,
        ask: EnvironmentCall,
        parts: list[bytes],
        place: int,
        answers: list[Any],
        over_http: list[int],
    ) -> bool:
        try:
            pipes.begin(ask.op, ask.index, parts)
            return True
        except (TransportUnavailable, errors.RockError) as error:
            _lost(ask, place, error, answers, over_http)
        return False

    def _finish(
        self, pipes: LocalTransport, ask: EnvironmentCall, place: int, answers: list[Any], over_http: list[int]
    ) -> None:
        try:
            op, payload = pipes.finish()
            answers[place] = self.read(pipes, op, payload)
        except (TransportUnavailable, errors.RockError) as error:
            _lost(ask, place, error, answers, over_http)

    def read(self, pipes: LocalTransport, op: int, payload: memoryview) -> Any:
        """The value of a response over pipes; raises its error."""
        try:
            return pipes.error(payload) if op == ERROR else values.decode(payload, self._graph)
        except ValueError as error:
            return self._malformed(error)

    def _malformed(self, error: ValueError) -> errors.ServerError:
        return errors.ServerError(f"malformed answer of an environment: {error}", sandbox_id=self.sandbox_id)

    def _over_http(self, wanted: Sequence[EnvironmentCall], parts: list[list[bytes]]) -> list[Any]:
        raw = self._post(b"".join([ask.frame(id, parts[id]) for id, ask in enumerate(wanted)]))
        try:
            answers = list(frames.split(raw))
            if [found[3] for found in answers] != list(range(len(wanted))):
                raise ValueError("answers to something else")
            return [self._value(op, payload) for op, _, _, _, _, payload in answers]
        except ValueError as error:
            raise self._malformed(error) from None

    def _post(self, body: bytes) -> bytes:
        LEASES.used()
        return self.transport.call("POST", self._target, body, timeout=self._timeout, content_type=FRAMES_TYPE,
                                   limit=self._limit, views=True)  # fmt: skip

    def _value(self, op: int, payload: Any) -> Any:
        if op == ERROR:
            return errors.from_wire(orjson.loads(payload))
        return values.decode(payload, self._graph)

    def close_env(self, number: int) -> None:
        """End its process. No effect when the environment or its sandbox is gone."""
        if (pipes := self.ways.pop(number, None)) is not None:
            pipes.close()
        if (owner := self._owners.pop(number, None)) is not None:
            LEASES.drop(self.transport, self.sandbox_id, owner)
        try:
            target = ROUTES["close_env"].url(sandbox_id=self.sandbox_id, env=str(number))
            self.transport.json("DELETE", target, timeout=SLACK, deadline=_CLOSE)
        except (errors.NotFound, errors.SandboxError):
            return

    def list_envs(self) -> list[dict[str, str]]:
        """The environments of the server."""
        answer = self.transport.json(ROUTES["list_envs"].method, ROUTES["list_envs"].path)
        items = answer.get("items") if isinstance(answer, dict) else None
        if not isinstance(items, list):
            raise errors.ServerError("malformed answer: no list of environments")
        return items

    def about(self, env_id: str) -> EnvAbout:
        """The server's details of an environment. NotFound."""
        target = ROUTES["about_env"].path + "?" + urllib.parse.urlencode({"id": env_id})
        return parse(EnvAbout, self.transport.json("GET", target))

    def close(self) -> None:
        """End the use by one environment: without another one, stop the sandbox, unless it is shared."""
        with self._lock:
            self._users -= 1
            in_use = self._users > 0
        if in_use or not self.exclusive or not self.sandbox_id:
            return
        try:
            self.transport.json("POST", path("stop_sandbox", self.sandbox_id), timeout=SLACK)
        except errors.RockError:
            return


def _lost(
    ask: EnvironmentCall,
    place: int,
    error: TransportUnavailable | errors.RockError,
    answers: list[Any],
    over_http: list[int],
) -> None:
    """Drop unusable pipes: the server handles the request, or the error is the response."""
    ask.ways.pop(ask.env, None)
    if isinstance(error, TransportUnavailable):
        over_http.append(place)
    else:
        answers[place] = error


class EnvironmentHandle:
    """One environment: its requests, and the number of its next step."""

    def __init__(self, link: EnvironmentClient, number: int) -> None:
        self.link = link
        self.number = number
        self.index = 0

    def ask_reset(self, seed: Any = None, options: dict[str, Any] | None = None) -> EnvironmentCall:
        return self._ask(RESET, {"seed": seed} if options is None else {"seed": seed, "options": options})

    def ask_step(self, action: Any) -> EnvironmentCall:
        return self._ask(frames.STEP, action, self.index)

    def was_reset(self, found: Any) -> tuple[Any, Any]:
        """(observation, info) of a response; raises its error."""
        if isinstance(found, errors.RockError):
            raise found
        if type(found) is not list or len(found) != 2:
            raise errors.ServerError("malformed answer of an environment: no result of a reset")
        self.index = 0
        return found[0], found[1]

    def was_stepped(self, found: Any) -> tuple[Any, Any, Any, Any, Any]:
        """(observation, reward, terminated, truncated, info) of a response; raises its error."""
        if isinstance(found, errors.RockError):
            self.index = found.details.get("next", self.index)  # a step that raised counts too
            raise found
        if type(found) is not list or len(found) != 5:
            raise errors.ServerError("malformed answer of an environment: no result of a step")
        self.index += 1
        return found[0], found[1], found[2], found[3], found[4]

    def reset(self, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        return self.was_reset(self.link.ask_all([self.ask_reset(seed, options)])[0])

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, Any]:
        return self.was_stepped(self.link.ask_all([self.ask_step(action)])[0])

    def call(self, what: str, *arguments: Any) -> Any:
        return self.link.ask(self._ask(frames.CALL, [what, *arguments]))

    def fork(self, n: int, reseed: bool, partial: bool) -> list[EnvironmentHandle]:
        """Handles of copies of this environment, at the same step."""
        children = [EnvironmentHandle(self.link, number) for number in self.link.fork(self.number, n, reseed, partial)]
        for child in children:
            child.index = self.index
        return children

    def _ask(self, op: int, value: Any, index: int | None = None) -> EnvironmentCall:
        return EnvironmentCall(self.number, op, value, index, self.link.ways)


# ---- leases of environments ----

_RENEWALS = 5  # renewals per lease
_TIMEOUT = 5.0  # seconds of one renewal
_EXIT_TIMEOUT = 2.0  # seconds of one release at the exit
_Key = tuple[str, str, str]  # server, sandbox, owner


@dataclass
class _Lease:
    transport: Transport
    seconds: float
    environments: int = 0


class Leases:
    """The leases of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[_Key, _Lease] = {}
        self._wake = threading.Event()
        self._begin()

    def _begin(self) -> None:
        self.owner = secrets.token_urlsafe(16)
        self._process = os.getpid()
        self._thread: threading.Thread | None = None

    def forked(self) -> None:
        """Reset in a forked child: the parent's threads are missing, and locks may be held without an owner."""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._begin()

    def hold(self, transport: Transport, sandbox_id: str, seconds: float) -> str:
        """Record an environment with a lease of `seconds` in that sandbox. Returns its owner, for `drop`."""
        with self._lock:
            key = (transport.url, sandbox_id, self.owner)
            lease = self._held.setdefault(key, _Lease(transport, seconds))
            lease.environments += 1
            lease.seconds = min(lease.seconds, seconds)
            self._start()
        return self.owner

    def drop(self, transport: Transport, sandbox_id: str, owner: str) -> None:
        """Record the close of an environment. Idempotent."""
        with self._lock:
            key = (transport.url, sandbox_id, owner)
            lease = self._held.get(key)
            if lease is not None:
                lease.environments -= 1
                if lease.environments <= 0:
                    del self._held[key]

    def used(self) -> None:
        """Start renewals in this process, which may be a forked child, when it uses an environment."""
        if self._thread is None and self._held:
            with self._lock:
                self._start()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="rock-env-lease", daemon=True)
            self._thread.start()
        self._wake.set()

    def _run(self) -> None:
        while True:
            with self._lock:
                shortest = min((lease.seconds for lease in self._held.values()), default=60.0)
            self._wake.wait(shortest / _RENEWALS)
            self._wake.clear()
            self.renew()
            time.sleep(min(1.0, shortest / _RENEWALS / 2))  # groups simultaneous creates in one renewal

    def renew(self) -> None:
        """Renew all leases. A failed renewal is retried the next time."""
        with self._lock:
            held = list(self._held.items())
        silent: set[str] = set()
        for key, lease in held:
            url, sandbox_id, owner = key
            if url in silent:
                continue
            target = ROUTES["renew_envs"].url(sandbox_id=sandbox_id, owner=owner)
            try:
                lease.transport.json("POST", target, timeout=_TIMEOUT, deadline=0.0)
            except (errors.NotFound, errors.SandboxError):
                with self._lock:
                    self._held.pop(key, None)
            except errors.RockError:
                silent.add(url)

    def release(self) -> None:
        """At the exit, close the open environments of this process."""
        if self._process != os.getpid():
            return
        with self._lock:
            held = [(key, lease) for key, lease in self._held.items() if key[2] == self.owner]
            self._held.clear()
        silent: set[str] = set()
        for (url, sandbox_id, owner), lease in held:
            if url in silent:
                continue
            target = ROUTES["release_envs"].url(sandbox_id=sandbox_id, owner=owner)
            try:
                lease.transport.json("DELETE", target, timeout=_EXIT_TIMEOUT, deadline=0.0)
            except (errors.NotFound, errors.SandboxError):
                continue
            except errors.RockError:
                silent.add(url)


LEASES = Leases()
os.register_at_fork(after_in_child=LEASES.forked)


def _at_exit() -> None:
    with contextlib.suppress(Exception):  # the process ends; the server releases them after the lease
        LEASES.release()


atexit.register(_at_exit)
