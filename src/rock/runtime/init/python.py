"""A relocatable Python for pid 1 in containers, where the image's root is the only file system.

    <folder>/<key>/ld.so so/ bin/python3 lib/pythonX.Y/   this machine's interpreter, and its requirements for `guest`
                   modules/rock/guest/                    pid 1, with the compiled library if there is one
                   boot.py                                the entry point
                   link/                                  an empty folder, a mount point

It is mounted read-only inside and started by its own loader, so it does not depend on a Python, a shell or a C library
of the image. It contains the modules that this machine's Python loads when it imports pid 1.
"""

from __future__ import annotations

import hashlib
import json
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rock.errors import Unsupported
from rock.guest.init import native
from rock.guest.init.remove import remove_tree

INSIDE = "/.rock"  # its path inside
LINK = f"{INSIDE}/link"
_BOOT = f"import sys\nsys.path.append({INSIDE + '/modules'!r})\nfrom rock.guest.init.container import main\nmain()\n"
# Run by the interpreter to be copied. One of pid 1's operations imports `shutil` on demand.
_LOOK = """
import json, sys, types
sys.modules["rock"] = types.ModuleType("rock")
sys.modules["rock"].__path__ = [sys.argv[1] + "/rock"]
import rock.guest.init.container, encodings.ascii, encodings.latin_1, shutil
files = {name: module.__file__ for name, module in sys.modules.items() if getattr(module, "__file__", None)}
maps = {line.split(None, 5)[5].rstrip() for line in open("/proc/self/maps") if len(line.split(None, 5)) > 5}
json.dump({"modules": files, "maps": sorted(name for name in maps if name[0] == "/"), "platlib": sys.platlibdir},
          sys.stdout)
"""


@dataclass(frozen=True)
class GuestPython:
    """A prepared copy. `folder` is to be mounted read-only at `INSIDE`."""

    folder: Path

    def command(self, options: dict[str, object]) -> list[str]:
        """The command line of pid 1; `options` as in guest/init/container.py."""
        return [f"{INSIDE}/ld.so", "--library-path", f"{INSIDE}/so", f"{INSIDE}/bin/python3", "-I", "-S", "-B",
                f"{INSIDE}/boot.py", json.dumps(options)]


def prepare(folder: Path) -> GuestPython:
    """Create the copy in `folder`, or find one made of the same files. Blocking: half a second, once.

    Unsupported where this machine's Python cannot be copied.
    """
    folder.mkdir(parents=True, exist_ok=True)
    python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    plan = dict(_plan(python))
    digest = hashlib.sha256()
    for target, source in sorted(plan.items()):
        found = os.stat(source)
        inside = Path(source).read_bytes() if "/rock/guest/" in target else b""
        digest.update(repr((target, source, found.st_size, found.st_mtime_ns, inside)).encode())
    digest.update(_BOOT.encode())
    final = folder / digest.hexdigest()[:20]
    if not final.is_dir():
        made = tempfile.mkdtemp(prefix=".making-", dir=folder)
        try:
            _copy(plan, Path(made))
            try:
                os.rename(made, final)
            except OSError:  # another server completed first
                if not final.is_dir():
                    raise
        finally:
            remove_tree(made)
    return GuestPython(final)


def _plan(python: str) -> Iterator[tuple[str, str]]:
    """Source files by their path in the copy."""
    source = str(Path(__file__).parents[3])
    try:
        command = [python, "-I", "-S", "-B", "-c", _LOOK, source]
        look = subprocess.run(command, capture_output=True, timeout=60, check=True)
        found = json.loads(look.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise Unsupported(f"pid 1 cannot be started with {python}: {error}",
                          hint="install a complete Python 3.11 or later on the worker, readable by all users") from None
    loaders = [path for path in found["maps"] if os.path.basename(path).startswith("ld-")]
    if len(loaders) != 1:
        raise Unsupported(f"{python} has no loader that could be taken along", hint="it seems to be linked statically")
    library = f"{found['platlib']}/python{sys.version_info.major}.{sys.version_info.minor}"
    yield "ld.so", loaders[0]
    yield "bin/python3", python
    yield f"{library}/os.py", os.__file__
    objects = [python]
    for name, path in found["modules"].items():
        parts = name.split(".")
        if parts[0] == "rock":
            yield f"modules/{os.path.relpath(path, source)}", path
        elif not path.endswith(".py"):
            objects.append(path)
            yield f"{library}/lib-dynload/{os.path.basename(path)}", path
        else:
            inner = "/".join(parts) + ("/__init__.py" if os.path.basename(path) == "__init__.py" else ".py")
            yield f"{library}/{_stdlib(inner, path)}", path
    for path in objects:
        yield from _libraries(loaders[0], path)
    if native.library is not None:
        yield f"modules/{os.path.relpath(native.library.path, source)}", native.library.path


def _stdlib(inner: str, path: str) -> str:
    """The file of a module, whose name may differ: os.path is posixpath."""
    return inner if path.endswith("/" + inner) else os.path.basename(path)


def _libraries(loader: str, path: str) -> Iterator[tuple[str, str]]:
    """Shared libraries that a file of this machine needs, by their sonames."""
    listed = subprocess.run([loader, "--list", path], capture_output=True, timeout=60)
    for line in listed.stdout.decode(errors="surrogateescape").splitlines():
        name, arrow, rest = line.strip().partition(" => ")
        library = rest.rpartition(" (")[0]
        if arrow and library.startswith("/"):
            yield f"so/{os.path.basename(name)}", library


def _copy(plan: dict[str, str], made: Path) -> None:
    for target, source in plan.items():
        place = made / target
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)
        if target.endswith(".py"):
            py_compile.compile(str(place), dfile=f"{INSIDE}/{target}", doraise=True,
                               invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    (made / "modules/rock/__init__.py").write_text("")
    (made / "boot.py").write_text(_BOOT)
    (made / "link").mkdir()
    for folder, _, names in os.walk(made):  # independent of the umask
        os.chmod(folder, 0o755)
        for name in names:
            os.chmod(os.path.join(folder, name), 0o755 if os.path.basename(folder) in ("bin", "so") else 0o644)
    (made / "ld.so").chmod(0o755)
