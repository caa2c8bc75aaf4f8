"""`rock model-service`: ROCK's model service over a run of the gateway, for scripts that act as the model."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from rock import settings
from rock.cli.output import as_json
from rock.cli.parsing import Group, json_option
from rock.errors import InvalidConfig
from rock.host import atomic_file
from rock.sync import Sandbox
from rock.sync.sandbox.model_service.base import ModelService, ModelServiceConfig


@click.group(cls=Group)
def model_service() -> None:
    """Answer the model calls of an agent.

    `start` creates a run and opens a port in the sandbox. The agent calls it there; `anti-call-llm` answers one call
    and prints the next request. Nothing is installed in the sandbox.
    """


def _file() -> Path:
    """The state of the last started service. It has the secret of the run: mode 0600."""
    return settings.home() / "model-service.json"


def _keep(service: ModelService) -> None:
    path = _file()
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_file.replace(path, json.dumps(service.state()))


def _resume() -> ModelService:
    """The started service. InvalidConfig when there is none."""
    try:
        state = json.loads(_file().read_bytes())
        sandbox = Sandbox()
        sandbox.sandbox_id = str(state["sandbox"])  # not looked up: it may have ended
        return ModelService.resume(sandbox, state)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise InvalidConfig("no model service was started here",
                            hint="rock model-service start --sandbox ID") from None


@model_service.command(example="rock model-service start --sandbox web --type local --port 8080")
@click.option("--sandbox", required=True, metavar="ID", help="Sandbox of the agent.")
@click.option("--type", "kind", type=click.Choice(["local", "proxy"]), default="local", show_default=True,
              help="local: you answer the calls. proxy: an upstream answers, or a recording.")  # fmt: skip
@click.option("--port", type=click.IntRange(1024, 65535), default=8080, show_default=True, help="Port inside.")
@click.option("--upstream", metavar="NAME", help="Upstream of the gateway, for type proxy.")
@click.option("--proxy-base-url", metavar="URL", help="Address of the upstream instead of its name.")
@click.option("--proxy-api-key", metavar="KEY", envvar="ROCK_PROXY_API_KEY", help="Key of that address.")
@click.option("--request-timeout", type=float, metavar="SECONDS", help="Seconds without a byte of that address.")
@click.option("--recording-file", metavar="PATH", help="Recording inside the sandbox; by default "
              "/data/logs/LLMTraj.jsonl for type proxy.")  # fmt: skip
@click.option("--replay-file", metavar="PATH", help="Recording inside the sandbox to replay, for type proxy.")
@click.option("--host", hidden=True, help="Accepted for ROCK's command line: the port is on the loopback interface.")
@click.option("--retryable-status-codes", hidden=True, help="Accepted for ROCK's command line.")
@json_option
def start(
    sandbox: str, kind: str, port: int, upstream: str | None, proxy_base_url: str | None, proxy_api_key: str | None,
    request_timeout: float | None, recording_file: str | None, replay_file: str | None, host: str | None,
    retryable_status_codes: str | None, json_: bool,
) -> None:  # fmt: skip
    """Create a run for an agent in a sandbox, and print the variables for the agent.

    An earlier service of this user stops.
    """
    if _file().exists():
        _stop()
    given = {"--type": kind, "--port": port, "--proxy-base-url": proxy_base_url, "--proxy-api-key": proxy_api_key,
             "--request-timeout": request_timeout, "--recording-file": recording_file,
             "--replay-file": replay_file}  # fmt: skip
    words = [f"{name}={value}" for name, value in given.items() if value is not None]
    config = ModelServiceConfig(type=kind, upstream=upstream, start_cmd=f"rock model-service start {shlex.join(words)}")
    service = ModelService(Sandbox.connect(sandbox), config)
    with _values():
        service.install()
        service.start()
    _keep(service)
    if json_:
        assert service.run is not None
        as_json({"run": service.run.id, "base_url": service.run.base_url, "environ": service.environ})
    else:
        for name, value in sorted(service.environ.items()):
            print(f"export {name}={shlex.quote(value)}")


@model_service.command("watch-agent", example="rock model-service watch-agent --pid 42")
@click.option("--pid", type=int, required=True, help="Process of the agent inside the sandbox.")
@click.option("--host", hidden=True)
@click.option("--port", hidden=True)
def watch_agent(pid: int, host: str | None, port: str | None) -> None:
    """Let anti-call-llm print SESSION_END once a process of the sandbox has ended."""
    service = _resume()
    service.watch_agent(pid)
    _keep(service)


@model_service.command("anti-call-llm", example="rock model-service anti-call-llm --index 0")
@click.option("--index", type=int, required=True, help="Number of the call to answer, from 1; 0 answers none.")
@click.option("--response", metavar="JSON", help="Chat completion that answers it.")
@click.option("--response-file", type=click.Path(exists=True, dir_okay=False), help="File with it; deleted afterwards.")
@click.option("--timeout", type=float, default=600.0, show_default=True, metavar="SECONDS", help="Time limit.")
def anti_call_llm(index: int, response: str | None, response_file: str | None, timeout: float) -> None:
    """Answer a call, and print the next request as JSON or SESSION_END."""
    if response is not None and response_file is not None:
        raise InvalidConfig("--response and --response-file exclude each other", hint="give one of them")
    if response_file is not None:
        response = Path(response_file).read_text()
    service = _resume()
    with _values():
        request = service.anti_call_llm(index, response, timeout)
    if response_file is not None:
        Path(response_file).unlink()
    _keep(service)
    print(request)


@model_service.command(example="rock model-service stop")
def stop() -> None:
    """End the run. Nothing happens when no service was started."""
    if _file().exists():
        _stop()


def _stop() -> None:
    try:
        _resume().stop()
    finally:
        _file().unlink(missing_ok=True)


class _values:
    """ValueError and RuntimeError of the service as an error of the command."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError | RuntimeError):
            raise InvalidConfig(str(error), hint="rock model-service --help") from None
