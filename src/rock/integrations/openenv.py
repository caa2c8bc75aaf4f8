"""Images of OpenEnv environments as sandboxes: a container provider for the clients of OpenEnv.

    from rock.integrations.openenv import RockProvider

    env = EchoEnv.from_docker_image("ghcr.io/meta-pytorch/openenv-echo-env", provider=RockProvider())

The class has the interface of OpenEnv's ContainerProvider, which it does not import: that takes seconds.
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from typing import Any

from rock.errors import Conflict, InvalidConfig, StartFailed, Unavailable, Unsupported
from rock.protocol.action import Command
from rock.sync import Sandbox, SandboxConfig
from rock.sync.sandbox.processes import Process

PORT = 8000  # on which images of OpenEnv listen
_LOGGED = 2000  # bytes of the output of a program that ended


class RockProvider:
    """A sandbox with the image's own program, whose port is forwarded to this machine.

    image: for clients that start the container themselves. base_url, api_key: default to ROCK_BASE_URL and
    ROCK_API_KEY. fields: of SandboxConfig, like memory and network.
    """

    def __init__(
        self, image: str | None = None, *, port: int = PORT, base_url: str | None = None, api_key: str | None = None,
        **fields: Any,
    ) -> None:
        self._image = image
        self._port = port
        where = {"base_url": base_url, "api_key": api_key}
        self._fields = {**{name: value for name, value in where.items() if value is not None}, **fields}
        self._stack: ExitStack | None = None
        self.sandbox: Sandbox | None = None
        self._process: Process | None = None

    def start_container(
        self, image: str | None = None, port: int | None = None, env_vars: dict[str, str] | None = None, **options: Any
    ) -> str:
        """Start the image's program: its URL on this machine. port: of this machine; None is any free one.

        Unsupported for other options. Conflict when it has a container. StartFailed when the program ends.
        """
        if options:
            raise Unsupported(f"{', '.join(sorted(options))} is not an option of sandboxes",
                              hint="pass fields of SandboxConfig to RockProvider")
        if self._stack is not None:
            raise Conflict("this provider has a container", hint="call stop_container, or make another provider")
        image = image or self._image
        if image is None:
            raise InvalidConfig("no image was given", hint="pass it to RockProvider or to start_container")
        with ExitStack() as stack:
            self.sandbox = stack.enter_context(Sandbox(SandboxConfig(**{**self._fields, "image": image})))
            self._process = self.sandbox.processes.begin(Command(command=[], entrypoint=True, env=env_vars))
            forward = stack.enter_context(self.sandbox.port_forward(self._port, port or 0))
            self._stack = stack.pop_all()
        return f"http://{forward.host}:{forward.port}"

    def wait_for_ready(self, base_url: str, timeout_s: float = 30.0) -> None:
        """Wait until the server responds. StartFailed when its program ended; Unavailable."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"{base_url}/health", timeout=5) as reply:
                    if reply.status == 200:
                        return
            except (OSError, urllib.error.URLError):
                pass
            if self._process is None:
                raise Conflict("the provider has no container", hint="call start_container first")
            info = self._process.status()
            if not info.running:
                text = self._process.logs("stderr").data.decode(errors="replace")[-_LOGGED:]
                raise StartFailed(f"the program of the image ended with {info.exit_code}: {text}",
                                  hint="run the image with `rock run`, and correct it")
            time.sleep(0.1)
        raise Unavailable(f"{base_url}/health has not responded within {timeout_s:g} s",
                          hint="pass a longer timeout, or the port on which the image listens as RockProvider(port=)")

    def stop_container(self) -> None:
        """Stop the sandbox; no effect without one."""
        stack, self._stack = self._stack, None
        self.sandbox = self._process = None
        if stack is not None:
            stack.close()

    def close(self) -> None:
        self.stop_container()

    def __enter__(self) -> RockProvider:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_container()
