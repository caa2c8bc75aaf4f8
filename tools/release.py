"""Prepares a release: `python tools/release.py 0.2.0 --folder dist`. It changes files and builds; it publishes nothing.

1. checks: a clean working tree, a higher version, a section "Unreleased" with entries in CHANGELOG.md
2. writes the version into pyproject.toml, src/rock/__init__.py and CITATION.cff, and dates the section of the changelog
3. builds both wheels (tools/wheels.py) into the folder, and SHA256SUMS beside them
4. writes NOTES.md there: the section of the changelog

Afterwards review `git diff`, commit, tag `v0.2.0`, and upload the files of the folder. `--check` does the checks only.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import re
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).parent.parent
PLACES = (("pyproject.toml", r'^version = "(.*)"$'), ("src/rock/__init__.py", r'^__version__ = "(.*)"$'),
          ("CITATION.cff", r"^version: (.*)$"))  # fmt: skip
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_HEADING = "## [Unreleased]"


class Refused(Exception):
    """A check failed; nothing was changed."""


def parsed(version: str) -> tuple[int, ...]:
    found = _VERSION.fullmatch(version)
    if found is None:
        raise Refused(f"{version!r} is not a version like 1.2.3")
    return tuple(int(part) for part in found.groups())


def current(top: Path) -> str:
    """The version, which is the same in all places."""
    versions = {}
    for name, pattern in PLACES:
        found = re.search(pattern, (top / name).read_text(encoding="utf-8"), re.MULTILINE)
        if found is None:
            raise Refused(f"{name} has no line {pattern}")
        versions[name] = found[1].strip('"')
    if len(set(versions.values())) != 1:
        raise Refused(f"the versions differ: {versions}")
    return versions[PLACES[0][0]]


def unreleased(top: Path) -> str:
    """The entries of the section "Unreleased"."""
    _, mark, rest = (top / "CHANGELOG.md").read_text(encoding="utf-8").partition(_HEADING + "\n")
    if not mark:
        raise Refused(f"CHANGELOG.md has no section {_HEADING}")
    entries = re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0].strip()
    if not entries:
        raise Refused(f"CHANGELOG.md has no entries below {_HEADING}")
    return entries


def check(top: Path, version: str) -> None:
    """Refused when a release of that version cannot begin."""
    before = current(top)
    if parsed(version) <= parsed(before) and "[" + version + "]" in (top / "CHANGELOG.md").read_text(encoding="utf-8"):
        raise Refused(f"version {version} was released before; the current one is {before}")
    if parsed(version) < parsed(before):
        raise Refused(f"{version} is below the current version {before}")
    unreleased(top)
    changed = subprocess.run(["git", "-C", str(top), "status", "--porcelain"], capture_output=True, text=True,
                             check=True).stdout  # fmt: skip
    if changed:
        raise Refused(f"the working tree has changes: commit or remove them first\n{changed}")


def write(top: Path, version: str, day: datetime.date) -> None:
    """Write version and date into the files."""
    for name, pattern in PLACES:
        path = top / name
        text = path.read_text(encoding="utf-8")
        found = re.search(pattern, text, re.MULTILINE)
        assert found is not None  # `current` has checked it
        quote = '"' if found[1].startswith('"') else ""
        path.write_text(text[: found.start(1)] + quote + version + quote + text[found.end(1) :], encoding="utf-8")
    path = top / "CHANGELOG.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(_HEADING, f"{_HEADING}\n\n## [{version}] - {day.isoformat()}", 1), encoding="utf-8")


def checksums(folder: Path) -> str:
    """The lines of SHA256SUMS, as sha256sum writes them."""
    wheels = sorted(folder.glob("*.whl"))
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in wheels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version")
    parser.add_argument("--folder", default="dist")
    parser.add_argument("--check", action="store_true", help="do the checks only")
    given = parser.parse_args()
    try:
        check(TOP, given.version)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if given.check:
        return 0
    notes, folder = unreleased(TOP), Path(given.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.whl")):
        print(f"error: {folder} contains wheels already: use an empty folder", file=sys.stderr)
        return 1
    write(TOP, given.version, datetime.datetime.now(datetime.UTC).date())
    subprocess.run([sys.executable, str(TOP / "tools" / "wheels.py"), str(folder)], check=True, cwd=TOP)
    (folder / "SHA256SUMS").write_text(checksums(folder), encoding="utf-8")
    (folder / "NOTES.md").write_text(notes + "\n", encoding="utf-8")
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    print(f"review `git diff`, commit, and tag v{given.version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
