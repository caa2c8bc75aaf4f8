"""Images made of sandboxes, in the ROCK dialect: begun, and looked at until they are done."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator

from rock.admin.api.rock_v1.envelope import CODED, AboutSandbox, Name, Row, body_of, enveloped
from rock.admin.api.rock_v1.status import time_of
from rock.admin.desk import Desks
from rock.errors import Conflict, NotFound, RockError
from rock.protocol.keys import Access
from rock.protocol.sandbox import CommitError, CommitPhase, CommitRequest, CommitStatus
from rock.wire.asgi import Request, validate

_BREAKS = re.compile("[\\x00\\n\\r\\v\\f\\x1c-\\x1e\\x85\\u2028\\u2029]")


def _one_line(text: str) -> str:
    if _BREAKS.search(text):
        raise ValueError("it must not have line separators or NUL")
    return text


class CommitWish(AboutSandbox):
    """What a client asks for. An empty user name is none."""

    image_tag: Annotated[Name, AfterValidator(_one_line)]
    username: str
    password: str


class Commits:
    """Handlers, by method and path."""

    def __init__(self, desks: Desks) -> None:
        self._desks = desks

    def routes(self) -> list[Row]:
        return [
            ("POST", "/commit", enveloped(self.commit, "commit sandbox failed", CODED), Access.IMAGES),
            ("GET", "/commit/{sandbox_id}", enveloped(self.status, "get commit status failed", CODED), Access.READ),
        ]

    async def commit(self, request: Request) -> dict[str, Any]:
        """Begin. What names a registry goes there with the login that is given; anything else stays here."""
        wish = await body_of(request, CommitWish)
        fields = {"image_tag": wish.image_tag, "push": bool(wish.username) and _names_registry(wish.image_tag),
                  "registry_username": wish.username or None, "registry_password": wish.password or None}  # fmt: skip
        try:
            return _told(await self._desks(request.scope).commit(wish.sandbox_id, validate(CommitRequest, fields)))
        except NotFound as error:
            raise _worded(CommitError.SANDBOX_NOT_FOUND, error) from None
        except Conflict as error:
            raise _worded(CommitError.COMMIT_CONFLICT, error) from None

    async def status(self, request: Request) -> dict[str, Any]:
        try:
            return _told(await self._desks(request.scope).commit_status(request.path["sandbox_id"]))
        except NotFound as error:
            raise _worded(error.details.get("commit", CommitError.SANDBOX_NOT_FOUND), error) from None


def _told(status: CommitStatus) -> dict[str, Any]:
    """A CommitStatusResponse."""
    error = (status.error or {}).get("error", {})
    text = " ".join(filter(None, (error.get("message"), f"({error['hint']})" if error.get("hint") else "")))
    ended = {CommitPhase.SUCCEEDED: 0, CommitPhase.FAILED: 1}
    return {
        "sandbox_id": status.sandbox_id,
        "image_tag": status.image_tag,
        "phase": status.phase.value,
        "started_at": time_of(status.started_at),
        "completed_at": time_of(status.completed_at),
        "exit_code": ended.get(status.phase),
        "failed_stage": status.failed_stage,
        "error_code": status.error_code,
        "error_message": text or None,
    }


def _worded(code: str, error: RockError) -> RockError:
    """The same with ROCK's word for it in front."""
    return type(error)(f"{code}: {error.message}", sandbox_id=error.sandbox_id, hint=error.hint)


def _names_registry(tag: str) -> bool:
    first, slash, _ = tag.partition("/")
    return bool(slash) and (first == "localhost" or any(mark in first for mark in ".:"))
