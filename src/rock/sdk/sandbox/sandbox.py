"""`Sandbox`: an isolated computer that somebody asked for."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rock.protocol.sandbox import SandboxConfig
from rock.sdk.sandbox.deploy import Deploy
from rock.sdk.sandbox.files import Files
from rock.sdk.sandbox.lifecycle import Lifecycle
from rock.sdk.sandbox.network import Network
from rock.sdk.sandbox.ports import Ports
from rock.sdk.sandbox.remote_user import RemoteUser
from rock.sdk.sandbox.scripts import Scripts
from rock.sdk.sandbox.session import Sessions

if TYPE_CHECKING:
    from rock.sdk.sandbox.runtime_env import RuntimeEnv


class Sandbox(Lifecycle, Sessions, Files, Ports):
    """One sandbox: `Sandbox(SandboxConfig(...))`, or `Sandbox(image="python:3.11", memory="2g")`.

        async with Sandbox(image="host") as sandbox:
            seen = await sandbox.arun("echo hello")

    Calls may come from many threads and from any event loop. Every call raises RockError: Unavailable when the server
    cannot be reached, NotFound when there is no such sandbox, Expired, OutOfMemory, Exited or Lost when it has ended.

    config, url, sandbox_id, host_name, host_ip, cluster: where it is. fs: its files. process: scripts. remote_user:
    users inside. deploy: a local folder as its working folder. network: mirrors. runtime_envs: Python and Node that
    were put there, by `runtime_env_id`.
    """

    def __init__(self, config: SandboxConfig | None = None, **fields: Any) -> None:
        super().__init__(config or SandboxConfig(**fields))
        self.process = Scripts(self)
        self.remote_user = RemoteUser(self)
        self.deploy = Deploy(self)
        self.network = Network(self)
        self.runtime_envs: dict[str, RuntimeEnv] = {}

    def __repr__(self) -> str:
        return f"Sandbox({self.sandbox_id or 'not started'}, image={self.config.image!r})"

    async def __aenter__(self) -> Self:
        if self.sandbox_id is None:
            await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
