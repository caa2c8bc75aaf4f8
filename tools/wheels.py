"""Build both wheels into a folder: one for this platform with the extension, one for any platform without it.

    python tools/wheels.py FOLDER

Each wheel is unpacked and asked what it uses. Exits with 1 when that is not what it was built for, as when there is no
C compiler. The extension needs no C library, so its wheel is tagged manylinux2014.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TOP = Path(__file__).parent.parent
ASK = "from rock.guest.init import native; print(native.library is not None, native.missing)"


def build(folder: Path, compiled: bool) -> Path:
    """One wheel, moved to `folder`. CalledProcessError when pip fails."""
    environment = {key: value for key, value in os.environ.items() if key != "ROCK_NO_EXTENSIONS"}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if compiled:
        command += ["--config-settings", f"--build-option=--plat-name=manylinux2014_{platform.machine()}"]
    else:
        environment["ROCK_NO_EXTENSIONS"] = "1"
    with tempfile.TemporaryDirectory(prefix="rock-wheel-") as made:
        source = Path(made) / "source"  # a copy: setuptools would reuse an older build/ folder
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
        for name in ("src", "native"):
            shutil.copytree(TOP / name, source / name, ignore=ignore)
        for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copy(TOP / name, source)
        subprocess.run([*command, "--wheel-dir", made, str(source)], check=True, env=environment)
        wheel = next(Path(made).glob("*.whl"))
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, folder))


def ask(wheel: Path) -> tuple[bool, str]:
    """Whether the package in a wheel uses its extension, and why not."""
    with tempfile.TemporaryDirectory(prefix="rock-wheel-") as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        told = subprocess.run([sys.executable, "-S", "-c", ASK], cwd=folder, env={"PYTHONPATH": folder}, check=True,
                              capture_output=True, text=True).stdout  # fmt: skip
    compiled, _, reason = told.strip().partition(" ")
    return compiled == "True", reason


def main() -> int:
    folder = Path(sys.argv[1])
    for compiled in (False, True):
        wheel = build(folder, compiled)
        found, reason = ask(wheel)
        print(f"{wheel}: {'compiled' if found else f'fork fallback ({reason})'}")
        if found != compiled:
            wheel.unlink()
            print("the extension could not be built: install a C compiler (gcc or clang)" if compiled
                  else "the extension is in the wheel that must not have it", file=sys.stderr)  # fmt: skip
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
