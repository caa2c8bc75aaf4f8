"""Registry credentials: ROCK's own file, then Docker's configuration.

    ROCK_HOME/registries.json    mode 0600, apart from the image store; `rock image login` writes it
    ~/.docker/config.json        read only: its `auths`, its `credHelpers` and its `credsStore`

Credentials are sent only to their own registry: a mirror has separate ones, or none. A credential helper gets the
registry's name on its standard input and responds on its standard output, so no secret appears in a process list.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rock.errors import ImageError, InvalidConfig, NotFound
from rock.images.records import locked, storing, write_atomic
from rock.images.registry.reference import HUB, Reference, parse

_HUB_KEYS = ("https://index.docker.io/v1/", "index.docker.io", HUB)
_HELPER = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_HELPER_TIME = 30.0  # seconds
_LARGEST = 1 << 20
HELPER = "run it in a shell to see the cause, or save a login of ROCK's own with `rock image login`"
_TOKEN_USER = "<token>"


@dataclass(frozen=True)
class Login:
    """A user of a registry."""

    username: str
    password: str = field(repr=False)

    @property
    def basic(self) -> str:
        pair = f"{self.username}:{self.password}".encode()
        return f"Basic {base64.b64encode(pair).decode()}"


class Logins:
    """The logins in `file`, then those of Docker's configuration in the folder `docker`; None for none."""

    def __init__(self, file: Path | None, docker: Path | None = None) -> None:
        self._file = file
        self._docker = docker
        self._lock = threading.Lock()

    def of(self, domain: str) -> Login | None:
        """The login for a registry, by its name in images. ImageError when a helper program fails."""
        own = self._own().get(domain)
        if isinstance(own, dict):
            return Login(str(own.get("username", "")), str(own.get("password", "")))
        return self._dockers(domain)

    def domains(self) -> dict[str, str]:
        """Usernames by registry, of ROCK's own file."""
        return {domain: str(row.get("username", "")) for domain, row in sorted(self._own().items())}

    def save(self, domain: str, login: Login) -> None:
        """Store a login for a registry."""
        with self._changing() as own:
            own[domain] = {"username": login.username, "password": login.password}

    def forget(self, domain: str) -> None:
        """Delete it; NotFound when ROCK's own file has none."""
        with self._changing() as own:
            if own.pop(domain, None) is None:
                raise NotFound(f"no login for {domain} is kept here", hint="`rock image logins` shows what there is; "
                               "Docker's own are in ~/.docker/config.json")  # fmt: skip

    # ---- ROCK's own file ----

    def _own(self) -> dict[str, dict[str, Any]]:
        if self._file is None:
            return {}
        body = _json(self._file)
        rows = body.get("registries")
        if not isinstance(rows, dict):
            return {}
        mode = self._file.stat().st_mode
        if mode & 0o077:
            raise InvalidConfig(f"{self._file} can be read by others than you", hint=f"chmod 600 {self._file}")
        return {str(domain): row for domain, row in rows.items() if isinstance(row, dict)}

    @contextlib.contextmanager
    def _changing(self) -> Any:
        assert self._file is not None
        with storing(f"writing {self._file}"), self._lock:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locked(self._file.with_name(f".{self._file.name}.lock")):
                own = self._own()
                yield own
                write_atomic(self._file, json.dumps({"registries": own}, indent=1).encode())  # mode 0600

    # ---- Docker's configuration ----

    def _dockers(self, domain: str) -> Login | None:
        if self._docker is None:
            return None
        body = _json(self._docker / "config.json")
        keys = _HUB_KEYS if domain == HUB else (domain, f"https://{domain}", f"https://{domain}/v1/")
        helpers = body.get("credHelpers")
        for key in keys:
            helper = helpers.get(key) if isinstance(helpers, dict) else None
            if isinstance(helper, str):
                return _helped(helper, key)
        auths = body.get("auths")
        row = next((auths[key] for key in keys if key in auths), None) if isinstance(auths, dict) else None
        if isinstance(row, dict) and isinstance(row.get("auth"), str) and row["auth"]:
            return _decoded(row["auth"], domain)
        stored = body.get("credsStore")
        if row is not None and isinstance(stored, str):
            return _helped(stored, keys[0])
        return None


def domain_of(registry: str) -> str:
    """Normalize user input to a registry name. InvalidConfig."""
    name = registry.removeprefix("https://").removeprefix("http://").rstrip("/")
    if name in _HUB_KEYS or name in ("index.docker.io/v1", "registry-1.docker.io"):
        return HUB
    reference = parse(f"{name}/probe")
    if reference.domain != name:
        raise InvalidConfig(f"{registry!r} names no registry", hint="write it like localhost:5000 or docker.io")
    return name


def any_of(domain: str) -> Reference:
    """An arbitrary reference in a registry, for a client of it."""
    return parse(f"{domain}/probe")


def _json(file: Path) -> dict[str, Any]:
    try:
        with open(file, "rb") as opened:
            body = json.loads(opened.read(_LARGEST))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return {}
    except (ValueError, RecursionError, OSError):
        raise InvalidConfig(f"{file} is no JSON", hint="mend it, or remove it") from None
    return body if isinstance(body, dict) else {}


def _decoded(auth: str, domain: str) -> Login | None:
    try:
        user, colon, password = base64.b64decode(auth, validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        raise InvalidConfig(f"Docker's configuration has a damaged login for {domain}",
                            hint=f"run `docker login {domain}` or `rock image login {domain}` again") from None
    return Login(user, password.rstrip("\0")) if colon else None


def _helped(helper: str, key: str) -> Login | None:
    """The login of a Docker credential helper for a registry; None when it has none."""
    name = f"docker-credential-{helper}"
    program = shutil.which(name) if _HELPER.fullmatch(helper) else None
    if program is None:
        raise ImageError(f"Docker's configuration names the program {name}, which is not on this machine",
                         hint="install it, or `rock image login` for a login of ROCK's own")  # fmt: skip
    command = [program, "get"]
    try:
        run = subprocess.run(command, input=key.encode(), capture_output=True, timeout=_HELPER_TIME, cwd=os.sep)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ImageError(f"the credential helper {name} cannot be run: {type(error).__name__}", hint=HELPER) from None
    if run.returncode != 0:
        output = run.stdout[:300].decode(errors="replace").strip()
        if "not found" in output:
            return None
        raise ImageError(f"the credential helper {name} failed with status {run.returncode}: {output}", hint=HELPER)
    try:
        body = json.loads(run.stdout)
        login = Login(str(body["Username"]), str(body["Secret"]))
    except (ValueError, KeyError, TypeError):
        raise ImageError(f"the output of the credential helper {name} is not a login", hint=HELPER) from None
    if login.username == _TOKEN_USER:
        raise ImageError(f"{name} has an identity token for {key}, which is not supported",
                         hint="`rock image login` with a username and a password or access token")  # fmt: skip
    return login
