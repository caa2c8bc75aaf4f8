"""The environment class of mini-SWE-agent: one sandbox for one agent.

    environment:
      environment_class: rock.integrations.minisweagent.RockEnvironment
      image: python:3.11
      cwd: /testbed

`python -m rock.integrations.minisweagent swebench ...` runs the SWE-bench command of mini-SWE-agent with sandboxes in
place of Docker containers.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
from typing import Any

from minisweagent import environments
from minisweagent.exceptions import Submitted
from pydantic import BaseModel, ConfigDict, Field

from rock import errors
from rock.sync import Sandbox

LABELS = {"rock.integration": "minisweagent"}  # of all sandboxes of this class
MARKER = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
_MERGED = ("/bin/sh", "-c", 'exec "$@" 2>&1', "sh")  # both outputs in the order of arrival
_SECRET = ("api_key", "registry_password", "xrl_authorization", "extra_headers")  # left out of trajectories
_COMMANDS = ("swebench", "swebench_single")


class RockEnvironmentConfig(BaseModel):
    """Options: those of mini-SWE-agent's Docker environment, and those of `rock.Sandbox`.

    cwd: directory of commands; "" is that of the image. env: variables of commands. timeout: seconds of a command.
    interpreter: its last argument is the command. idle_timeout: seconds without a command after which the sandbox
    stops; it must exceed the longest response of the model.
    """

    model_config = ConfigDict(extra="allow")

    image: str
    cwd: str = "/"
    env: dict[str, str] = {}
    timeout: int = 30
    interpreter: list[str] = Field(default=["bash", "-lc"], min_length=1)
    idle_timeout: int = 3600

    def options(self) -> dict[str, Any]:
        """Keywords of `Sandbox`."""
        return {"idle_timeout": self.idle_timeout, **(self.__pydantic_extra__ or {})}


class RockEnvironment:
    """A sandbox in which an agent runs commands, each in a shell of its own. sandbox: the sandbox, which is running.

    kwargs: fields of RockEnvironmentConfig, and options of `rock.Sandbox` such as base_url, memory and network.
    """

    def __init__(self, *, config_class: type[RockEnvironmentConfig] = RockEnvironmentConfig, **kwargs: Any) -> None:
        self._process = os.getpid()
        self.sandbox: Sandbox | None = None
        secret = {name: kwargs.pop(name) for name in _SECRET if name in kwargs}
        self.config = config_class(**kwargs)
        options = {**self.config.options(), **secret}
        options["labels"] = {**LABELS, **options.get("labels", {})}
        sandbox = Sandbox(self.config.image, **options)
        sandbox.start()
        self.sandbox = sandbox

    def execute(self, action: dict[str, Any], cwd: str = "", *, timeout: int | None = None) -> dict[str, Any]:
        """Run the command of an action: {"output", "returncode", "exception_info"}. A command that could not be run or
        took too long has the status -1, and the output so far. Submitted: it has submitted the result.

        SandboxError, Unauthorized, Forbidden: the sandbox has ended, or the key is invalid; further commands would
        fail too.
        """
        if self.sandbox is None:
            raise errors.Conflict("the environment was cleaned up", hint="make a new one")
        limit = timeout or self.config.timeout
        command = [*_MERGED, *self.config.interpreter, str(action.get("command", ""))]
        try:
            done = self.sandbox.exec(command, timeout=limit, cwd=cwd or self.config.cwd or None, env=self.config.env)
        except (errors.SandboxError, errors.Unauthorized, errors.Forbidden):
            raise
        except errors.RockError as error:
            self._check_running()
            return _failed("", str(error), error)
        text = done.stdout + (f"\n[{done.stdout_dropped} bytes are left out]" if done.stdout_dropped else "")
        if done.timed_out:
            return _failed(text, f"the command took longer than {limit} s; its process tree was killed",
                           errors.CommandTimeout("timed out", hint="run it in the background"))  # fmt: skip
        if done.exit_code is None:
            return _failed(text, done.failure_reason, errors.CommandFailed(done.failure_reason))
        result = {"output": text, "returncode": done.exit_code, "exception_info": ""}
        _check_submitted(result)
        return result

    def _check_running(self) -> None:
        """Raise the cause when the sandbox has ended."""
        assert self.sandbox is not None
        self.sandbox.exec(["/bin/sh", "-c", ":"], timeout=30)

    def get_template_vars(self, **kwargs: Any) -> dict[str, Any]:
        return {**self.config.model_dump(), **platform.uname()._asdict(), **kwargs}

    def serialize(self) -> dict[str, Any]:
        kind = f"{type(self).__module__}.{type(self).__name__}"
        return {"info": {"config": {"environment": self.config.model_dump(mode="json"), "environment_type": kind}}}

    def cleanup(self) -> None:
        """Stop the sandbox. No effect when that was done."""
        sandbox, self.sandbox = self.sandbox, None
        if sandbox is not None:
            sandbox.stop()

    def __del__(self) -> None:
        if getattr(self, "sandbox", None) is not None and self._process == os.getpid():
            try:
                self.cleanup()
            except Exception:  # no caller to report to; the sandbox has an idle timeout
                pass


def _failed(output: str, reason: str, error: Exception) -> dict[str, Any]:
    return {"output": output, "returncode": -1, "exception_info": f"An error occurred while executing the command: "
            f"{reason}", "extra": {"exception_type": type(error).__name__, "exception": str(error)}}  # fmt: skip


def _check_submitted(result: dict[str, Any]) -> None:
    """Raise Submitted when the first line of the output is the marker."""
    first, _, rest = result["output"].lstrip().partition("\n")
    if first.strip() == MARKER and result["returncode"] == 0:
        extra = {"exit_status": "Submitted", "submission": rest}
        raise Submitted({"role": "exit", "content": rest, "extra": extra})


def register(name: str = "docker") -> None:
    """Use sandboxes for this short name of an environment class. The SWE-bench commands set the image for a few short
    names only, and for no class by its path."""
    environments._ENVIRONMENT_MAPPING[name] = f"{RockEnvironment.__module__}.{RockEnvironment.__qualname__}"


def main(words: list[str]) -> None:
    """`python -m rock.integrations.minisweagent COMMAND [OPTIONS]`: a SWE-bench command of mini-SWE-agent."""
    if not words or words[0].replace("-", "_") not in _COMMANDS:
        raise SystemExit(f"the first argument is none of {', '.join(_COMMANDS)}; others use the class by its path")
    importlib.import_module("rock.integrations.minisweagent").register()
    command = importlib.import_module(f"minisweagent.run.benchmarks.{words[0].replace('-', '_')}")
    command.app(words[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
