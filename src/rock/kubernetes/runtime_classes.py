"""Whether the RuntimeClasses of the pod templates, and the kind of the objects of sandboxes, exist.

RuntimeClasses are objects of the cluster, not of a namespace. The Role of a server does not permit reading them; then
the finding states that, and a create with an absent class is refused by the API server.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rock.errors import InvalidConfig, NotFound, RockError
from rock.kubernetes.access import Access
from rock.kubernetes.client import Api, path_of
from rock.kubernetes.kinds import Kind
from rock.kubernetes.templates import Template, read_templates

_PATH = "/apis/node.k8s.io/v1/runtimeclasses/"


@dataclass(frozen=True)
class FoundClass:
    """ok: None when it is not known."""

    name: str
    ok: bool | None
    detail: str
    hint: str = ""


def classes_of(templates: dict[str, Template]) -> dict[str, list[str]]:
    """The templates of each RuntimeClass. Classes that depend on variables are left out."""
    found: dict[str, list[str]] = {}
    for name, template in sorted(templates.items()):
        wanted = str((template.body.get("spec") or {}).get("runtimeClassName") or "")
        if wanted and "{{" not in wanted:
            found.setdefault(wanted, []).append(name)
    return found


async def found_classes(access: Access, templates: str) -> list[FoundClass]:
    """A row for each RuntimeClass of a file of templates. InvalidConfig for an unusable file."""
    wanted = classes_of(read_templates(Path(templates).expanduser()))
    api = Api(access)
    try:
        return [await _found(api, name, users) for name, users in wanted.items()]
    finally:
        await api.close()


async def found_kind(access: Access, kind: Kind, namespace: str) -> FoundClass | None:
    """A row for the custom resource of the kind; None for pods."""
    if kind.is_pod:
        return None
    api = Api(access)
    try:
        await api.get(f"{path_of(kind.resource, namespace, group=kind.group)}?limit=1", tries=1)
    except NotFound:
        return FoundClass(kind.name, False, f"the cluster has no {kind.resource} ({kind.group})",
                          "install its controller and CRD, or change ROCK_KUBERNETES_KIND")
    except RockError as error:
        return FoundClass(kind.name, None, f"not checked: {error.message}", error.hint or "")
    finally:
        await api.close()
    return FoundClass(kind.name, True, f"{kind.resource} of {kind.group}")


async def _found(api: Api, name: str, users: list[str]) -> FoundClass:
    what = f"for template {', '.join(users)}"
    try:
        handler = (await api.get(_PATH + name)).get("handler")
    except NotFound:
        return FoundClass(name, False, f"it does not exist, {what}", "install it, or change runtimeClassName")
    except InvalidConfig as error:
        return FoundClass(name, None, f"not checked, {what}: {error.message}", "check it as an owner of the cluster")
    except RockError as error:
        return FoundClass(name, None, f"not checked, {what}: {error.message}", error.hint or "")
    return FoundClass(name, True, f"handler {handler}, {what}")
