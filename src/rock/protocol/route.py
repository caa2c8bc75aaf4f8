"""A row of the route table, and the access right that it requires."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

from rock.protocol.keys import Access

Plane = Literal["control", "data", "node"]
SANDBOX = "/v1/sandboxes/{sandbox_id}"


@dataclass(frozen=True)
class Route:
    """A row: `plane` control is the admin's, data goes through the proxy to the rocklet, node is admin to rocklet.

    method: ANY is each of METHODS. tail: the last variable is the whole rest of the path, which may be missing. access:
    the access right of the row; a row without a rule requires all rights, which only the server's owner has.
    """

    name: str
    method: str
    path: str
    plane: Plane
    summary: str
    request: str = ""  # model, or raw, or query names
    answer: str = ""
    mutates: bool = False
    tail: bool = False
    access: Access = Access.ADMIN

    def url(self, **values: str) -> str:
        """The path with its variables filled in and percent-encoded."""
        return self.path.format(**{k: quote(v, safe="") for k, v in values.items()})


_ACCESS = {  # for rows whose plane and method do not determine it
    "health": Access.OPEN,
    "metrics": Access.ADMIN,
    "commit_sandbox": Access.IMAGES,
    "add_env": Access.IMAGES,
    "build_env": Access.IMAGES,
    "build_image": Access.IMAGES,
    "create_key": Access.ADMIN,
    "list_keys": Access.ADMIN,
    "revoke_key": Access.ADMIN,
    "get_configuration": Access.ADMIN,
    "list_configurations": Access.ADMIN,
    "set_configuration": Access.ADMIN,
    "join_worker": Access.WORKER,
    "beat_worker": Access.WORKER,
    "worker_tunnel": Access.WORKER,
    "list_workers": Access.ADMIN,
    "drain_worker": Access.ADMIN,
    "undrain_worker": Access.ADMIN,
    "remove_worker": Access.ADMIN,
}


def _access(name: str, method: str, plane: Plane) -> Access:
    if name in _ACCESS or plane == "node":
        return _ACCESS.get(name, Access.ADMIN)
    if method == "GET":
        return Access.READ
    return Access.RUN if plane == "data" else Access.CREATE


def row(
    name: str, method: str, path: str, plane: Plane, summary: str, request: str = "", answer: str = ""
) -> Route:
    """A row whose access follows from its plane and method, where `_ACCESS` has no entry."""
    mutates = method in ("POST", "PUT", "PATCH", "DELETE")
    access = _access(name, method, plane)
    return Route(name, method, path, plane, summary, request, answer, mutates, access=access)
