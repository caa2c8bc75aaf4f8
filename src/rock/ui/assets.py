"""The static files of the web page: compressed once, and cached by browsers under the digest of all files."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "static"
_TYPES = {".js": b"text/javascript; charset=utf-8", ".css": b"text/css; charset=utf-8", ".svg": b"image/svg+xml",
          ".html": b"text/html; charset=utf-8", ".txt": b"text/plain; charset=utf-8",
          ".json": b"application/json"}  # fmt: skip
POLICY = (b"default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
          b"frame-ancestors 'none'")
HEADERS = [(b"content-security-policy", POLICY), (b"x-content-type-options", b"nosniff"),
           (b"referrer-policy", b"no-referrer"), (b"cross-origin-opener-policy", b"same-origin"),
           (b"x-frame-options", b"DENY")]  # fmt: skip
# For responses of the API to a session: bytes from a sandbox must not become a document with the origin of the page.
API_HEADERS = [(b"content-security-policy", b"sandbox; default-src 'none'"), (b"x-content-type-options", b"nosniff")]
FOREVER = (b"cache-control", b"public, max-age=31536000, immutable")
NEVER = (b"cache-control", b"no-store")


@dataclass(frozen=True)
class Asset:
    """A file: its bytes, plain and by gzip."""

    content_type: bytes
    plain: bytes
    packed: bytes


class Assets:
    """Files of `folder` by their path in it. Read at the first request; version: the digest of all of them."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = folder
        self._stamp: tuple[tuple[str, int, int], ...] = ()
        self._packed: dict[str, Asset] = {}
        self.version = ""

    def _files(self) -> list[Path]:
        return sorted(path for path in self._folder.rglob("*") if path.is_file() and path.suffix in _TYPES)

    def refresh(self) -> None:
        """Notice changed files: a developer edits a file and reloads the page."""
        files = self._files()
        found = tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files)
        if found == self._stamp:
            return
        digest = hashlib.sha256()
        for path in files:
            digest.update(path.relative_to(self._folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
        self._stamp, self._packed, self.version = found, {}, digest.hexdigest()[:16]

    def index(self) -> Asset:
        """The document of the page, with the paths of this version."""
        self.refresh()
        plain = (self._folder / "index.html").read_bytes().replace(b"STATIC", f"/ui/static/{self.version}".encode())
        return Asset(_TYPES[".html"], plain, gzip.compress(plain, 9, mtime=0))

    def find(self, path: str) -> Asset | None:
        """A file by its path below the folder; None for a path that is none of the files."""
        if not self.version:
            self.refresh()
        known = self._packed.get(path)
        if known is None:
            names = {file.relative_to(self._folder).as_posix(): file for file in self._files()}
            file = names.get(path)
            if file is None:
                return None
            plain = file.read_bytes()
            known = self._packed[path] = Asset(_TYPES[file.suffix], plain, gzip.compress(plain, 9, mtime=0))
        return known
