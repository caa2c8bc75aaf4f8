"""`sandbox.deploy`: a local folder as the working folder inside, and texts that name it."""

from __future__ import annotations

import os
import re

from rock import errors
from rock.sdk import primitives
from rock.sdk.sandbox.files import Files

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_PLACE = re.compile(rf"\$(?:(?P<dollar>\$)|(?P<plain>{_NAME})|\{{(?P<braced>{_NAME})\}})|<<(?P<angled>{_NAME})>>")


class Deploy:
    """The working folder of a sandbox."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._working_dir: str | None = None

    @property
    def working_dir(self) -> str | None:
        """Where it is inside; None before `deploy_working_dir`."""
        return self._working_dir

    async def deploy_working_dir(self, local_path: str | os.PathLike[str], target_path: str | None = None) -> str:
        """Copy a local folder in, in place of what is at `target_path` (a new folder in /tmp unless given), and give
        its path inside. FileNotFoundError, ValueError (not a folder); InvalidConfig: the target is not absolute."""
        local = os.path.abspath(local_path)
        if not await primitives.in_thread(os.path.exists, local):
            raise FileNotFoundError(f"local_path not found: {local}")
        if not await primitives.in_thread(os.path.isdir, local):
            raise ValueError(f"local_path must be a directory: {local}")
        target = target_path or f"/tmp/rock_workdir_{os.urandom(16).hex()}"
        if not target.startswith("/"):
            raise errors.InvalidConfig(f"target_path must be absolute: {target}", hint="begin it with /")
        await self._files.upload_dir(local, target, check="raise")
        self._working_dir = target
        return target

    def format(self, template: str, **values: object) -> str:
        """A text with `${name}`, `$name` and `<<name>>` filled in: by `values`, and `working_dir` by the folder inside.

        What nobody knows stays as it is written; `$$` is a dollar.
        """
        known = dict(values)
        if self._working_dir is not None:
            known["working_dir"] = self._working_dir

        def fill(match: re.Match[str]) -> str:
            if match["dollar"]:
                return "$"
            name = match["plain"] or match["braced"] or match["angled"]
            return str(known[name]) if name in known else match[0]

        return _PLACE.sub(fill, template)
