"""Python packages as a read-only layer, installed once and shared by all sandboxes that need them.

    /opt/rock/envs/<key>/site        the packages, byte-compiled
    /opt/rock/envs/<key>/python      link to the Python for which they were installed
    /opt/rock/envs/<key>/nltk_data   the word lists for word games, where available
    /opt/rock/envs/<key>/pins        pip's resolution, a name==version per line
    /opt/rock/envs/<key>/packages    the installed packages, a name and version per line
    /opt/rock/envs/current           link to <key>

The key covers the base (the Python and its platform) and the resolved packages with versions: requirements with the
same resolution share a layer, for all users. The store retains resolutions (packages/<digest>.json); those of a removed
image are resolved again. The layer is on top of the image `host`; the result has a name and is a regular image.

pip runs with this process's environment: its configuration, proxies and certificates.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from rock.errors import ImageError, NotFound
from rock.images.host import rock_python
from rock.images.layers.writer import LayerWriter
from rock.images.records import RootFS, locked, write_atomic
from rock.images.store import ImageStore

Progress = Callable[[str], None]

FOLDER = "opt/rock/envs"
CURRENT = f"/{FOLDER}/current"
_VERSION = 2  # increase when the layer is built in another way
_LAST_LINES = 15
_WORDS_TIMEOUT = 30.0
_DICTIONARIES = ("/usr/share/dict/words", "/usr/share/dict/american-english")


@dataclass(frozen=True)
class PackageSet:
    """Requirements in pip's syntax, and the name of their image."""

    image: str
    requirements: tuple[str, ...]
    wheels_only: bool = False  # nothing is built, so no code of the packages runs on this machine
    no_deps: bool = False  # exactly these, without their dependencies

    @property
    def asked(self) -> str:
        """A digest of the request: the base and the requirements as given."""
        return _digest((_base(), sorted(set(self.requirements)), self.wheels_only, self.no_deps))[:24]


@dataclass(frozen=True)
class _Resolved:
    """Resolved requirements. pins: "name==version", sorted."""

    pins: tuple[str, ...]

    @property
    def key(self) -> str:
        """The folder name."""
        return f"{sys.implementation.cache_tag}-{_digest((_base(), self.pins))[:12]}"

    @property
    def diff_id(self) -> str:
        return f"sha256:{_digest((_base(), self.pins))}"


@cache
def _base() -> tuple[object, ...]:
    """The platform of compiled packages: the Python inside and its machine."""
    return _VERSION, rock_python(), sys.version, platform.machine(), platform.libc_ver()


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def ensure(store: ImageStore, packages: PackageSet, progress: Progress | None = None) -> RootFS:
    """The image with these packages, installed if missing. Blocks, the first time for a minute.

    Of several callers, also in other processes, one installs and the others wait. ImageError has pip's last lines.
    """
    python = rock_python()
    if python is None:
        raise ImageError("the Python that runs ROCK cannot be shown inside a sandbox: not everybody may read it",
                         hint="use a Python that other users may read, such as the system's python3")
    if not is_built(store, packages):
        with locked(store.folder / "locks" / f"env-{packages.asked}"):
            if not is_built(store, packages):
                _ensure(store, packages, python, progress)
    return store.resolve(packages.image)


def _ensure(store: ImageStore, packages: PackageSet, python: str, progress: Progress | None) -> None:
    log = store.folder / f"{packages.asked}.log"
    resolved = _resolve(packages, log, progress)

    def fill(writer: LayerWriter) -> str:
        _build(packages, resolved, python, writer, log, progress)
        return resolved.diff_id

    store.host_with(packages.image, f"installing {', '.join(packages.requirements)}", fill, resolved.diff_id)
    note = _note(store, packages)
    note.parent.mkdir(exist_ok=True)
    write_atomic(note, json.dumps({"pins": resolved.pins}).encode())
    log.unlink(missing_ok=True)


