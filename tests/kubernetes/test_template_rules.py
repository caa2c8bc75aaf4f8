"""Rules of the live configuration about pod templates: which one a sandbox gets, who may name one, and its limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from rock.errors import Forbidden, InvalidConfig, Unsupported
from rock.kubernetes.templates import pod_name
from rock.protocol.configuration import Configuration
from rock.protocol.keys import CreateKey
from rock.protocol.sandbox import SandboxConfig
from rock.sync import Client, Sandbox
from tests.cluster.machines import KEY, server
from tests.kubernetes.pod_world import World
from tests.waiting import until

RULES = [{"image": "registry.example/team/*", "template": "team"},
         {"image": "docker.io/library/python:3.*", "max_gpus": 0, "template": "python"},
         {"min_gpus": 1, "accelerator_types": ["A100"], "template": "gpu"}]  # fmt: skip


def plain(color: str) -> dict[str, Any]:
    return {"template": {"metadata": {"labels": {"color": color}},
                         "spec": {"containers": [{"name": "main", "image": "{{ image }}"}]}}}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("rules"))
    made.templates = {name: plain(name) for name in ("default", "team", "python", "gpu", "secret")}
    made.start()
    yield made
    made.stop()


def rules(world: World, **parts: Any) -> None:
    with world.client() as client:
        client.set_configuration(Configuration.model_validate({"templates": parts}))


def color(world: World, image: str, **fields: Any) -> str:
    """The label of the template of which a sandbox of this image has a pod."""
    with Sandbox(base_url=world.server.url, api_key=KEY, image=image, memory="64m", **fields) as sandbox:
        return str(world.cluster.pod(pod_name(sandbox.sandbox_id))["metadata"]["labels"]["color"])


def test_the_first_rule_that_matches(world: World) -> None:
    assert color(world, "python:3.12") == "default"
    rules(world, rules=RULES)
    assert color(world, "python:3.12") == "python" and color(world, "python:2.7") == "default"
    assert color(world, "registry.example/team/a:1") == "team"
    assert color(world, "python:3.12", labels={"rock.kubernetes.template": "secret"}) == "secret", "a named one wins"
    rules(world)
    assert color(world, "python:3.12") == "default", "it changes without a restart"


@pytest.mark.parametrize(("fields", "wanted"), [
    ({"num_gpus": 2, "accelerator_type": "A100"}, "gpu"), ({"num_gpus": 2, "accelerator_type": "T4"}, "default"),
    ({"num_gpus": 0}, "python"), ({"num_gpus": None}, "python"),
])  # fmt: skip
def test_rules_about_gpus(fields: dict[str, Any], wanted: str) -> None:
    found = Configuration.model_validate({"templates": {"rules": RULES}})
    assert found.templates.selected(SandboxConfig(image="python:3.12", **fields)) == wanted


def test_allowed_templates_and_limits(world: World) -> None:
    with world.client() as client:
        key = client.create_key(CreateKey(name="team")).key
    rules(world, rules=RULES, allowed=["default", "team"], limits={"python": {"cpus": 1, "memory": "128m"}})

    def start(image: str, cpus: float = 0.5, memory: str = "64m", **labels: str) -> None:
        with Sandbox(base_url=world.server.url, api_key=key, image=image, cpus=cpus, memory=memory,
                     labels={f"rock.kubernetes.{name}": text for name, text in labels.items()}):  # fmt: skip
            pass

    with pytest.raises(Forbidden, match="does not allow this key the pod template 'secret'"):
        start("x:1", template="secret")
    for allowed in ({"image": "x:1", "template": "team"}, {"image": "python:3.12"}):  # the second by a rule
        with pytest.raises(Unsupported, match="isolates nothing"):  # the fake runtime in the pod, after the rules
            start(**allowed)
    for fields, match in (({"cpus": 2}, "at most 1 cpus"), ({"memory": "256m"}, "at most 128m of memory")):
        with pytest.raises(InvalidConfig, match=match):
            start("python:3.12", **fields)  # type: ignore[arg-type]
    assert color(world, "x:1", labels={"rock.kubernetes.template": "secret"}) == "secret", "the owner may"
    rules(world)
    until(lambda: world.pods() == [], 30, "pods are left")


def test_rules_that_cannot_apply(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    for parts in ({"rules": [{"template": "none"}]}, {"allowed": ["none"]}, {"limits": {"none": {"cpus": 1}}}):
        with pytest.raises(InvalidConfig, match="no pod template 'none'"):
            rules(world, **parts)
    with pytest.raises(ValueError, match="Invalid memory size"):
        Configuration.model_validate({"templates": {"limits": {"default": {"memory": "much"}}}})
    front = server(tmp_path_factory.mktemp("plain"), 0, ROCK_RUNTIME="fake")
    try:
        with Client(front.url, KEY) as client, pytest.raises(Unsupported, match="templates: the sandboxes"):
            client.set_configuration(Configuration.model_validate({"templates": {"rules": [{"template": "a"}]}}))
    finally:
        front.stop()
