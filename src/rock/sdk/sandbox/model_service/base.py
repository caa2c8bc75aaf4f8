"""ROCK's `ModelService` as a client of a run of the model gateway. Nothing is installed in the sandbox.

    type "local"    a run in pull mode: the caller is the model, by `anti_call_llm`
    type "proxy"    a run with an upstream, recorded; or with recorded responses (--replay-file)

The agent calls http://127.0.0.1:PORT/v1 in the sandbox, in any dialect, with the key in `environ`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, Self

from pydantic import Field

from rock import errors
from rock.protocol.runs import RunInfo
from rock.protocol.wire import Wire
from rock.sdk.sandbox.files import Files
from rock.sdk.sandbox.model_service.records import CHAT, replay_of, rock_records
from rock.sdk.sandbox.processes import Processes
from rock.sdk.sandbox.runs import Run, Runs, Upstreams
from rock.sdk.sandbox.runtime_env.config import PythonRuntimeEnvConfig
from rock.sdk.transport import Transport

SESSION_END = "SESSION_END"
PORT = 8080  # ROCK's
TRAJECTORY = "LLMTraj.jsonl"

_CHECK = 1.0  # seconds between two looks at the watched process
_TIMEOUT = 20.0
# Its argument: a process id. A zombie has ended.
_ALIVE = """
[ -d "/proc/$1" ] || exit 1
while read -r name value rest; do
    [ "$name" = State: ] && { [ "$value" != Z ]; exit; }