def _note(store: ImageStore, packages: PackageSet) -> Path:
    return store.folder / "packages" / f"{packages.asked}.json"


def _known(store: ImageStore, packages: PackageSet) -> _Resolved | None:
    """The last resolution of these requirements."""
    try:
        return _Resolved(tuple(json.loads(_note(store, packages).read_bytes())["pins"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def is_built(store: ImageStore, packages: PackageSet) -> bool:
    """Whether the image exists for this Python and these requirements."""
    resolved = _known(store, packages)
    if resolved is None:
        return False
    try:
        layers = store.resolve(packages.image).layers
    except ImageError:
        return False
    return os.path.isdir(os.path.join(layers[0], FOLDER, resolved.key))


def packages_folder(rootfs: RootFS) -> Path:
    """The folder of the packages on this machine, for programs outside of a sandbox; NotFound without any."""
    link = Path(rootfs.layers[0], FOLDER, "current")
    if not link.is_symlink():
        raise NotFound(f"image {rootfs.name} has no environment packages",
                       hint="build the image with `rock image build`, or choose an image that has the environment's "
                            "packages")
    return link.parent / os.readlink(link)


def _build(
    packages: PackageSet, resolved: _Resolved, python: str, writer: LayerWriter, log: Path, progress: Progress | None
) -> None:
    base = Path(writer.folder) / FOLDER
    home = base / resolved.key
    site = home / "site"
    site.mkdir(parents=True)
    pins = home / "pins"  # install the resolved versions, independent of later releases
    pins.write_text("".join(f"{pin}\n" for pin in resolved.pins))
    if packages.requirements:
        _pip(packages, ["--target", str(site), "--constraint", str(pins)], log, progress, "fetching")
    if progress is not None:
        progress("compiling packages")
    _prune(site)
    # Compiled files are never checked against their sources: the layer is read-only. A file that does not compile, such
    # as an example for another Python, is never imported
    subprocess.run([sys.executable, "-m", "compileall", "-qq", "-j", "0", "--invalidation-mode", "unchecked-hash",
                    "-s", writer.folder, "-p", "/", str(site)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, check=False)  # fmt: skip
    names = sorted(p.name.removesuffix(".dist-info").replace("-", " ", 1) for p in site.glob("*.dist-info"))
    (home / "packages").write_text("".join(f"{name}\n" for name in names))
    (home / "python").symlink_to(python)
    (base / "current").symlink_to(resolved.key)
    if (site / "nltk").is_dir() and not packages.wheels_only:
        _words(site, home / "nltk_data", log, progress)
    writer.size = make_readable(Path(writer.folder))


def _resolve(packages: PackageSet, log: Path, progress: Progress | None) -> _Resolved:
    """The versions that pip would install, without an installation."""
    if not packages.requirements:
        return _Resolved(())
    with tempfile.TemporaryDirectory(prefix="rock-packages-") as folder:
        if find_spec("pip") is None:
            printed = _pip(packages, ["--dry-run", "--target", folder], log, progress, "resolving")
            pins = re.findall(r"^ \+ (\S+==\S+)", printed, re.MULTILINE)  # format of uv
        else:
            report = Path(folder, "report.json")
            _pip(packages, ["--dry-run", "--target", folder, "--report", str(report)], log, progress, "resolving")
            found = (item["metadata"] for item in json.loads(report.read_bytes())["install"])
            pins = [f"{item['name']}=={item['version']}" for item in found]
    return _Resolved(tuple(sorted(re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower()
                                  + "==" + pin.partition("==")[2] for pin in pins)))  # fmt: skip


def _pip(packages: PackageSet, options: list[str], log: Path, progress: Progress | None, phase: str) -> str:
    """Run pip to install or resolve the requirements; returns its output. ImageError with its last lines."""
    if progress is not None:
        progress(f"{phase} packages")
    if find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-compile",
                   "--no-user", "--no-warn-script-location", *options]  # fmt: skip
        if sys.version_info >= (3, 12):
            command.append("--ignore-requires-python")  # gem-llm declares "<= 3.12", which 3.12.1 does not satisfy
    elif uv := shutil.which("uv"):
        command = [uv, "pip", "install", "--python", sys.executable, *options]
    else:
        raise ImageError("environment packages cannot be installed: this Python has no pip",
                         hint=f"run `{sys.executable} -m ensurepip`")
    if packages.wheels_only:
        command += ["--only-binary", ":all:"]
    if packages.no_deps:
        command.append("--no-deps")
    requirements = packages.requirements
    last: deque[str] = deque(maxlen=_LAST_LINES)
    everything: list[str] = []
    with open(log, "w") as output, subprocess.Popen(
        [*command, "--", *requirements], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    ) as child:  # fmt: skip
        assert child.stdout is not None
        for line in child.stdout:
            output.write(line)
            last.append(line.rstrip())
            everything.append(line)
            if progress is not None and (step := re.match(r"Collecting ([\w.-]+)|Installing ", line)):
                progress(f"{phase} {step[1]}" if step[1] else "installing packages")
        status = child.wait()
    if status != 0:
        raise ImageError(
            f"installing {', '.join(requirements)} failed: {_reason(last) or f'pip ended with {status}'}",
            hint=f"is the network reachable? The whole log is {log}", details={"output": "\n".join(last)},
        )
    return "".join(everything)


def _reason(lines: Iterable[str]) -> str:
    """The line with the cause: pip's last error, else the last line with text."""
    written = [line for line in lines if line.strip()]
    errors = [line for line in written if line.startswith("ERROR: ")]
    return (errors or written or [""])[-1].removeprefix("ERROR: ")


def _prune(site: Path) -> None:
    """Remove files that no environment imports: the packages' own tests (a third of the size), scripts and manuals."""
    for folder in ("bin", "share"):
        shutil.rmtree(site / folder, ignore_errors=True)
    for tests in sorted(site.glob("*/**/tests")):
        if tests.is_dir() and any(tests.glob("test_*.py")):
            shutil.rmtree(tests)


def _words(site: Path, target: Path, log: Path, progress: Progress | None) -> None:
    """NLTK's corpus `words`; otherwise the machine's own dictionary in its place, with a note.

    A sandbox has no network, so the data that NLTK would download at its first use must be present.
    """
    if progress is not None:
        progress("fetching word lists")
    fetch = "import nltk, sys; sys.exit(not nltk.download('words', download_dir=sys.argv[1], quiet=True))"
    with open(log, "a") as output:
        try:
            done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, sys.argv[2]); {fetch}",
                                   str(target), str(site)], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                  timeout=_WORDS_TIMEOUT, check=False).returncode == 0  # fmt: skip
        except subprocess.TimeoutExpired:
            done = False
    found = target / "corpora/words"
    if done and (found / "en-basic").is_file():
        return
    for dictionary in _DICTIONARIES:
        if os.path.isfile(dictionary):
            words = [w for w in Path(dictionary).read_text(errors="ignore").split() if w.isascii() and w.isalpha()]
            found.mkdir(parents=True, exist_ok=True)
            for name in ("en", "en-basic"):
                (found / name).write_text("\n".join(words) + "\n")
            (target / "NOTE").write_text(f"The words are those of {dictionary}; NLTK's could not be fetched.\n")
            return


def make_readable(folder: Path) -> int:
    """Make everything readable for all users, whatever the umask; returns the bytes of its files."""
    size = 0
    for base, folders, files in os.walk(folder):
        for name in folders:
            path = os.path.join(base, name)
            if not os.path.islink(path):
                os.chmod(path, 0o755)
        for name in files:
            path = os.path.join(base, name)
            if not os.path.islink(path):
                info = os.stat(path)
                size += info.st_size
                os.chmod(path, 0o755 if info.st_mode & 0o100 else 0o644)
    return size
