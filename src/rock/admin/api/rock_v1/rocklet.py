"""The wire protocol of ROCK's rocklet, for clients that address the rocklet of a sandbox and not the admin.

Its base URL is /apis/envs/rocklet/v1/SANDBOX_ID here. Responses have no envelope; an error is HTTP 511 with
{"rockletexception": {"message", "class_path", "traceback", "extra_info"}}, a timeout 504, an invalid request 422.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from rock.admin.api.rock_v1.commands import Commands
from rock.admin.api.rock_v1.envelope import Asked, DataPlane, Failed, Malformed, Name, Row, body_of, text_of
from rock.admin.api.rock_v1.files import Files
from rock.admin.api.rock_v1.sandboxes import Sandboxes
from rock.errors import CommandTimeout, NotFound, PortTimeout, RockError
from rock.http.asgi import Answer, Handler, Request, answer
from rock.protocol.env import NAMED
from rock.protocol.keys import Access

_EXCEPTIONS = "rock.rocklet.exceptions."
_FAILED, _LATE, _WRONG = 511, 504, 422


class MakeEnvironment(Asked):
    env_id: Name
    sandbox_id: Name


class AboutEnvironment(Asked):
    """`sandbox_id` is the name that the environment was made with, as in ROCK."""

    sandbox_id: Name


class ResetEnvironment(AboutEnvironment):
    seed: int | None = None


class StepEnvironment(AboutEnvironment):
    action: str


class Rocklet:
    """Handlers below one sandbox, by method and path."""

    def __init__(self, sandboxes: Sandboxes, commands: Commands, files: Files, data: DataPlane) -> None:
        self._sandboxes = sandboxes
        self._commands = commands
        self._files = files
        self._data = data

    def routes(self) -> list[Row]:
        commands, files = self._commands, self._files
        rows: list[tuple[str, str, Callable[[Request], Awaitable[Any]], Access]] = [
            ("GET", "", self.hello, Access.READ),
            ("GET", "/is_alive", self.is_alive, Access.READ),
            ("POST", "/create_session", commands.create_session, Access.RUN),
            ("POST", "/run_in_session", commands.run_in_session, Access.RUN),
            ("POST", "/close_session", commands.close_session, Access.RUN),
            ("POST", "/execute", commands.execute, Access.RUN),
            ("POST", "/read_file", files.read_file, Access.READ),
            ("POST", "/write_file", files.write_file, Access.RUN),
            ("POST", "/upload", files.upload, Access.RUN),
            ("POST", "/close", self.close, Access.RUN),
            ("POST", "/env/make", self.make, Access.RUN),
            ("POST", "/env/reset", self.reset, Access.RUN),
            ("POST", "/env/step", self.step, Access.RUN),
            ("POST", "/env/close", self.end, Access.RUN),
        ]
        return [(method, f"/{{sandbox_id}}{path}", _bare(handler), access) for method, path, handler, access in rows]

    async def hello(self, request: Request) -> dict[str, Any]:
        return {"message": "hello world"}

    async def is_alive(self, request: Request) -> dict[str, Any]:
        return await self._sandboxes.alive(request, request.path["sandbox_id"])

    async def close(self, request: Request) -> dict[str, Any]:
        """No effect: the sandbox is stopped through the admin."""
        return {}

    # ---- environments, for images that contain GEM ----

    async def make(self, request: Request) -> dict[str, Any]:
        spec = await body_of(request, MakeEnvironment)
        body = {"env_id": spec.env_id, "name": spec.sandbox_id}
        await self._data.json(request, "make_env", request.path["sandbox_id"], body)
        return {"sandbox_id": spec.sandbox_id}

    async def reset(self, request: Request) -> Any:
        spec = await body_of(request, ResetEnvironment)
        return await self._env(request, "reset_env", spec.sandbox_id, {"seed": spec.seed})

    async def step(self, request: Request) -> Any:
        spec = await body_of(request, StepEnvironment)
        return await self._env(request, "step_env", spec.sandbox_id, {"action": spec.action})

    async def end(self, request: Request) -> dict[str, Any]:
        spec = await body_of(request, AboutEnvironment)
        try:
            await self._env(request, "close_env", spec.sandbox_id, b"")
        except NotFound:
            pass  # it ended before
        return {"sandbox_id": spec.sandbox_id}

    async def _env(self, request: Request, route: str, name: str, body: Any) -> Any:
        return await self._data.json(request, route, request.path["sandbox_id"], body, env=NAMED + name)


def _bare(handler: Callable[[Request], Awaitable[Any]]) -> Handler:
    """A handler whose result is the complete response, and whose errors have the format of ROCK's rocklet."""

    async def reply(request: Request) -> Answer:
        try:
            return answer(await handler(request))
        except Malformed as error:
            return answer({"detail": str(error)}, _WRONG)
        except (CommandTimeout, PortTimeout) as error:
            return answer({"detail": str(error)}, _LATE)
        except Failed as error:
            return _exception(str(error))
        except RockError as error:
            return _exception(text_of(error))

    return reply


def _exception(message: str) -> Answer:
    if "timed out" in message:
        return answer({"detail": message}, _LATE)
    if message.startswith("session ") and "does not exist" in message:
        kind = "SessionDoesNotExistError"
    elif "failed with exit code" in message:
        kind = "NonZeroExitCodeError"
    elif "while checking bash command" in message:
        kind = "BashIncorrectSyntaxError"
    else:
        kind = "RockletException"
    told = {"message": message, "class_path": _EXCEPTIONS + kind, "traceback": "", "extra_info": {}}
    return answer({"rockletexception": told}, _FAILED)