done < "/proc/$1/status"
exit 1
"""


class Host(Protocol):
    """What a ModelService uses of its `Sandbox`."""

    sandbox_id: str | None
    files: Files
    processes: Processes
    _transport: Transport


class ModelServiceConfig(Wire):
    """ROCK's fields. `start_cmd` is read for its options (--type, --port, --proxy-base-url, --recording-file,
    --replay-file); no command is executed, so the other commands and the runtime environment have no effect.

    logging_path: folder inside for the recording of type "proxy", unless --recording-file names a file.
    upstream: name of an upstream of the gateway for type "proxy", instead of --proxy-base-url.
    """

    enabled: bool = False
    type: str = "local"
    install_cmd: str = "pip install rl_rock[model-service]"
    install_timeout: int = Field(default=300, gt=0)
    runtime_env_config: PythonRuntimeEnvConfig = Field(default_factory=PythonRuntimeEnvConfig)
    start_cmd: str = "rock model-service start --type ${type}"
    stop_cmd: str = "rock model-service stop"
    config_ini_cmd: str = "mkdir -p ~/.rock && touch ~/.rock/config.ini"
    watch_agent_cmd: str = "rock model-service watch-agent --pid ${pid}"
    anti_call_llm_cmd: str = (
        "PYTHONWARNINGS=ignore rock model-service anti-call-llm --index ${index} --response ${response_payload}"
    )
    anti_call_llm_cmd_file: str = (
        "PYTHONWARNINGS=ignore rock model-service anti-call-llm --index ${index} --response-file ${response_file}"
    )
    anti_call_llm_cmd_no_response: str = "PYTHONWARNINGS=ignore rock model-service anti-call-llm --index ${index}"
    logging_path: str = "/data/logs"
    logging_file_name: str = "model_service.log"
    upstream: str | None = None


@dataclass(frozen=True)
class StartOptions:
    """The options of `rock model-service start`."""

    type: str = "local"
    port: int = PORT
    proxy_base_url: str | None = None
    proxy_api_key: str | None = None
    recording_file: str | None = None
    replay_file: str | None = None
    request_timeout: float | None = None

    def __post_init__(self) -> None:
        if self.type not in ("local", "proxy"):
            raise ValueError(f'type {self.type!r} is none of "local" and "proxy"')
        if self.recording_file and self.replay_file:
            raise ValueError("recording_file and replay_file are mutually exclusive: set one of them")
        if self.type == "local" and (self.replay_file or self.recording_file or self.proxy_base_url):
            raise ValueError('proxy_base_url, recording_file and replay_file are options of type "proxy"')

    @classmethod
    def of(cls, config: ModelServiceConfig) -> StartOptions:
        """Those in `config.start_cmd`. ValueError."""
        words = shlex.split(config.start_cmd.replace("${type}", config.type).replace("$type", config.type))
        if "start" not in words:
            return cls(config.type)
        parser = _Parser(prog="start_cmd", add_help=False, allow_abbrev=False)
        parser.add_argument("--type", default=config.type)
        parser.add_argument("--port", type=int, default=PORT)
        parser.add_argument("--request-timeout", type=float)
        for name in ("--proxy-base-url", "--proxy-api-key", "--recording-file", "--replay-file", "--host",
                     "--config-file", "--retryable-status-codes"):  # fmt: skip
            parser.add_argument(name)
        found = vars(parser.parse_known_args(words[words.index("start") + 1 :])[0])
        return cls(**{name: value for name, value in found.items() if name in cls.__dataclass_fields__})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"start_cmd of the model service: {message}")


class ModelService:
    """`ModelService(sandbox, ModelServiceConfig(enabled=True))`: install, start, watch_agent, anti_call_llm, stop.

    run: the run of the gateway, from `start` on. environ: variables that lead agents to it, with its secret.
    """

    def __init__(self, sandbox: Host, config: ModelServiceConfig) -> None:
        self._sandbox = sandbox
        self.config = config
        self.runtime_env: Any = None  # ROCK's; there is none
        self.is_installed = False
        self.is_started = False
        self._run: Run | None = None
        self._options = StartOptions()
        self._upstream: str | None = None
        self._pid: int | None = None
        self._session_ended = False
        self._last = 0  # index of the last answer
        self._numbers = {0: 0}  # number of the call by index

    @property
    def run(self) -> RunInfo | None:
        return None if self._run is None else self._run.info

    @property
    def environ(self) -> dict[str, str]:
        return {} if self._run is None else self._run.environ

    def state(self) -> dict[str, Any]:
        """What `resume` needs in another process, as JSON values. It has the secret of the run."""
        assert self._run is not None
        info = self._run.info.model_copy(update={"api_key": self._run.api_key, "environ": self._run.environ})
        return {
            "sandbox": self._sandbox.sandbox_id, "run": info.model_dump(mode="json"), "last": self._last,
            "config": self.config.model_dump(mode="json"), "upstream": self._upstream, "pid": self._pid,
            "ended": self._session_ended, "numbers": {str(index): n for index, n in self._numbers.items()},
        }  # fmt: skip

    @classmethod
    def resume(cls, sandbox: Host, state: dict[str, Any]) -> Self:
        """A started service, from the state of another process."""
        service = cls(sandbox, ModelServiceConfig.model_validate(state["config"]))
        service._options = StartOptions.of(service.config)
        service._run = Run(sandbox._transport, RunInfo.model_validate(state["run"]))
        service._upstream, service._pid, service._last = state["upstream"], state["pid"], int(state["last"])
        service._numbers = {int(index): int(number) for index, number in state["numbers"].items()}
        service._session_ended = bool(state["ended"])
        service.is_installed = service.is_started = True
        return service

    async def install(self) -> None:
        """Check the configuration. ValueError."""
        self._options = StartOptions.of(self.config)
        self.is_installed = True

    async def start(self) -> None:
        """Create the run and open its port in the sandbox; an earlier run of this service ends. RuntimeError: not
        installed. ValueError: the replay file is wrong. Conflict: the port is in use inside."""
        if not self.is_installed:
            raise RuntimeError(f"[{self._sandbox.sandbox_id}] Cannot start model service: call install() first")
        if self.is_started:
            await self.stop()
        spec: dict[str, Any] = {"port": self._options.port}
        if self._options.type == "local":
            spec["pull"] = True
        elif self._options.replay_file:
            text = (await self._sandbox.files.read(self._options.replay_file)).decode("utf-8", "replace")
            spec["replay"] = replay_of(text)
        else:
            spec["upstream"] = await self._upstream_name()
        self._run = await Runs(self._sandbox._transport).create(sandbox=self._sandbox.sandbox_id, **spec)
        self._pid, self._session_ended, self._last, self._numbers = None, False, 0, {0: 0}
        self.is_started = True

    async def _upstream_name(self) -> str:
        if self.config.upstream:
            return self.config.upstream
        if not self._options.proxy_base_url:
            raise ValueError("type proxy: name an upstream of the gateway in `upstream`, or use --proxy-base-url")
        self._upstream = f"model-service-{os.urandom(6).hex()}"
        url = self._options.proxy_base_url.rstrip("/")
        fields = {"timeout": self._options.request_timeout} if self._options.request_timeout else {}
        key = self._options.proxy_api_key
        await Upstreams(self._sandbox._transport).put(self._upstream, url, key=key, dialect=CHAT, **fields)
        return self._upstream

    async def stop(self) -> None:
        """End the run; type "proxy" writes the recording to the sandbox first. Nothing happens when it is stopped."""
        if not self.is_started or self._run is None:
            return
        self.is_started = False
        try:
            await self._run.end(reason="the model service was stopped")
        except (errors.Conflict, errors.NotFound):
            pass  # it was ended or deleted by its owner
        if self._options.type == "proxy" and not self._options.replay_file:
            path = self._options.recording_file or f"{self.config.logging_path}/{TRAJECTORY}"
            try:
                await self._sandbox.files.write(path, rock_records(await self._run.calls(dialect=CHAT)))
            except errors.SandboxError:
                pass  # the sandbox has ended; the run has the calls
        if self._upstream is not None:
            upstream, self._upstream = self._upstream, None
            await Upstreams(self._sandbox._transport).delete(upstream)

    async def watch_agent(self, pid: str | int) -> None:
        """From now on `anti_call_llm` returns "SESSION_END" once this process of the sandbox has ended. RuntimeError:
        not started."""
        if not self.is_started:
            raise RuntimeError(f"[{self._sandbox.sandbox_id}] Cannot watch agent: call start() first")
        self._pid = int(pid)

    async def anti_call_llm(
        self, index: int, response_payload: str | None = None, call_timeout: float = 600, check_interval: float = 3
    ) -> str:
        """Answer call `index` with a chat completion, and wait for the next call: its request as JSON, or
        "SESSION_END". Index 0 has no answer and waits for call 1. A repetition with the same index is allowed, and does
        not replace the answer.

        call_timeout: seconds. check_interval has no effect: the call returns when the request arrives. RuntimeError:
        not started, or timeout. ValueError: the index is negative or smaller than the last one, index 0 has an answer,
        another has none, or the answer is not a JSON object.
        """
        run = self._run
        if run is None or not self.is_started:
            raise RuntimeError(f"[{self._sandbox.sandbox_id}] Cannot execute anti-call LLM: call start() first")
        deadline = time.monotonic() + call_timeout
        if index < 0:
            raise ValueError("index must be 0 or greater")
        if (index == 0) == bool(response_payload):
            raise ValueError("index 0 has no response_payload, and every other index has one")
        if index < self._last:
            raise ValueError(f"index {index} must not be smaller than the last answered index {self._last}")
        if self._session_ended:
            return SESSION_END
        if response_payload and index > self._last:
            await self._answer(run, index, response_payload)
        return await self._request(run, index + 1, deadline)

    async def _answer(self, run: Run, index: int, payload: str) -> None:
        try:
            response = json.loads(payload)
        except ValueError:
            response = None
        if not isinstance(response, dict):
            raise ValueError(f"response_payload of index {index} is not a JSON object")
        try:
            await run.answer(self._numbers.get(index, index), response, dialect=CHAT)
        except errors.NotFound:
            raise ValueError(f"index {index}: there is no such call yet") from None
        except errors.Conflict:
            pass  # the agent gave up this call, or an earlier request answered it and its response was lost
        self._last = index

    async def _request(self, run: Run, index: int, deadline: float) -> str:
        """The request of the call with that index."""
        after, ended = self._numbers.get(index - 1, index - 1), False
        while True:
            left = deadline - time.monotonic()
            wait = 0.0 if ended else max(0.0, min(left, _TIMEOUT if self._pid is None else _CHECK))
            found = await run.next(after, wait=wait, dialect=CHAT)
            if found.call is not None:
                self._numbers[index] = found.call.number
                return json.dumps(found.call.request, ensure_ascii=False)
            if ended or found.state == "ended":
                self._session_ended = True
                return SESSION_END
            if left <= 0:
                raise RuntimeError(f"Anti-call LLM command failed: call {index} did not arrive in time")
            # A process that has ended makes no further call: one more look finds what it has sent before.
            ended = self._pid is not None and not await self._is_alive(self._pid)

    async def _is_alive(self, pid: int) -> bool:
        try:
            seen = await self._sandbox.processes.run(["sh", "-c", _ALIVE, "sh", str(pid)], timeout=10.0)
        except errors.SandboxError:
            return False
        return seen.exit_code == 0
