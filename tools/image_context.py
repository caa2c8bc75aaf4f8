"""Write the build context of deploy/images: the wheels of ROCK and of all packages that it needs.

    python tools/image_context.py FOLDER [--python 3.12]

The versions are those of requirements-dev.lock. --python: the Python of the base image.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import wheels

LOCK = wheels.TOP / "requirements-dev.lock"
EXTRAS = "server,postgres,rock-conf,otel"


def constraints() -> list[str]:
    """The pinned versions of the lock file, without hashes, which a constraint must not have."""
    return re.findall(r"^[A-Za-z0-9_.-]+==[^\s;\\]+(?: *;[^\\\n]+)?", LOCK.read_text(), re.MULTILINE)


def write(folder: Path, python: str) -> Path:
    """The folder with the wheels. CalledProcessError when a package cannot be downloaded."""
    target = folder / "wheels"
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("rock_sandbox-*.whl"):
        old.unlink()
    own = wheels.build(target, compiled=True)
    with tempfile.TemporaryDirectory(prefix="rock-context-") as made:
        pinned = Path(made) / "constraints.txt"
        pinned.write_text("\n".join(constraints()) + "\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary",
                   ":all:", "--python-version", python, "--constraint", str(pinned), "--find-links", str(target),
                   "--dest", str(target), f"rock-sandbox[{EXTRAS}] @ {own.as_uri()}"]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the build context of deploy/images.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of Python of the base image")
    given = parser.parse_args()
    print(write(given.folder, given.python))


if __name__ == "__main__":
    main()
