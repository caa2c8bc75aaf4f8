"""Which shell an image has."""

from __future__ import annotations

from dataclasses import dataclass

from rock.errors import NotFound
from rock.rocklet import shell
from rock.runtime.base import Files, Handle, Runtime


@dataclass
class Shell:
    """Which shell an image has, and how to talk to it."""

    path: str
    dialect: shell.Dialect


async def find_shell(runtime: Runtime, handle: Handle, wanted: str | None = None) -> Shell:
    """The shell to use: the `wanted` one, else bash, else sh. NotFound when the image has none."""
    names = (
        [wanted]
        if wanted and "/" in wanted
        else [
            f"{d}/{n}" for n in ([wanted] if wanted else ["bash", "sh"]) for d in ("/bin", "/usr/bin", "/usr/local/bin")
        ]
    )
    if isinstance(runtime, Files):
        for path in names:
            try:
                found = await runtime.stat(handle, path)
            except NotFound:
                continue
            if found.kind == "file" and found.mode & 0o111:
                return Shell(path, shell.BASH if path.endswith("bash") else shell.SH)
    raise NotFound(
        f"the image has no shell ({', '.join(names)})",
        hint="run programs with execute and a list, or use an image with bash or sh",
    )
