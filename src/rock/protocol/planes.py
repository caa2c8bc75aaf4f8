"""Which requests a writer serves, which a reader, and which both: by method and path, before anything else is known.

A writer makes, stops, keeps and forgets; a reader serves everything inside a sandbox, at the worker that has it. What
only looks at records both do, and both take heartbeats, so that workers stay while one of them is away.
"""

from __future__ import annotations

from typing import Literal

from rock.protocol.routes import ROUTES

Role = Literal["write", "read"]

PREFIX = "/v1/sandboxes/"
BUILD = ROUTES["build_image"].path
_CALLS = ROUTES["cancel_call"].path.partition("{")[0]
_CONTROL = {"stop", "restart", "archive", "commit", "connections"}
_ROCK, _GEM, _TRAINING = "/apis/envs/sandbox/v1/", "/apis/v1/envs/gem/", "/apis/training/"
_ROCK_WRITES = {"start", "start_async", "stop", "delete", "restart", "commit"}
_ROCK_EITHER = {"sandboxes/batch"}


def is_data(path: str) -> bool:
    """Whether a path belongs to the data plane: something below a sandbox that is not the admin's, or a build."""
    if path == BUILD:
        return True
    if not path.startswith(PREFIX):
        return False
    _, _, rest = path[len(PREFIX) :].partition("/")
    return bool(rest) and rest not in _CONTROL


def role_for(method: str, path: str) -> Role | None:
    """Who serves a request; None is anybody. A WebSocket's method is GET."""
    if is_data(path):
        return "read"
    if path.startswith(_ROCK):
        return _of_rock(method, path.removeprefix(_ROCK))
    if path.startswith(_GEM):
        return "write" if path.endswith("/make") else "read"
    if path.startswith((_TRAINING, "/env/", "/v1/envs")):
        return "write"  # they may make a sandbox, or ask the writer's catalogue
    if path.startswith(_CALLS):
        return None
    if path == "/v1/workers" or (path.startswith("/v1/workers/") and path.endswith("/beat")):
        return None
    return None if method in ("GET", "HEAD", "OPTIONS") else "write"


def _of_rock(method: str, rest: str) -> Role | None:
    if rest.startswith("sandboxes/") and rest.count("/") >= 2:
        last = rest.rpartition("/")[2]
        return "write" if method == "POST" and rest.count("/") == 2 and last in ("restart", "archive") else "read"
    if method == "POST":
        return "write" if rest in _ROCK_WRITES else None if rest in _ROCK_EITHER else "read"
    known = ("get_status", "is_alive", "get_sandbox_statistics", "sandboxes", "get_token")
    return None if rest in known or rest.startswith("commit/") else "read"
