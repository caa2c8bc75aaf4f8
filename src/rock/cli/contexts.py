"""Stored servers of the command line: names, URLs and API keys in ROCK_HOME/contexts.json, mode 0600."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rock.cli.serve.home import Home, make_private
from rock.errors import InvalidConfig, NotFound
from rock.host import atomic_file

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,62}")


@dataclass(frozen=True)
class Context:
    """A server under a name."""

    name: str
    url: str
    api_key: str | None = None

    def __repr__(self) -> str:
        return f"Context({self.name!r}, {self.url!r})"


class Contexts:
    """The stored contexts of one home folder, and the current one."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._file = home / "contexts.json"

    def all(self) -> list[Context]:
        found = self._read().get("contexts", {})
        return [Context(name, str(item["url"]), item.get("api_key")) for name, item in sorted(found.items())]

    @property
    def current(self) -> Context | None:
        name = self._read().get("current")
        return next((context for context in self.all() if context.name == name), None)

    def save(self, context: Context) -> None:
        """Store a context and make it the current one."""
        if not _NAME.fullmatch(context.name):
            raise InvalidConfig(f"{context.name!r} is not a name of a context",
                                hint="use letters, digits and _.:- in --name")
        data = self._read()
        item = {"url": context.url} | ({"api_key": context.api_key} if context.api_key else {})
        data.setdefault("contexts", {})[context.name] = item
        self._write({**data, "current": context.name})

    def use(self, name: str | None) -> None:
        """Make a context the current one; None: no context is current."""
        data = self._read()
        if name is not None:
            self._require(name, data)
        self._write({**data, "current": name})

    def remove(self, name: str) -> None:
        data = self._read()
        self._require(name, data)
        del data["contexts"][name]
        if data.get("current") == name:
            data["current"] = None
        self._write(data)

    def _require(self, name: str, data: dict[str, Any]) -> None:
        if name not in data.get("contexts", {}):
            raise NotFound(f"there is no context {name!r}",
                           hint="`rock context ls` lists them; `rock login URL` adds one")

    def _read(self) -> dict[str, Any]:
        try:
            data = json.loads(self._file.read_text())
        except FileNotFoundError:
            return {}
        except ValueError:
            data = None
        contexts = data.get("contexts", {}) if isinstance(data, dict) else None
        if not isinstance(contexts, dict) or not all(isinstance(i, dict) and "url" in i for i in contexts.values()):
            raise InvalidConfig(f"{self._file} is damaged: it is not a list of contexts",
                                hint="remove it, then `rock login URL` again")
        return dict(data)

    def _write(self, data: dict[str, Any]) -> None:
        if not self.home.exists():
            make_private(self.home)
        atomic_file.replace(self._file, json.dumps(data, indent=1) + "\n")


def name_of(url: str) -> str:
    """The name that a context of a URL has by default: its host and port."""
    return urlsplit(url).netloc.rpartition("@")[2].strip("[]").replace("]", "") or "server"


def url_of(note: dict[str, Any]) -> str:
    """The URL of a running server, from the note in its home folder."""
    host = note.get("host", "?")
    scheme = "https" if note.get("tls_cert") else "http"
    return f"{scheme}://{f'[{host}]' if ':' in str(host) else host}:{note.get('port', '?')}"


def server_of(home: Path) -> str | None:
    """The URL of the server that runs with this home folder."""
    note = Home(home).read() if home.is_dir() else None
    if not note or "port" not in note:
        return None
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(note.get("host")), note.get("host"))
    return url_of({**note, "host": host})
