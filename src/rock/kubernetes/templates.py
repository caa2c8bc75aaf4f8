"""Pod templates: a file of templates, and a sandbox -> the manifest of its pod. Rendering is pure.

    templates:                        or ROCK's file, in which they are below `k8s`
      default:
        template: {metadata: ..., spec: ...}      a pod template
        ports: {proxy: 8000}                      ROCK's; the port of the rocklet

      warm:                             for the kinds BatchSandbox and SandboxClaim (kinds.py)
        pool: {name: ..., image: ..., cpus: 2, memory: 8g}   a pool of the controller, and what its pods are

Each string may have variables, as "{{ cpus }}". Of Jinja, variables are supported only: expressions, filters and blocks
are refused when the file is read, and so is an unknown variable. A value that renders empty is left out with its key.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rock.errors import InvalidConfig
from rock.kubernetes.access import document
from rock.protocol.configuration import full_name
from rock.protocol.keys import POD_PREFIX
from rock.protocol.sandbox import TEMPLATE_LABEL, SandboxConfig, parse_size

Object = dict[str, Any]

ID_LABEL = "rock.sandbox/id"
ROCK_ID_LABEL = "rock.sandbox/sandbox-id"
POOL_LABEL = "rock.sandbox/pool"
WORKER_LABEL = "rock.sandbox/worker"
INSTANCE_LABEL = "rock.sandbox/instance"
OWNER_LABEL = "app.kubernetes.io/managed-by"
PORT = 8090
VARIABLES = ("sandbox_id", "template_name", "image", "cpus", "memory", "disk", "num_gpus", "accelerator_type",
             "limit_cpus", "encrypted_image_auth")  # fmt: skip
_VARIABLE = re.compile(r"\{\{\s*([A-Za-z_][A-Za-z0-9_]*)\s*\}\}")
_DNS = re.compile(r"[a-z0-9]([a-z0-9-]{0,47}[a-z0-9])?")
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True)
class PoolRef:
    """A pool of a controller, and what its pods are, which the controller does not report. memory: bytes."""

    name: str
    image: str
    cpus: float
    memory: int


@dataclass(frozen=True)
class Template:
    """body: {metadata, spec} of a pod; empty for a pool. speedup: `enable_resource_speedup` of ROCK's file."""

    name: str
    body: Object
    port: int = PORT
    pool: PoolRef | None = None
    speedup: bool = False


@dataclass(frozen=True)
class Joining:
    """What the rocklet of a pod needs: the servers that it joins, and the key of this pod."""

    servers: str
    key: str
    instance: str  # of these servers: only their own pods are theirs


def pod_name(sandbox_id: str) -> str:
    """The name of the pod and of its worker: a DNS label, the same for the same sandbox."""
    if _DNS.fullmatch(sandbox_id):
        return POD_PREFIX + sandbox_id
    readable = re.sub(r"[^a-z0-9]+", "-", sandbox_id.lower()).strip("-")[:24].strip("-")
    digest = hashlib.sha256(sandbox_id.encode()).hexdigest()[:20]
    return f"{POD_PREFIX}{readable}-{digest}" if readable else POD_PREFIX + digest


def read_templates(path: Path) -> dict[str, Template]:
    """The templates of a file, by name. InvalidConfig, Unsupported."""
    content = document(path, "ROCK_KUBERNETES_TEMPLATES")
    if isinstance(content, dict) and isinstance(content.get("k8s"), dict):
        content = content["k8s"]
    rows = content.get("templates") if isinstance(content, dict) else None
    if not isinstance(rows, dict) or not rows:
        raise _invalid(path, "it has no `templates`", "add templates: {default: {template: {spec: ...}}}")
    return {str(name): _template(path, str(name), row) for name, row in rows.items()}


def _template(path: Path, name: str, row: object) -> Template:
    body = row.get("template") if isinstance(row, dict) else None
    if isinstance(row, dict) and "pool" in row:
        if body is not None:
            raise _invalid(path, f"template {name!r} has both `template` and `pool`", "remove one of them")
        return Template(name, {}, _port(path, name, row), _pool(path, name, row["pool"]))
    if not isinstance(row, dict) or not isinstance(body, dict):
        raise _invalid(path, f"template {name!r} has no `template`", "add {spec: {containers: [...]}} to it")
    spec = body.get("spec")
    containers = spec.get("containers") if isinstance(spec, dict) else None
    if not isinstance(containers, list) or not containers or not all(isinstance(one, dict) for one in containers):
        raise _invalid(path, f"template {name!r} has no containers", "add spec.containers")
    _check(path, name, body)
    return Template(name, body, _port(path, name, row), speedup=bool(row.get("enable_resource_speedup")))


