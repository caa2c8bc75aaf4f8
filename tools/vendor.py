"""Write the JavaScript libraries of the web page to src/rock/ui/static/vendor/, with their licences.

`python tools/vendor.py` fetches the pinned packages with npm, compares each tarball with its SHA-512, and writes the
files below. `--check` compares the files on disk with the digests in vendor.json and needs no network.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

TARGET = Path(__file__).parent.parent / "src" / "rock" / "ui" / "static" / "vendor"
INDEX = "vendor.json"


@dataclass(frozen=True)
class Package:
    """An npm package. integrity: "sha512-" and base64, of its tarball. files: path in the package -> name here."""

    name: str
    version: str
    licence: str
    integrity: str
    files: dict[str, str]

    @property
    def licence_file(self) -> str:
        return f"{self.name.replace('@', '').replace('/', '-')}.LICENSE.txt"


PACKAGES = (
    Package("preact", "11.2.0", "MIT",
            "sha512-/HfHI/7N84e6GrWBJ3J280z3mLaRJiDcSvj/A+y/4AbLnND/1UlGHe1sR6oYuTGwId0nP7dqDU9OnLxMPZ7xBg==",
            {"dist/preact.mjs": "preact.js", "hooks/dist/hooks.mjs": "hooks.js"}),
    Package("htm", "3.1.1", "Apache-2.0",
            "sha512-983Vyg8NwUE7JkZ6NmOqpCZ+sh1bKv2iYTlUkzlWmA5JD2acKoxd4KVxbMmxX/85mtfdnDmTFoNKcg5DGAvxNQ==",
            {"dist/htm.mjs": "htm.js"}),
    Package("uplot", "1.6.32", "MIT",
            "sha512-KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+jabjLgSLMasNuGGzQm/ep3tOkyTxpiQIw==",
            {"dist/uPlot.esm.js": "uplot.js", "dist/uPlot.min.css": "uplot.css"}),
    Package("@xterm/xterm", "6.0.0", "MIT",
            "sha512-TQwDdQGtwwDt+2cgKDLn0IRaSxYu1tSUjgKarSDkUM0ZNiSRXFpjxEsvc/Zgc5kq5omJ+V0a8/kIM2WD3sMOYg==",
            {"lib/xterm.mjs": "xterm.js", "css/xterm.css": "xterm.css"}),
    Package("@xterm/addon-fit", "0.11.0", "MIT",
            "sha512-jYcgT6xtVYhnhgxh3QgYDnnNMYTcf8ElbxxFzX0IZo+vabQqSPAjC3c1wJrKB5E19VwQei89QCiZZP86DCPF7g==",
            {"lib/addon-fit.mjs": "xterm-fit.js"}),
)  # fmt: skip

# Bare names of modules are relative here: a page without inline scripts has no import map. Source maps are not shipped.
_IMPORTS = {b'"preact"': b'"./preact.js"', b"'preact'": b"'./preact.js'"}


def fetched(package: Package, folder: Path) -> bytes:
    """The tarball of a package. SystemExit when its digest differs."""
    subprocess.run(["npm", "pack", "--silent", f"{package.name}@{package.version}"], cwd=folder, check=True,
                   stdout=subprocess.DEVNULL)
    stem = package.name.replace("@", "").replace("/", "-")
    data = (folder / f"{stem}-{package.version}.tgz").read_bytes()
    found = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    if found != package.integrity:
        raise SystemExit(f"{package.name}@{package.version}: the tarball has {found}, pinned is {package.integrity}")
    return data


def adapted(data: bytes) -> bytes:
    """A file as it is stored: relative imports, no reference to a source map."""
    for name, path in _IMPORTS.items():
        data = data.replace(b"from" + name, b"from" + path).replace(b"from " + name, b"from " + path)
    maps = (b"//# sourceMappingURL=", b"/*# sourceMapping")
    lines = [line for line in data.splitlines() if not line.startswith(maps)]
    return b"\n".join(line.rstrip() for line in lines) + b"\n"


def write() -> None:
    """Fetch all packages and write their files."""
    TARGET.mkdir(parents=True, exist_ok=True)
    index = []
    with tempfile.TemporaryDirectory() as scratch:
        for package in PACKAGES:
            files = {}
            with tarfile.open(fileobj=io.BytesIO(fetched(package, Path(scratch)))) as archive:
                names = {member.name: member for member in archive if member.isfile()}
                licence = next(n for n in sorted(names) if n.count("/") == 1 and "license" in n.lower())
                for path, name in ({f"package/{p}": n for p, n in package.files.items()}
                                   | {licence: package.licence_file}).items():
                    source = archive.extractfile(names[path])
                    assert source is not None
                    data = source.read()
                    data = data if name == package.licence_file else adapted(data)
                    (TARGET / name).write_bytes(data)
                    files[name] = hashlib.sha256(data).hexdigest()
            index.append({"name": package.name, "version": package.version, "licence": package.licence,
                          "integrity": package.integrity, "files": files})  # fmt: skip
    (TARGET / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def problems() -> list[str]:
    """Differences of the stored files from vendor.json and from the pinned versions."""
    index = json.loads((TARGET / INDEX).read_text())
    found = []
    pinned = {(p.name, p.version, p.integrity) for p in PACKAGES}
    if {(p["name"], p["version"], p["integrity"]) for p in index} != pinned:
        found.append("vendor.json has other versions than tools/vendor.py")
    digests = {name: digest for package in index for name, digest in package["files"].items()}
    for path in sorted(TARGET.iterdir()):
        if path.name != INDEX and digests.pop(path.name, "") != hashlib.sha256(path.read_bytes()).hexdigest():
            found.append(f"{path.name} is not the file of its package")
    return found + [f"{name} is missing" for name in digests]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        write()
    if found := problems():
        sys.exit("\n".join(found) + "\nrun: python tools/vendor.py")


if __name__ == "__main__":
    main()
