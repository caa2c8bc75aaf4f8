"""Names and labels of sandboxes: unique, changed, listed, free again after the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.conftest import IMAGE, RunningServer

from rock.errors import Conflict, InvalidConfig, NotFound
from rock.protocol.sandbox import State
from rock.sync import Client, Sandbox, SandboxConfig, SandboxGroup, SandboxGroupConfig


def named(server: RunningServer, name: str | None = None, **fields: object) -> Sandbox:
    given = {"base_url": server.url, "image": IMAGE, "memory": "256m", "cpus": 1.0, "name": name, **fields}
    return Sandbox(SandboxConfig.model_validate(given))


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def test_a_name_is_taken_until_its_sandbox_ends(server: RunningServer, client: Client) -> None:
    with named(server, "names-web") as first:
        assert [one.sandbox_id for one in client.list_sandboxes(name="names-web")] == [first.sandbox_id]
        second = named(server, "names-web")
        with pytest.raises(Conflict, match="rock stop names-web"):
            second.start()
        assert [one.sandbox_id for one in client.list_sandboxes(name="names-web")] == [first.sandbox_id]
    with named(server, "names-web") as third:
        assert third.info().name == "names-web"
        states = {one.sandbox_id: one.state for one in client.list_sandboxes(name="names-web")}
        assert states[str(third.sandbox_id)] is State.RUNNING and len(states) == 2


def test_a_restart_does_not_take_a_name_that_is_in_use(server: RunningServer, client: Client) -> None:
    with named(server, "names-again", auto_delete_seconds=600) as first:
        assert first.is_alive()
    with named(server, "names-again"), pytest.raises(Conflict, match="has the name names-again"):
        first.restart()
    first.restart()
    assert first.info().name == "names-again"
    first.delete()


def test_the_name_and_the_labels_can_be_changed(server: RunningServer, client: Client) -> None:
    with named(server, labels={"a": "1"}) as one, named(server, "names-other") as other:
        sandbox_id = str(one.sandbox_id)
        assert client.update_sandbox(sandbox_id, name="names-new").name == "names-new"
        assert client.get_sandbox(sandbox_id).labels == {"a": "1"}
        info = client.update_sandbox(sandbox_id, labels={"b": "2"})
        assert (info.name, info.labels) == ("names-new", {"b": "2"})
        assert [found.sandbox_id for found in client.list_sandboxes(label="b=2")] == [sandbox_id]
        with pytest.raises(Conflict, match="has the name names-other"):
            client.update_sandbox(sandbox_id, name="names-other")
        assert client.update_sandbox(sandbox_id, name=None).name is None
        assert other.info().name == "names-other"
    with pytest.raises(NotFound):
        client.update_sandbox("nosuchsandbox", name="names-x")


def test_connect_takes_a_name(server: RunningServer, client: Client) -> None:
    with Sandbox(IMAGE, name="names-connect", memory="256m", base_url=server.url) as made:
        found = Sandbox.connect("names-connect", base_url=server.url)
        assert found.sandbox_id == made.sandbox_id and found.run("echo hi").output == "hi\n"
        (info,) = Sandbox.list(filters={"name": "names-connect"}, base_url=server.url)
        assert info.sandbox_id == made.sandbox_id
    with Sandbox(IMAGE, name="names-connect", memory="256m", base_url=server.url) as later:
        assert Sandbox.connect("names-connect", base_url=server.url).sandbox_id == later.sandbox_id
    assert Sandbox.connect("names-connect", base_url=server.url).sandbox_id == later.sandbox_id
    with pytest.raises(NotFound):
        Sandbox.connect("names-none", base_url=server.url)


@pytest.mark.parametrize("name", ["", "-x", "a/b", "a b", "x" * 64, "\u00e9", "a\0"])
def test_a_wrong_name_is_refused(client: Client, name: str) -> None:
    with pytest.raises(InvalidConfig, match="name"):
        client.transport.json("POST", "/v1/sandboxes", {"image": IMAGE, "name": name})
    with pytest.raises(InvalidConfig):
        client.transport.json("PATCH", "/v1/sandboxes/any", {"name": name})


def test_a_group_has_no_name(server: RunningServer) -> None:
    config = SandboxGroupConfig(base_url=server.url, image=IMAGE, memory="64m", size=2, name="names-group")
    with pytest.raises(InvalidConfig, match="a name is for one sandbox"):
        SandboxGroup(config).start()
