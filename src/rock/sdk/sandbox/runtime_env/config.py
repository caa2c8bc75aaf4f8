"""What a runtime environment is asked to be."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rock.protocol.wire import Wire


class RuntimeEnvConfig(Wire):
    """A language's programs in a folder of their own.

    env: environment of what runs in it. install_timeout: seconds of each step of the installation.
    custom_install_cmd: a command line that is run at its end, in the working folder.
    extra_symlink_dir: a folder inside that gets `extra_symlink_executables`, as scripts that lead to the programs.
    """

    type: str
    version: str = "default"
    env: dict[str, str] = Field(default_factory=dict)
    install_timeout: float = Field(default=600, gt=0)
    custom_install_cmd: str | None = None
    extra_symlink_dir: str | None = None
    extra_symlink_executables: list[str] = Field(default_factory=list)


class PythonRuntimeEnvConfig(RuntimeEnvConfig):
    """A Python: "default" is 3.11 where the image has it, else the image's own.

    pip: requirements, or the path here of a file with them. pip_index_url: an index instead of pip's own.
    """

    type: Literal["python"] = "python"
    version: Literal["3.11", "3.12", "default"] = "default"
    pip: list[str] | str | None = None
    pip_index_url: str | None = None
    extra_symlink_executables: list[str] = Field(default_factory=lambda: ["python", "python3", "pip", "pip3"])


class NodeRuntimeEnvConfig(RuntimeEnvConfig):
    """Node.js with npm and npx. npm_registry: a registry instead of npm's own."""

    type: Literal["node"] = "node"
    version: Literal["22.18.0", "default"] = "default"
    npm_registry: str | None = None
    extra_symlink_executables: list[str] = Field(default_factory=lambda: ["node", "npm", "npx"])
