"""The kinds of objects by which a sandbox gets its pod: the pod itself, or an object of a controller that makes one.

    Pod           the pod of a template
    BatchSandbox  OpenSandbox: the pod of a template; or a Pool, in one of whose pods a task starts the rocklet
    Sandbox       agent-sandbox: the pod of a template
    SandboxClaim  agent-sandbox: a SandboxWarmPool; the controller makes a pod of its SandboxTemplate with the
                  environment of the claim

Each rocklet has the key of its sandbox only, also in the pod of a pool: a pod has no key before it has a sandbox, so
code in one sandbox has no access to the rocklet of another one. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from rock.errors import InvalidConfig, Unsupported
from rock.kubernetes.failures import Failure, failure_of, failure_of_batch, failure_of_claim
from rock.kubernetes.templates import (
    ID_LABEL,
    Joining,
    PoolRef,
    Template,
    environment,
    labels_of,
    pod_of,
)
from rock.protocol.sandbox import SandboxConfig

Object = dict[str, Any]

_BATCH = "sandbox.opensandbox.io/v1alpha1"
_ENDPOINTS = "sandbox.opensandbox.io/endpoints"
_OWN = "rock.sandbox/"
_SPEEDUP = "batchsandbox.alibabacloud.com/resource-speedup"


@dataclass(frozen=True)
class Kind:
    """name: of the kind. group: GROUP/VERSION, or "v1". templates, pools: which of both it is made from.

    spec: (pod, template) -> the spec of the object. pooled: (environment, template) -> the same for a pool.
    failure: of an object. addresses: of the pods of an object.
    """

    name: str
    group: str
    resource: str
    templates: bool
    pools: bool
    spec: Callable[[Object, Template], Object]
    pooled: Callable[[list[Object], Template], Object]
    failure: Callable[[Object], Failure | None]
    addresses: Callable[[Object], list[str]]

    @property
    def is_pod(self) -> bool:
        return self.group == "v1"

    def check(self, templates: Mapping[str, Template]) -> None:
        """Unsupported for a template from which this kind cannot be made."""
        for template in templates.values():
            if template.pool is not None and not self.pools:
                raise Unsupported(f"template {template.name!r} names a pool, which ROCK_KUBERNETES_KIND={self.name} "
                                  "does not use", hint="use BatchSandbox or SandboxClaim, or a pod template")
            if template.pool is None and not self.templates:
                raise Unsupported(f"template {template.name!r} is a pod template, and ROCK_KUBERNETES_KIND={self.name} "
                                  "uses pools only", hint="give it a `pool`, or use the kind Sandbox")  # fmt: skip

    def manifest(self, name: str, sandbox_id: str, template: Template, config: SandboxConfig,
                 joining: Joining) -> Object:  # fmt: skip
        """The object of a sandbox, whose worker has its name. sandbox_id: "" for one that no sandbox has yet."""
        if template.pool is not None:
            labels = labels_of(name, sandbox_id, template, joining.instance)
            annotations = {ID_LABEL: sandbox_id} if sandbox_id else {}
            spec = self.pooled(environment(name, template.port, config.image, joining), template)
            if self.name == "SandboxClaim":  # its controller refuses system prefixes
                own = {key: value for key, value in labels.items() if key.startswith(_OWN)}
                spec["additionalPodMetadata"] = {"labels": own}
        else:
            pod = pod_of(name, sandbox_id, template, config, joining)
            labels, annotations = dict(pod["metadata"]["labels"]), dict(pod["metadata"]["annotations"])
            spec = self.spec(pod, template)
        if template.speedup and self.name == "BatchSandbox":
            labels[_SPEEDUP] = "true"
        return {"apiVersion": self.group, "kind": self.name,
                "metadata": {"name": name, "labels": labels, "annotations": annotations}, "spec": spec}  # fmt: skip


def _no_pool(environment: list[Object], template: Template) -> Object:
    raise AssertionError("a kind without pools")  # `Kind.check` refuses it


def _no_template(pod: Object, template: Template) -> Object:
    raise AssertionError("a kind without templates")


def _batch_of(pod: Object, template: Template) -> Object:
    return {"replicas": 1, "template": pod}


def _batch_from_pool(variables: list[Object], template: Template) -> Object:
    assert template.pool is not None
    task = {"spec": {"process": {"command": ["rocklet"], "env": variables}}}
    return {"replicas": 1, "poolRef": template.pool.name, "taskTemplate": task}


def _sandbox_of(pod: Object, template: Template) -> Object:
    return {"podTemplate": pod, "service": False, "shutdownPolicy": "Delete"}


def _claim_from_pool(variables: list[Object], template: Template) -> Object:
    assert template.pool is not None
    return {"warmPoolRef": {"name": template.pool.name}, "env": variables}


def _pod_address(found: Object) -> list[str]:
    return _texts([(found.get("status") or {}).get("podIP")])


def _batch_addresses(found: Object) -> list[str]:
    text = ((found.get("metadata") or {}).get("annotations") or {}).get(_ENDPOINTS)
    try:
        return _texts(orjson.loads(text)) if isinstance(text, str) else []
    except orjson.JSONDecodeError:
        return []


def _sandbox_addresses(found: Object) -> list[str]:
    return _texts((found.get("status") or {}).get("podIPs"))


def _claim_addresses(found: Object) -> list[str]:
    return _sandbox_addresses({"status": (found.get("status") or {}).get("sandbox")})


def _texts(value: object) -> list[str]:
    return [one for one in value if isinstance(one, str) and one] if isinstance(value, list) else []


POD = Kind("Pod", "v1", "pods", True, False, lambda pod, _: dict(pod["spec"]), _no_pool, failure_of, _pod_address)
KINDS = {kind.name: kind for kind in (
    POD,
    Kind("BatchSandbox", _BATCH, "batchsandboxes", True, True, _batch_of, _batch_from_pool, failure_of_batch,
         _batch_addresses),
    Kind("Sandbox", "agents.x-k8s.io/v1beta1", "sandboxes", True, False, _sandbox_of, _no_pool, failure_of_claim,
         _sandbox_addresses),
    Kind("SandboxClaim", "extensions.agents.x-k8s.io/v1beta1", "sandboxclaims", False, True, _no_template,
         _claim_from_pool, failure_of_claim, _claim_addresses),
)}  # fmt: skip
POOLS = _BATCH, "pools"  # the objects of `poolRef`


def kind_of(name: str) -> Kind:
    """InvalidConfig for a name that is none."""
    found = KINDS.get(name)
    if found is None:
        raise InvalidConfig(f"ROCK_KUBERNETES_KIND={name} is not a known kind", hint=f"use one of {', '.join(KINDS)}")
    return found


def check_pool(found: Object, pool: PoolRef) -> None:
    """Unsupported for a Pool that uses a pod again: the files of a sandbox would be in the next one."""
    spec = found.get("spec") or {}
    recycling = spec.get("recycleStrategy") or {}
    policy = spec.get("podRecyclePolicy") or (recycling.get("type") if isinstance(recycling, dict) else None)
    if policy != "Delete":
        raise Unsupported(f"the Pool {pool.name!r} does not delete the pods of its sandboxes (policy {policy!r})",
                          hint="set recycleStrategy.type, or podRecyclePolicy, of the Pool to Delete")  # fmt: skip
