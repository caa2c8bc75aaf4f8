"""A Python of a sandbox's own: a virtual environment of one that the image has."""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path
from typing import ClassVar

from rock import errors
from rock.sdk import primitives
from rock.sdk.sandbox.runtime_env.base import Host, RuntimeEnv
from rock.sdk.sandbox.runtime_env.config import PythonRuntimeEnvConfig, RuntimeEnvConfig
from rock.sdk.wheels import Target, fetch, requirements_of

# Its arguments: the wanted version, and whether another will do. Where pip is no part of it, it comes as a wheel.
FIND = """
for name in "python$1" python3 python; do
    for folder in /usr/local/bin /usr/bin /bin /opt/conda/bin; do
        [ -x "$folder/$name" ] || continue
        said=$("$folder/$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        case $said in
            "$1") echo "$folder/$name"; exit 0 ;;
            3.*) [ "$2" = any ] && other=${other:-$folder/$name} ;;
        esac
    done
done
[ -n "$other" ] && echo "$other"
"""
FACTS = """
import platform, sys
name, version = platform.libc_ver()
if name != "glibc":
    name, version = "musl", "1.2"
print("%d.%d" % sys.version_info[:2], platform.machine(), name + "-" + version)
"""


class PythonRuntimeEnv(RuntimeEnv):
    """python, python3, pip and pip3, and the packages that were asked for.

    In a sandbox without a network pip gets its packages from the machine of the caller, as wheels.
    """

    runtime_env_type: ClassVar[str] = "python"

    def __init__(self, sandbox: Host, runtime_env_config: RuntimeEnvConfig) -> None:
        if not isinstance(runtime_env_config, PythonRuntimeEnvConfig):
            runtime_env_config = PythonRuntimeEnvConfig.model_validate(runtime_env_config.model_dump())
        super().__init__(sandbox, runtime_env_config)
        self._spec = runtime_env_config

    async def _install(self) -> None:
        any_will_do = self._spec.version == "default"
        wanted = "3.11" if any_will_do else self._spec.version
        argv = ["sh", "-c", FIND, "sh", wanted, "any" if any_will_do else "only"]
        found = (await self._sandbox.processes.run(argv, timeout=60.0)).stdout.strip()
        if not found.startswith("/"):
            raise errors.Unsupported(
                f"the image has no Python {wanted} to make an environment of",
                sandbox_id=self._sandbox.sandbox_id,
                hint="use an image that has it, or name commands that install one in "
                "ROCK_RTENV_PYTHON_V31114_INSTALL_CMD (3.11) or ROCK_RTENV_PYTHON_V31212_INSTALL_CMD (3.12)",
            )
        home = shlex.quote(f"{self.workdir}/runtime-env")
        # Debian's python3 cannot put pip into an environment: then it comes as a wheel.
        await self._step(f"{shlex.quote(found)} -m venv --without-pip {home}", "the environment cannot be made")
        unpacked = 'python "$(echo pip-*.whl)/pip" install --no-index --no-deps pip-*.whl'
        await self._install_wheels(["pip"], None, unpacked)

    async def _set_up(self) -> None:
        spec = self._spec
        await self._step("python -c 'import sys; sys.exit(sys.version_info < (3,))'", "this is no Python")
        if spec.pip_index_url:
            await self._step(f"pip config --site set global.index-url {shlex.quote(spec.pip_index_url)}", "pip config")
        if not spec.pip:
            return
        if isinstance(spec.pip, str):
            if not os.path.exists(spec.pip):
                raise FileNotFoundError(f"Requirements file not found: {spec.pip}")
            packages = await primitives.in_thread(requirements_of, Path(spec.pip))
        else:
            packages = list(spec.pip)
        words = " ".join(shlex.quote(package) for package in packages)
        if await self._has_network():
            await self._step(f"pip install --disable-pip-version-check {words}", "pip install failed")
        else:
            install = f"pip install --disable-pip-version-check --no-index --find-links . {words}"
            await self._install_wheels(packages, spec.pip_index_url, install)

    async def _install_wheels(self, packages: list[str], index: str | None, command: str) -> None:
        """Fetch wheels here, carry them in, and install them there."""
        told = await self._step(f"python -c {shlex.quote(FACTS)}", "this is no Python")
        python, machine, libc = [*told.output.split(), "", "", ""][:3]
        target = Target(python, machine, libc)
        inside = f"{self.workdir}/wheels"
        with tempfile.TemporaryDirectory() as folder:
            await primitives.in_thread(
                lambda: fetch(packages, Path(folder), target, index=index, timeout=self._spec.install_timeout)
            )
            await self._sandbox.files.upload_dir(folder, inside, self._spec.install_timeout, check="raise")
        try:
            await self._step(f"cd {shlex.quote(inside)} && {command}", "pip install failed")
        finally:
            await primitives.settle(lambda: self._sandbox.files.remove(inside, recursive=True), 15.0)