def _port(path: Path, name: str, row: Object) -> int:
    ports = row.get("ports")
    port = ports.get("proxy", PORT) if isinstance(ports, dict) else PORT
    if not isinstance(port, int) or not 0 < port < 65536:
        raise _invalid(path, f"template {name!r}: ports.proxy is no port", f"as ports: {{proxy: {PORT}}}")
    return port


def _pool(path: Path, name: str, row: object) -> PoolRef:
    hint = "as pool: {name: python, image: \"python:3.11\", cpus: 2, memory: 8g}"
    if not isinstance(row, dict) or set(row) != {"name", "image", "cpus", "memory"}:
        raise _invalid(path, f"template {name!r}: pool has not name, image, cpus and memory", hint)
    pool, image, cpus = row["name"], row["image"], row["cpus"]
    if not isinstance(pool, str) or not _DNS.fullmatch(pool) or not isinstance(image, str) or not image:
        raise _invalid(path, f"template {name!r}: name or image of its pool is not usable", hint)
    if isinstance(cpus, bool) or not isinstance(cpus, int | float) or not cpus > 0:
        raise _invalid(path, f"template {name!r}: cpus of its pool is no number above 0", hint)
    try:
        return PoolRef(pool, image, float(cpus), parse_size(str(row["memory"])))
    except ValueError as error:
        raise _invalid(path, f"template {name!r}: memory of its pool: {error}", hint) from None


