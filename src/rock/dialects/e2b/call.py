"""One request of an E2B client to a sandbox."""

from __future__ import annotations

import base64
import binascii
from collections import OrderedDict
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from rock.dialects.e2b.errors import RpcError
from rock.dialects.e2b.native import Sandbox
from rock.errors import Forbidden, NotFound
from rock.http.asgi import Request
from rock.protocol.keys import Access

# ---- accounts ----
#
# E2B's templates have a user "user", in whose home folder commands and relative paths begin. Images of ROCK may have no
# such user: then this name, and no name, is the user of the image.

DEFAULT = "user"
_REMEMBERED = 2000
# Builtins of each POSIX shell, because an image may have neither `id` nor `cat`.
_WHO = ('while read -r key id rest; do case "$key" in Uid:|Gid:) echo "$id";; esac; done < /proc/self/status; '
        'echo "$HOME"')  # fmt: skip
_LONGEST = 1 << 20  # bytes of /etc/passwd and /etc/group that are read


@dataclass(frozen=True)
class Account:
    """A user of a sandbox. native: the name in native requests; None is the user of the image."""

    name: str
    uid: int
    gid: int
    home: str
    native: str | None


class Accounts:
    """The users of sandboxes. The user of the image is cached, other users are read for each call."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Account] = OrderedDict()

    async def find(self, sandbox: Sandbox, user: str) -> Account:
        """RpcError for a user that the sandbox does not have."""
        if user not in ("", DEFAULT):
            account = await self._of_passwd(sandbox, user)
            if account is None:
                raise RpcError("unauthenticated", f"invalid username {user[:80]!r}: the image has no such user")
            return account
        known = self._known.get(f"{sandbox.id} {user}")
        if known is None:
            known = (await self._of_passwd(sandbox, user) if user else None) or await self._of_image(sandbox)
            if Access.RUN not in sandbox.caller.scopes:
                return known
            self._known[f"{sandbox.id} {user}"] = known
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return known

    async def _of_image(self, sandbox: Sandbox) -> Account:
        try:
            found = await sandbox.json("execute", {"command": ["/bin/sh", "-c", _WHO], "timeout": 30.0})
            lines = str(found["stdout"]).split("\n")
            uid, gid, home = int(lines[0]), int(lines[1]), lines[2]
        except (NotFound, ValueError, IndexError, Forbidden):  # no shell, or a key that may only read
            uid, gid, home = 0, 0, "/"
        rows = await passwd(sandbox)
        name = next((row[0] for row in rows if row[2] == str(uid)), str(uid))
        home = next((row[5] for row in rows if row[2] == str(uid)), home)
        return Account(name, uid, gid, home if home.startswith("/") else "/", None)

    async def _of_passwd(self, sandbox: Sandbox, user: str) -> Account | None:
        for row in await passwd(sandbox):
            if row[0] == user and row[2].isdigit() and row[3].isdigit():
                return Account(user, int(row[2]), int(row[3]), row[5] if row[5].startswith("/") else "/", user)
        return None


async def passwd(sandbox: Sandbox, path: str = "/etc/passwd", columns: int = 7) -> list[list[str]]:
    """The rows of a file in the format of /etc/passwd; none where there is no such file."""
    try:
        data = await sandbox.read("read_file", query={"path": path, "length": _LONGEST})
    except NotFound:
        return []
    rows = (line.split(":") for line in data.decode("utf-8", "replace").split("\n"))
    return [row for row in rows if len(row) >= columns]


# ---- the request ----


@dataclass
class Call:
    """A request, its sandbox, and what is released after its response. user: the user of the request; "" is the
    default."""

    request: Request
    sandbox: Sandbox
    accounts: Accounts
    user: str = ""
    cleanup: AsyncExitStack = field(default_factory=AsyncExitStack)

    def require(self, access: Access) -> None:
        """Forbidden where the key of the caller lacks that access right."""
        self.sandbox.caller.require(access)

    async def account(self) -> Account:
        return await self.accounts.find(self.sandbox, self.user)

    async def path(self, text: str) -> str:
        """An absolute path: relative ones begin in the home folder, and `~` is the home folder. RpcError."""
        if "\0" in text:
            raise RpcError("invalid_argument", "the path has a NUL character: remove it")
        if text.startswith("/"):
            return text
        home = (await self.account()).home
        if text in ("", "~"):
            return home
        if text.startswith("~/"):
            return home.rstrip("/") + text[1:]
        if text.startswith("~"):
            raise RpcError("invalid_argument", f"{text[:80]!r}: only ~ and ~/ are expanded; use an absolute path")
        return f"{home.rstrip('/')}/{text.removeprefix('./')}"


def user_of(request: Request) -> str:
    """The user that a request names as `Authorization: Basic`, without a password."""
    given = request.header(b"authorization") or ""
    if given[:6].lower() != "basic ":
        return ""
    try:
        return base64.b64decode(given[6:].strip(), validate=True).decode().partition(":")[0]
    except (binascii.Error, UnicodeDecodeError):
        raise RpcError("unauthenticated", "the header Authorization is not of the form Basic base64(USER:)") from None
