"""Packages of agents as read-only layers of this machine, installed once and mounted into sandboxes.

    <folder>/NAME-DIGEST/tree          mounted at /opt/rock/agents/NAME
                        /record.json   size, time and versions; a layer with a record is complete
    <folder>/.new-*                    being installed, or left by a crash
    <folder>/recipes/NAME.toml         recipes that the owner of this machine added
    <folder>/locks/NAME                one installation at a time, also over processes

    tree/bin                           the programs
        /node_modules                  packages of npm
        /site                          packages of PyPI, byte-compiled
        /python                        a copy of a Python of this machine; its loader and libraries are in lib/system

npm and pip run with this process's environment: its configuration, proxies and certificates. Install scripts of npm
packages do not run, and packages of PyPI are wheels, except those that the recipe lists in `build`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rock.agents.recipe import MOUNTS, Packages, Recipe, RecipeError, builtin, load, names
from rock.errors import Conflict, ImageError, InvalidConfig, NotFound
from rock.guest.init.remove import remove_tree
from rock.images.packages import make_readable
from rock.images.records import locked, write_atomic

Progress = Callable[[str], None]

_PYTHONS = ("python3.13", "python3.12", "python3.11", "python3.10")
_FACTS = """
import json, sys, sysconfig
print(json.dumps([sys.version_info[:3], sysconfig.get_path("stdlib"), sys._base_executable, sys.base_prefix]))
"""
_UNUSED = ("test", "tests", "idlelib", "ensurepip", "turtledemo", "lib2to3", "tkinter", "site-packages",
           "dist-packages", "__pycache__")  # fmt: skip
_COMMON = ("libstdc++.so.6", "libgcc_s.so.1", "libz.so.1", "libresolv.so.2", "libpthread.so.0", "libdl.so.2",
           "librt.so.1", "libutil.so.1", "libm.so.6", "libcrypt.so.1")  # fmt: skip
_COMPILED = ["-m", "compileall", "-qq", "-j", "0", "--invalidation-mode", "unchecked-hash"]
_LAST_LINES = 15


@dataclass(frozen=True)
class Layer:
    """An installed layer. size: bytes; created: seconds since the epoch; versions: "name version" of the requested
    packages."""

    name: str
    digest: str
    folder: Path
    size: int
    created: float
    versions: tuple[str, ...]

    @property
    def tree(self) -> Path:
        return self.folder / "tree"


class AgentLayers:
    """The layers below `folder`, which is created when the first one is installed. All calls may block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    # ---- recipes ----

    def recipe(self, name: str) -> Recipe:
        """The recipe of that name, added ones first. InvalidConfig when there is none, or an added one is damaged."""
        path = self._folder / "recipes" / f"{name}.toml"
        if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", name):
            try:
                return load(path)
            except FileNotFoundError:
                found = builtin(name)
                if found is not None:
                    return found
            except (OSError, RecipeError) as error:
                raise InvalidConfig(f"the recipe of agent {name} cannot be read: {error}",
                                    hint="replace it: rock agent add FILE") from None
        raise InvalidConfig(f"the worker has no recipe for agent {name[:64]!r}",
                            hint=f"there are: {', '.join(self.names())}; the owner of the worker adds others: "
                                 "rock agent add FILE")  # fmt: skip

    def names(self) -> Sequence[str]:
        """Names of all recipes."""
        return sorted({*names(), *(path.stem for path in (self._folder / "recipes").glob("*.toml"))})

    def keep_recipe(self, recipe: Recipe) -> None:
        """Add a recipe, or replace one of its name."""
        folder = self._folder / "recipes"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"{recipe.name}.toml", recipe.text.encode())

    # ---- layers ----

    def find(self, recipe: Recipe) -> Layer | None:
        """The layer of a recipe, if it is installed."""
        return self._read(self._path(recipe))

    def installed(self) -> Sequence[Layer]:
        """All layers, also those of earlier versions of recipes, by name."""
        found = (self._read(path) for path in sorted(self._folder.glob("[a-z0-9]*-*")))
        return [layer for layer in found if layer is not None]

    def ensure(self, recipe: Recipe, progress: Progress | None = None, python: str | None = None) -> Layer | None:
        """The layer of a recipe, installed if missing; None for a recipe without packages. Of several callers, also in
        other processes, one installs and the others wait. python: the interpreter to copy. ImageError."""
        if not recipe.packages:
            return None
        layer = self.find(recipe)
        if layer is None:
            (self._folder / "locks").mkdir(parents=True, exist_ok=True)
            with locked(self._folder / "locks" / recipe.name):
                layer = self.find(recipe) or self._install(recipe, progress, python)
        return layer

    def remove(self, name: str) -> int:
        """Remove the layers of an agent and its added recipe; returns the freed bytes. NotFound; Conflict while a
        sandbox has one mounted."""
        recipe = self._folder / "recipes" / f"{name}.toml"
        layers = [layer for layer in self.installed() if layer.name == name]
        if not layers and not recipe.exists():
            raise NotFound(f"agent {name} is not installed on this machine", hint="`rock agent ls` shows what there is")
        freed = 0
        for layer in layers:
            # Renamed first: from then on no start finds it.
            gone = Path(tempfile.mkdtemp(prefix=".new-", dir=self._folder)) / "layer"
            os.rename(layer.folder, gone)
            if _is_mounted(gone / "tree"):
                os.rename(gone, layer.folder)
                gone.parent.rmdir()
                raise Conflict(f"a sandbox uses agent {name}", hint="stop the sandboxes with that agent first")
            remove_tree(str(gone.parent))
            freed += layer.size
        recipe.unlink(missing_ok=True)
        return freed

    def _path(self, recipe: Recipe) -> Path:
        return self._folder / f"{recipe.name}-{recipe.packages.digest}"

    @staticmethod
    def _read(path: Path) -> Layer | None:
        try:
            record = json.loads((path / "record.json").read_bytes())
            name, _, digest = path.name.rpartition("-")
            return Layer(name, digest, path, int(record["size"]), float(record["created"]), tuple(record["versions"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _install(self, recipe: Recipe, progress: Progress | None, python: str | None) -> Layer:
        self._sweep(recipe.name)
        folder = Path(tempfile.mkdtemp(prefix=f".new-{recipe.name}-", dir=self._folder))
        try:
            tree = folder / "tree"
            tree.mkdir()
            tell = progress or (lambda _: None)
            building = Building(recipe.name, recipe.packages, tree, folder / "log", tell, python)
            building.run()
            os.chmod(folder, 0o755)
            os.chmod(tree, 0o755)
            record = {"size": make_readable(tree), "created": time.time(), "versions": building.versions()}
            write_atomic(folder / "record.json", json.dumps(record).encode())
            os.rename(folder, self._path(recipe))
        except OSError as error:
            raise ImageError(f"agent {recipe.name} cannot be installed: {error}",
                             hint="check the free space of the disk with the images") from None  # fmt: skip
        finally:
            remove_tree(str(folder))
        layer = self._read(self._path(recipe))
        assert layer is not None
        return layer

    def _sweep(self, name: str) -> None:
        """Remove what an interrupted installation of this agent left; its lock is held."""
        for path in self._folder.glob(f".new-{name}-*"):
            with suppress(OSError):
                remove_tree(str(path))


def _is_mounted(tree: Path) -> bool:
    """Whether a process of this machine has the folder in its mount table."""
    parts = f"{tree.parent.parent.name}/{tree.parent.name}/{tree.name}"  # the table has the path on the disk
    seen: set[int] = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            namespace = os.stat(f"/proc/{pid}/ns/mnt").st_ino
            if namespace in seen:
                continue
            seen.add(namespace)
            with open(f"/proc/{pid}/mountinfo", errors="surrogateescape") as table:
                if any(line.split(" ", 4)[3].endswith(parts) for line in table):
                    return True
        except OSError:  # it ended, or belongs to another user
            continue
    return False


# ---- installation ----


class Building:
    """The installation of one layer into an empty folder."""

    def __init__(
        self, name: str, packages: Packages, tree: Path, log: Path, progress: Progress, python: str | None
    ) -> None:
        self._name = name
        self._packages = packages
        self._tree = tree
        self._log = log
        self._progress = progress
        self._python = python

    def run(self) -> None:
        """Install everything. ImageError."""
        if self._packages.npm:
            self._npm()
        if self._packages.python:
            python = suitable_python(self._packages.python, self._python)
            if self._packages.pypi:
                self._pip(python)
            self._progress(f"copying Python {python.version}")
            python.copy(self._tree / "python", f"{MOUNTS}/{self._name}")
            self._progress("compiling packages")
            for folder in (self._tree / "site", self._tree / "python" / "lib"):
                # A file that does not compile, such as an example for another Python, is never imported.
                subprocess.run([python.executable, *_COMPILED, "-s", str(self._tree), "-p", f"{MOUNTS}/{self._name}",
                                str(folder)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, check=False)  # fmt: skip
        (self._tree / "bin").mkdir()
        for program, target in self._packages.bin.items():
            self._program(program, target)

    def versions(self) -> list[str]:
        """Names and versions of the installed packages that the recipe requests."""
        found = []
        for requirement in self._packages.npm:
            name, _, version = requirement.rpartition("@")
            found.append(f"{name} {version}")
        wanted = {_normal(re.split(r"[^\w.-]", requirement)[0]) for requirement in self._packages.pypi}
        for path in sorted((self._tree / "site").glob("*.dist-info")):
            name, _, version = path.name.removesuffix(".dist-info").partition("-")
            if _normal(name) in wanted:
                found.append(f"{name} {version}")
        return found

    def _program(self, program: str, target: str) -> None:
        link = self._tree / "bin" / program
        if ":" in target:
            module, _, function = target.partition(":")
            link.write_text(f"#!{MOUNTS}/{self._name}/python/bin/python3\nimport sys\n\n"
                            f"from {module} import {function}\n\nsys.exit({function}())\n")  # fmt: skip
            link.chmod(0o755)
            return
        path = self._tree / target
        if not path.is_file():
            raise ImageError(f"agent {self._name}: the packages have no file {target}",
                             hint="correct the table `bin` of the recipe")
        path.chmod(0o755)
        link.symlink_to(f"../{target}")

    def _npm(self) -> None:
        npm = shutil.which("npm")
        if npm is None:
            raise ImageError(f"agent {self._name} needs packages of npm, and this machine has no npm",
                             hint="install Node.js with npm on the worker; sandboxes do not need it")
        self._progress(f"fetching {', '.join(self._packages.npm)}")
        # npm removes packages for other machines by itself. A package is a file tree; none of its scripts runs.
        command = [npm, "install", "--prefix", str(self._tree), "--ignore-scripts", "--no-audit", "--no-fund",
                   "--no-save", "--no-package-lock", "--loglevel=error", "--install-strategy=hoisted", "--",
                   *self._packages.npm]  # fmt: skip
        self._call(command, "npm")
        for unused in (*self._tree.glob("node_modules/node-linux-*/include"), self._tree / "node_modules" / ".bin"):
            shutil.rmtree(unused, ignore_errors=True)
        (self._tree / "package.json").unlink(missing_ok=True)

    def _pip(self, python: Python) -> None:
        self._progress(f"fetching {', '.join(self._packages.pypi)}")
        build = ",".join(self._packages.build)
        command = [
            sys.executable, "-m", "pip", "--python", python.executable, "install", "--disable-pip-version-check",
            "--no-input", "--no-compile", "--no-warn-script-location", "--progress-bar", "off", "--only-binary",
            ":all:", *(("--no-binary", build) if build else ()), "--target", str(self._tree / "site"), "--",
            *self._packages.pypi,
        ]  # fmt: skip
        self._call(command, "pip")
        shutil.rmtree(self._tree / "site" / "bin", ignore_errors=True)

    def _call(self, command: list[str], what: str) -> None:
        """Run a package manager. ImageError with its last lines."""
        last: deque[str] = deque(maxlen=_LAST_LINES)
        with open(self._log, "a") as output, subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", cwd=self._tree,
        ) as child:  # fmt: skip
            assert child.stdout is not None
            for line in child.stdout:
                output.write(line)
                last.append(line.rstrip())
                if step := re.match(r"Collecting ([\w.-]+)|Installing ", line):
                    self._progress(f"fetching {step[1]}" if step[1] else "installing packages")
            status = child.wait()
        if status != 0:
            raise ImageError(f"installing agent {self._name} failed: {_reason(last) or f'{what} ended with {status}'}",
                             hint="is the network reachable?", details={"output": "\n".join(last)})  # fmt: skip


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _reason(lines: Iterable[str]) -> str:
    """The line with the cause: the last error, else the last line with text."""
    written = [line for line in lines if line.strip()]
    errors = [line for line in written if line.lower().startswith(("error: ", "npm error "))]
    return (errors or written or [""])[-1]


# ---- Python ----


@dataclass(frozen=True)
class Python:
    """An interpreter of this machine. executable: its real file. stdlib: the folder of its standard library."""

    executable: str
    version: str
    stdlib: Path
    prefix: Path

    @property
    def short(self) -> str:
        return ".".join(self.version.split(".")[:2])

    def copy(self, target: Path, mount: str) -> None:
        """Copy it to an empty folder, with its libraries and its loader, so that it needs nothing of an image. mount:
        the absolute path of the layer in a sandbox."""
        library = target / "lib" / f"python{self.short}"
        system = target / "lib" / "system"
        system.mkdir(parents=True)
        shutil.copytree(self.stdlib, library, symlinks=False, ignore=_ignored, ignore_dangling_symlinks=True)
        (library / "sitecustomize.py").unlink(missing_ok=True)  # of the distribution
        (library / "sitecustomize.py").write_text(f"import site\n\nsite.addsitedir({mount + '/site'!r})\n")
        (target / "bin").mkdir()
        real = target / "bin" / f"python{self.short}"
        shutil.copy2(self.executable, real)
        loader = ""
        for name, path in _libraries([real, *(library / "lib-dynload").glob("*.so")]):
            shutil.copy2(os.path.realpath(path), system / name)
            if name.startswith(("ld-linux", "ld-musl", "ld64")):
                loader = name
        if not loader:
            raise ImageError(f"the loader of {self.executable} is not found", hint="use another Python: --python PATH")
        (system / loader).chmod(0o755)
        # -E -s: the variables and packages of the image are for its own Python.
        (target / "bin" / "python3").write_text(
            f'#!/bin/sh\nfolder={mount}/python\n'
            f'exec "$folder/lib/system/{loader}" --argv0 "$folder/bin/python3" --library-path "$folder/lib/system" '
            f'"$folder/bin/python{self.short}" -E -s "$@"\n'
        )
        (target / "bin" / "python3").chmod(0o755)


def _ignored(folder: str, entries: list[str]) -> set[str]:
    return {name for name in entries if name in _UNUSED or name.startswith("config-") or name.endswith((".pyc", ".a"))}


def _libraries(programs: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """(name, path) of the shared libraries that programs need, and those that wheels expect of each system."""
    found: dict[str, str] = {}
    for program in programs:
        printed = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False).stdout
        for name, path in re.findall(r"^\s*(\S+) => (/\S+)", printed, re.MULTILINE):
            found.setdefault(name, path)
        for path in re.findall(r"^\s*(/\S*/ld\S+) \(", printed, re.MULTILINE):
            found.setdefault(os.path.basename(path), path)
    yield from found.items()
    folders = {os.path.dirname(os.path.realpath(path)) for name, path in found.items() if name.startswith("libc.so")}
    for name in _COMMON:
        for folder in folders:
            if name not in found and os.path.exists(f"{folder}/{name}"):
                yield name, f"{folder}/{name}"
                break


def suitable_python(versions: str, given: str | None = None) -> Python:
    """An interpreter of this machine with one of the versions, as ">=3.12". given: the only one to consider.
    ImageError."""
    tried = []
    for path in [given] if given else _pythons():
        found = _facts(path)
        if found is not None and _fits(found.version, versions):
            return found
        tried.append(path if found is None else f"{path} ({found.version})")
    raise ImageError(f"the agent needs Python {versions}, and this machine has none: {', '.join(tried)}",
                     hint="install one, and name it: rock agent add NAME --python PATH")


def _pythons() -> Iterator[str]:
    yield sys.executable
    for name in _PYTHONS:
        if path := shutil.which(name):
            yield path
    for pattern in (".pyenv/versions/3.1[0-3]*/bin/python3", ".local/share/uv/python/cpython-3.1[0-3]*/bin/python3"):
        yield from sorted(map(str, Path.home().glob(pattern)))


def _facts(path: str) -> Python | None:
    """None: it does not start, or is no CPython that can be copied."""
    try:
        done = subprocess.run([path, "-I", "-c", _FACTS], capture_output=True,
                              timeout=30, stdin=subprocess.DEVNULL, check=True)  # fmt: skip
        version, stdlib, executable, prefix = json.loads(done.stdout)
        return Python(os.path.realpath(executable), ".".join(map(str, version)), Path(stdlib), Path(prefix))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _fits(version: str, versions: str) -> bool:
    minor = int(version.split(".")[1])
    compare: dict[str, Callable[[int, int], bool]] = {
        ">=": int.__ge__, "<=": int.__le__, "==": int.__eq__, "<": int.__lt__, ">": int.__gt__}  # fmt: skip
    for part in versions.split(","):
        found = re.fullmatch(r"([=<>]+)3\.(\d+)", part)
        if found is None or not compare[found[1]](minor, int(found[2])):
            return False
    return True
