"""The Helm chart and the manifests rendered from it: lint, strict schemas, least rights, refused combinations."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tools import render_chart

from rock.kubernetes.kinds import KINDS
from tests.kubernetes import programs
from tests.packages import CannotBeHad

FOREIGN = ("ServiceMonitor", "ScaledObject")  # custom resources, of which there is no schema here
EXAMPLES = render_chart.examples()


@pytest.fixture(scope="module")
def helm() -> str:
    try:
        return str(programs.helm())
    except CannotBeHad as error:
        pytest.skip(str(error))


def objects(name: str) -> list[dict[str, Any]]:
    text = (render_chart.OUT / f"{name}.yaml").read_text()
    return [one for one in yaml.safe_load_all(text) if one]


def pods(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for one in objects(name):
        if one["kind"] in ("Deployment", "StatefulSet"):
            yield one["metadata"]["name"], one["spec"]["template"]["spec"]


def test_manifests_are_those_of_the_chart(helm: str) -> None:
    command = [sys.executable, "tools/render_chart.py", "--check", "--helm", helm]
    done = subprocess.run(command, cwd=render_chart.TOP, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("values", EXAMPLES, ids=lambda path: path.stem)
def test_lint(helm: str, values: Path) -> None:
    done = subprocess.run([helm, "lint", "--strict", str(render_chart.CHART), "--values", str(values)],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", ["1.33", "1.36"])
def test_schemas(version: str) -> None:
    try:
        python = programs.client_python()
    except CannotBeHad as error:
        pytest.skip(str(error))
    files = [str(render_chart.OUT / path.name) for path in EXAMPLES]
    done = subprocess.run([python.parent / "kubernetes-validate", "--strict", "-k", version, *files],
                          capture_output=True, text=True)  # fmt: skip
    output = (done.stdout + done.stderr).splitlines()
    wrong = [line for line in output if not line.startswith("INFO") and not any(kind in line for kind in FOREIGN)]
    assert done.returncode == 0 and not wrong, "\n".join(output)
    assert sum("passed" in line for line in output) >= 30, output


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (("secret.existing=x", "admin.replicas=2"), "need store.kind postgres"),
        (("secret.existing=x", "reader.replicas=1"), "need store.kind postgres"),
        ((), "set secret.apiKey and secret.workerKey"),
        (("secret.apiKey=a", "secret.workerKey=a"), "are the same"),
        (("secret.existing=x", "mode=crd"), "mode is workers or pod"),
        (("secret.existing=x", "workers.level=Z"), "workers.level is"),
        (("secret.apiKey=a", "secret.workerKey=b", "store.kind=postgres"), "needs store.url"),
    ],
)
def test_a_combination_that_cannot_work_is_refused(helm: str, given: tuple[str, ...], match: str) -> None:
    words = [word for value in given for word in ("--set", value)]
    done = subprocess.run([helm, "template", "rock", str(render_chart.CHART), *words], capture_output=True, text=True)
    assert done.returncode != 0 and match in done.stderr


PODS = ("pod", "opensandbox", "agent-sandbox", "sandbox-claims")  # in pod mode


def test_static_workers_have_no_rights() -> None:
    for path in EXAMPLES:
        if path.stem in PODS:
            continue
        found = objects(path.stem)
        assert not [one for one in found if one["apiVersion"].startswith("rbac.") or one["kind"] == "ServiceAccount"]
        for name, spec in pods(path.stem):
            assert spec["automountServiceAccountToken"] is False, (path.stem, name)
            assert spec["enableServiceLinks"] is False


def test_pod_mode_has_the_least_rights() -> None:
    found = objects("pod")
    roles = [one for one in found if one["kind"] == "Role"]
    verbs = ["create", "get", "list", "watch", "patch", "delete"]
    assert [one["rules"] for one in roles] == [[{"apiGroups": [""], "resources": ["pods"], "verbs": verbs}]]
    assert not [one for one in found if one["kind"] in ("ClusterRole", "ClusterRoleBinding")]
    assert [name for name, spec in pods("pod") if spec["automountServiceAccountToken"]] == ["rock-admin"]


@pytest.mark.parametrize(("name", "kind"), [("opensandbox", "BatchSandbox"), ("agent-sandbox", "Sandbox"),
                                            ("sandbox-claims", "SandboxClaim")])  # fmt: skip
def test_objects_of_controllers_have_the_least_rights(name: str, kind: str) -> None:
    """The server cannot create or delete a pod: the controller does."""
    (role,) = [one for one in objects(name) if one["kind"] == "Role"]
    rights = {(group, what): set(rule["verbs"]) for rule in role["rules"] for group in rule["apiGroups"]
              for what in rule["resources"]}  # fmt: skip
    used = KINDS[kind]
    group = used.group.partition("/")[0]
    assert rights.pop(("", "pods")) == {"get", "list", "watch"}
    assert {"create", "get", "list", "watch", "delete"} <= rights.pop((group, used.resource))
    assert rights == ({(group, "pools"): {"get"}} if kind == "BatchSandbox" else {})


def test_servers_are_restricted_and_level_a_is_a_user_namespace() -> None:
    for name, spec in pods("readers"):
        if "worker" not in name:
            assert spec["securityContext"]["runAsNonRoot"] is True
            context = spec["containers"][0]["securityContext"]
            assert context["readOnlyRootFilesystem"] and context["capabilities"] == {"drop": ["ALL"]}
    worker = dict(pods("level-a"))["rock-worker"]
    assert worker["hostUsers"] is False and "privileged" not in worker["containers"][0]["securityContext"]
    for spec in (spec for path in EXAMPLES for _, spec in pods(path.stem)):
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()


def test_the_metadata_address_is_blocked() -> None:
    for name in ("static", "pod"):
        policies = [one["spec"] for one in objects(name) if one["kind"] == "NetworkPolicy"]
        (policy,) = (one for one in policies if "Egress" in one["policyTypes"])
        blocks = [to["ipBlock"] for rule in policy["egress"] for to in rule["to"] if "ipBlock" in to]
        assert blocks and all("169.254.0.0/16" in block["except"] for block in blocks)


def test_the_page_of_the_values_is_current() -> None:
    command = [sys.executable, "tools/helm_reference.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=render_chart.TOP)
    assert done.returncode == 0, done.stderr
