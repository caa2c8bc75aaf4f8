"""What is installed beside the client: the parts of the server, and distributions that conflict with this one."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import rock
from rock.errors import Conflict, Unsupported

SERVER = ("fastapi", "fastapi_offline", "uvicorn", "h11", "urllib3")  # modules of the extra `server`
_CONFLICTS = ("rl-rock", "rock")  # distributions with an import package `rock` of their own


def require_server() -> None:
    """Raise Unsupported when the extra `server` is not installed, and Conflict when another distribution overwrote
    modules of this one."""
    missing = [name for name in SERVER if find_spec(name) is None]
    if missing:
        raise no_server(*missing)
    found = conflicts()
    if found:
        raise Conflict(found[0], hint=CONFLICT_HINT)


def no_server(*missing: str) -> Unsupported:
    """The error for an installation without the extra `server`."""
    return Unsupported(
        f"the server is not installed: there is no module {', '.join(missing)}",
        hint="pip install 'rock-sandbox[server]', or pip install -e '.[server]' in a checkout",
    )


CONFLICT_HINT = "remove it, then install this one again: pip uninstall rl-rock rock; pip install --force-reinstall ..."


def conflicts() -> list[str]:
    """A sentence for each other distribution with files in this package's folder, which the later installation
    overwrites."""
    folder = Path(str(rock.__file__)).parent
    sentences = []
    for name in _CONFLICTS:
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        inits = (Path(str(found.locate_file(path))) for path in found.files or () if path.parts[:1] == ("rock",))
        shared = next((path for path in inits if path.resolve().is_relative_to(folder.resolve())), None)
        where = f"overwrites files in {folder}" if shared else "has a package `rock` too: the first on sys.path is used"
        sentences.append(f"the distribution {found.name} {found.version} {where}")
    return sentences