def _check(path: Path, name: str, value: object) -> None:
    """InvalidConfig for parts of Jinja that are not supported."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check(path, name, key)
            _check(path, name, inner)
    elif isinstance(value, list):
        for inner in value:
            _check(path, name, inner)
    elif isinstance(value, str):
        for variable in _VARIABLE.findall(value):
            if variable not in VARIABLES:
                raise _invalid(path, f"template {name!r} has an unknown variable {variable!r}",
                               f"use one of {', '.join(VARIABLES)}")
        rest = _VARIABLE.sub("", value)
        if "{{" in rest or "{%" in rest or "{#" in rest:
            raise _invalid(path, f"template {name!r}: {value[:80]!r} is more than a variable",
                           "expressions, filters and blocks of Jinja are not supported; use {{ variable }}")


def _invalid(path: Path, why: str, hint: str) -> InvalidConfig:
    return InvalidConfig(f"the pod templates of {path} are not usable: {why}", hint=hint)


# ---- rendering ----


def template_name(config: SandboxConfig) -> str:
    return config.labels.get(TEMPLATE_LABEL, "default")


def template_for(templates: Mapping[str, Template], config: SandboxConfig) -> Template:
    """The template of a sandbox. InvalidConfig when there is none of that name."""
    name = template_name(config)
    found = templates.get(name)
    if found is None:
        raise InvalidConfig(f"no pod template {name!r} (there are: {', '.join(sorted(templates))})",
                            hint=f"set the label {TEMPLATE_LABEL} to one of them")  # fmt: skip
    if found.pool is not None:
        _check_fits(name, found.pool, config)
    return found


def _check_fits(name: str, pool: PoolRef, config: SandboxConfig) -> None:
    """InvalidConfig for a sandbox that a pod of the pool cannot be."""
    if full_name(pool.image) != full_name(config.image):
        why = f"its pods have the image {pool.image!r}"
    elif config.cpus > pool.cpus or config.memory_bytes > pool.memory:
        why = f"its pods have {pool.cpus:g} cpus and {quantity(pool.memory)} of memory"
    elif config.disk_bytes or config.num_gpus:
        why = "a size of the disk and GPUs are properties of its pods, which no sandbox can change"
    else:
        return
    raise InvalidConfig(f"template {name!r} uses pool {pool.name!r}: {why}",
                        hint=f"request what the pool has, or another template by the label {TEMPLATE_LABEL}")


def variables(sandbox_id: str, template: Template, config: SandboxConfig) -> dict[str, str]:
    """What the variables of a template are for one sandbox."""
    cpus = f"{config.cpus:g}"
    disk = config.disk_bytes
    return {
        "sandbox_id": sandbox_id, "template_name": template.name, "image": config.image, "cpus": cpus,
        "limit_cpus": cpus, "memory": quantity(config.memory_bytes), "disk": quantity(disk) if disk else "",
        "num_gpus": f"{config.num_gpus:g}" if config.num_gpus else "",
        "accelerator_type": config.accelerator_type or "", "encrypted_image_auth": "",
    }  # fmt: skip


def quantity(size: int) -> str:
    """Bytes as Kubernetes writes them: 8Gi, 2048Mi, or plain bytes."""
    for unit, letters in ((1 << 30, "Gi"), (1 << 20, "Mi")):
        if size % unit == 0:
            return f"{size // unit}{letters}"
    return str(size)


def labels_of(name: str, sandbox_id: str, template: Template, instance: str) -> dict[str, str]:
    """The labels of the objects of a sandbox. name: of its worker."""
    labels = {
        "app.kubernetes.io/name": "rock", "app.kubernetes.io/component": "sandbox", OWNER_LABEL: "rock",
        "app.kubernetes.io/instance": instance, "rock.sandbox/template": template.name, WORKER_LABEL: name,
        INSTANCE_LABEL: instance,
    }  # fmt: skip
    if _LABEL.fullmatch(sandbox_id):
        labels[ROCK_ID_LABEL] = sandbox_id
    return labels


def pod_of(name: str, sandbox_id: str, template: Template, config: SandboxConfig, joining: Joining) -> Object:
    """{metadata: {labels, annotations}, spec}: the template, with what makes its pod the worker of that name.
    sandbox_id: "" for a pod that no sandbox has yet."""
    body = _rendered(copy.deepcopy(template.body), variables(sandbox_id, template, config))
    meta: Object = body.get("metadata") or {}
    labels = {**(meta.get("labels") or {}), **labels_of(name, sandbox_id, template, joining.instance)}
    annotations = {**(meta.get("annotations") or {}), **({ID_LABEL: sandbox_id} if sandbox_id else {})}
    spec: Object = body["spec"]
    # A pod runs once: a container that is started again would be another sandbox with the same id.
    spec["restartPolicy"] = "Never"
    spec.setdefault("automountServiceAccountToken", False)
    spec.setdefault("enableServiceLinks", False)
    spec.setdefault("terminationGracePeriodSeconds", 10)
    container: Object = spec["containers"][0]
    address: Object = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    advertised = {"name": "ROCK_ADVERTISE", "value": f"http://$(POD_IP):{template.port}"}
    own = [address, advertised, *environment(name, template.port, config.image.replace("$(", "$$("), joining)]
    taken = {row["name"] for row in own}
    container["env"] = own + [row for row in container.get("env") or [] if row.get("name") not in taken]
    ports = container.setdefault("ports", [])
    if not any(row.get("containerPort") == template.port for row in ports):
        ports.append({"name": "rocklet", "containerPort": template.port})
    return {"metadata": {"labels": labels, "annotations": annotations}, "spec": spec}


def environment(name: str, port: int, image: str, joining: Joining) -> list[Object]:
    """The variables by which a rocklet joins as the worker of that name. Without ROCK_ADVERTISE it advertises its
    address towards the server."""
    fixed = {
        "ROCK_JOIN": joining.servers, "ROCK_WORKER_NAME": name, "ROCK_API_KEY": joining.key, "ROCK_HOST": "0.0.0.0",
        "ROCK_PORT": str(port), "ROCK_CONTAINER_IMAGE": image, "ROCK_SANDBOX_LIMIT": "1", "ROCK_POOL_SIZE": "0",
    }  # fmt: skip
    return [{"name": key, "value": value} for key, value in fixed.items()]


def uses(value: Any, variable: str) -> bool:
    """Whether a template has a variable."""
    if isinstance(value, dict):
        return any(uses(inner, variable) for inner in value.values())
    if isinstance(value, list):
        return any(uses(inner, variable) for inner in value)
    return isinstance(value, str) and variable in _VARIABLE.findall(value)


def _rendered(value: Any, given: Mapping[str, str]) -> Any:
    """The value with its variables replaced; mappings and lists without what rendered empty."""
    if isinstance(value, dict):
        pairs = ((key, inner, _rendered(inner, given)) for key, inner in value.items())
        return {key: made for key, inner, made in pairs if not (made == "" and inner != "")}
    if isinstance(value, list):
        pairs2 = ((inner, _rendered(inner, given)) for inner in value)
        return [made for inner, made in pairs2 if not (made == "" and inner != "")]
    if isinstance(value, str):
        return _VARIABLE.sub(lambda match: given[match[1]], value)
    return value
