"""The live configuration on a real server: over the API, from a file, from Nacos, and what each part changes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from tests.admin.test_keys import ask
from tests.conftest import IMAGE, RunningServer, give_image
from tests.store.postgres_server import postgres
from tests.waiting import until

from rock.admin.configuration import FileSource, parsed
from rock.admin.nacos import NacosSource
from rock.admin.tags import MetricTags
from rock.errors import Conflict, Forbidden, InvalidConfig, QuotaExceeded, RockError, Unavailable
from rock.protocol.configuration import Configuration, ConfigurationVersion
from rock.protocol.keys import CreateKey, Quota
from rock.store.base import Store
from rock.store.configurations import MOST_KEPT
from rock.store.sqlite import SqliteStore
from rock.sync import Client, Sandbox, SandboxConfig

OWNER = "the owner's key"
PATH = "/v1/configuration"


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    made = RunningServer(tmp_path_factory.mktemp("home"), ROCK_API_KEY=OWNER)
    give_image(made.home)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def owner(configured: RunningServer) -> Iterator[Client]:
    with Client(configured.url, OWNER) as client:
        yield client
        (configured.home / "config.yaml").unlink(missing_ok=True)
        if client.get_configuration().writable:
            client.set_configuration(Configuration())


def start(server: RunningServer, key: str, **config: Any) -> Sandbox:
    sandbox = Sandbox(SandboxConfig(base_url=server.url, api_key=key, memory="64m", cpus=0.1,
                                    **{"image": IMAGE, **config}))  # fmt: skip
    sandbox.start()
    return sandbox


def test_a_change_is_a_version(configured: RunningServer, owner: Client) -> None:
    before = owner.get_configuration().version
    wanted = Configuration.model_validate({"pools": {"size": 3}, "log": {"level": "debug"}})
    checked = owner.set_configuration(wanted, check=True)
    assert checked.version == before and checked.configuration == Configuration()
    done = owner.set_configuration(wanted, expected=before)
    assert done.version == before + 1 and done.configuration == wanted and done.writable
    assert owner.set_configuration(wanted).version == before + 1, "the same configuration is no new version"
    with pytest.raises(Conflict, match=f"version {before} is not the current one"):
        owner.set_configuration(Configuration(), expected=before)
    newest = owner.list_configurations(1)[0]
    assert newest.version == done.version and newest.source == "api" and newest.author == "owner"
    until(lambda: [(w.worker, w.version) for w in owner.get_configuration().workers] == [("local", done.version)])
    assert f"rock_configuration_version {done.version}" in ask(configured, OWNER, "GET", "/metrics")[2].decode()
    assert any(entry.action == "set_configuration" for entry in owner.audit(limit=20))


def test_bad_requests_change_nothing(configured: RunningServer, owner: Client) -> None:
    before = owner.get_configuration()
    wrong: list[Any] = [
        {"pools": {"size": -1}}, {"pools": {"size": 10**9}}, {"pool": {}}, {"log": {"level": "loud"}},
        {"networks": {"allowed": ["host"]}}, {"features": {"everything": False}}, {"features": {"jobs": "maybe"}},
        {"quotas": {"tenants": {"Not A Tenant": {}}}}, {"quotas": {"default": {"memory": "much"}}},
        {"images": {"mirrors": {"docker.io": ["http://x"]}}}, {"images": {"rewrite": [{"match": "x", "replace": "y"}]}},
        {"images": {"rewrite": [{"match": "a/", "replace": "b/"}] * 1001}}, {"images": {"insecure_registries": [""]}},
        [], 5, None,
    ]  # fmt: skip
    for configuration in wrong:
        status, _, reply = ask(configured, OWNER, "PUT", PATH, {"configuration": configuration})
        assert status == 422, (configuration, reply)
    assert ask(configured, OWNER, "PUT", PATH, {"configuration": {}, "expected": -1})[0] == 422
    assert ask(configured, OWNER, "GET", f"{PATH}/history?limit=0")[0] == 422
    assert ask(configured, None, "GET", PATH)[0] == 401
    after = owner.get_configuration()
    assert (after.version, after.configuration, after.error) == (before.version, before.configuration, "")


def test_a_tenant_neither_reads_nor_changes_it(configured: RunningServer, owner: Client) -> None:
    key = owner.create_key(CreateKey(name="x", tenant="reader")).key
    with Client(configured.url, key) as tenant:
        for call in (tenant.get_configuration, tenant.list_configurations,
                     lambda: tenant.set_configuration(Configuration())):  # fmt: skip
            with pytest.raises(Forbidden):
                call()


def test_quotas_networks_and_images(configured: RunningServer, owner: Client) -> None:
    plain = owner.create_key(CreateKey(name="x", tenant="plain")).key
    own = owner.create_key(CreateKey(name="x", tenant="own", quota=Quota(sandboxes=5))).key
    owner.set_configuration(Configuration.model_validate({
        "quotas": {"default": {"sandboxes": 1}, "tenants": {"own": {"sandboxes": 2}}},
        "networks": {"allowed": ["none"]},
        "images": {"rewrite": [{"match": "old.example/hub/", "replace": "docker.io/library/"},
                               {"match": "old.example/", "replace": "never.example/"}]},
    }))  # fmt: skip
    made = [start(configured, plain, image=f"old.example/hub/{IMAGE}"), start(configured, own), start(configured, own)]
    assert made[0].info().image == f"docker.io/library/{IMAGE}"
    for key in (plain, own):
        with pytest.raises(QuotaExceeded):
            start(configured, key)
    with pytest.raises(Forbidden, match='does not allow network "nat"'):
        start(configured, own, network="nat")
    kept = start(configured, OWNER)
    assert kept.info().image == IMAGE, "no rule matches"
    owner.set_configuration(Configuration())
    made += [start(configured, own), kept]
    with pytest.raises(RockError):
        start(configured, own, image=f"old.example/hub/{IMAGE}", pull="never")
    for sandbox in made:
        sandbox.stop()


def test_metrics_by_tags(configured: RunningServer, owner: Client) -> None:
    owner.set_configuration(Configuration.model_validate({"metrics": {"tags": ["experiment", "label.team"]}}))
    for number in range(2):
        start(configured, OWNER, experiment_id="grpo", labels={"team": f"t{number}", "other": "x"}).stop()
    start(configured, OWNER).stop()
    lines = [line.rpartition(" ") for line in ask(configured, OWNER, "GET", "/metrics")[2].decode().splitlines()]
    counts = {name: float(value) for name, _, value in lines if name.startswith("rock_tagged")}
    name = "rock_tagged_creates_total"
    assert counts[f'{name}{{tag="experiment",value="grpo",outcome="running"}}'] == 2
    assert counts[f'{name}{{tag="label.team",value="t0",outcome="running"}}'] == 1
    assert counts['rock_tagged_sandbox_seconds_total{tag="experiment",value="grpo"}'] > 0
    assert not any("other" in line for line in counts)
    wrong = {"configuration": {"metrics": {"tags": ["password"]}}}
    assert ask(configured, OWNER, "PUT", PATH, wrong)[0] == 422


def test_the_values_of_a_tag_are_bounded() -> None:
    tags = MetricTags()
    assert len({tags._bounded("user", f"u{number}") for number in range(1000)}) == 101
    assert {tags._bounded(f"label.{number}", "x") for number in range(100)} == {"x", "other"}


def test_a_feature_that_is_off_rejects_new_operations(configured: RunningServer, owner: Client) -> None:
    body = {"name": "v", "size": "1g"}
    owner.set_configuration(Configuration(features={"volumes": False, "gateway": False, "image_builds": False}))
    for path in ("/v1/volumes", "/v1/runs", "/v1/images/build"):
        status, _, reply = ask(configured, OWNER, "POST", path, body)
        assert (status, reply["error"]["code"]) == (403, "forbidden") and "switched off" in reply["error"]["message"]
    assert ask(configured, OWNER, "GET", "/v1/volumes")[0] == 200
    owner.set_configuration(Configuration(features={"volumes": True}))
    assert "switched off" not in str(ask(configured, OWNER, "POST", "/v1/volumes", body)[2])


def test_a_file_is_followed_and_errors_keep_the_previous_version(configured: RunningServer, owner: Client) -> None:
    file = configured.home / "config.yaml"
    file.write_text("pools: {size: 7}  # YAML\n")
    until(lambda: owner.get_configuration().configuration.pools.size == 7)
    status = owner.get_configuration()
    assert status.source == str(file) and not status.writable
    with pytest.raises(Conflict, match="is read from"):
        owner.set_configuration(Configuration())
    for text in ("pools: {size: many}", "pools: [", "- a list", "pools: {sise: 1}", "x: &a [*a]", "\x00"):
        file.write_text(text)
        until(lambda: bool(owner.get_configuration().error))
        assert owner.get_configuration().configuration.pools.size == 7, text
        file.write_text("pools: {size: 7}")
        until(lambda: not owner.get_configuration().error)
    file.write_bytes(b"#" * (2 << 20))
    until(lambda: "more than" in owner.get_configuration().error)
    time.sleep(1.0)
    assert "more than" in owner.get_configuration().error, "as long as the content is invalid"
    file.write_text("pools: {size: 7}")
    until(lambda: not owner.get_configuration().error)
    # A ConfigMap: the folder behind a symbolic link is replaced.
    (configured.home / "first").mkdir()
    (configured.home / "first" / "config.yaml").write_text('{"pools": {"size": 8}}')
    (configured.home / "data").symlink_to("first")
    file.unlink()
    file.symlink_to("data/config.yaml")
    until(lambda: owner.get_configuration().configuration.pools.size == 8)
    (configured.home / "second").mkdir()
    (configured.home / "second" / "config.yaml").write_text('{"pools": {"size": 9}}')
    (configured.home / "new").symlink_to("second")
    (configured.home / "new").rename(configured.home / "data")
    until(lambda: owner.get_configuration().configuration.pools.size == 9)
    file.unlink()
    until(lambda: owner.get_configuration().writable)
    assert owner.get_configuration().configuration.pools.size == 9, "without the file, the API changes it"
    metrics = ask(configured, OWNER, "GET", "/metrics")[2].decode()
    assert "rock_configuration_errors_total" in metrics


def test_a_restarted_server_has_the_last_version(tmp_path: Path) -> None:
    server = RunningServer(tmp_path, ROCK_RUNTIME="fake")
    server.start()
    with Client(server.url) as client:
        client.set_configuration(Configuration.model_validate({"pools": {"size": 5}}))
    server.stop()
    (tmp_path / "config.yaml").write_text("pools: 5")
    server.start()
    with Client(server.url) as client:
        status = client.get_configuration()
        assert status.configuration.pools.size == 5 and "pools" in status.error
    server.stop()
    (tmp_path / "rock.sqlite").unlink()
    with pytest.raises(AssertionError, match=r"config\.yaml is no configuration: pools"):
        server.start()


def test_the_command(configured: RunningServer, owner: Client) -> None:
    def rock(*words: str, status: int = 0) -> str:
        done = subprocess.run([sys.executable, "-m", "rock.cli.main", "config", *words], capture_output=True, text=True,
                              env={**os.environ, "ROCK_BASE_URL": configured.url, "ROCK_API_KEY": OWNER})  # fmt: skip
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    assert "valid" in rock("set", "--check", "pools.size=4")
    number = int(rock("set", "pools.size=4", "images.mirrors.docker.io=[\"mirror.example:5000\"]", "log.level=info")
                 .split()[-1])
    rock("set", "pools.size=null", "log.level=warning")
    assert json.loads(rock("show", "--version", str(number)))["pools"] == {"size": 4}
    shown = owner.get_configuration().configuration.document()
    assert shown == {"images": {"mirrors": {"docker.io": ["mirror.example:5000"]}}, "log": {"level": "warning"}}
    changes = rock("diff").splitlines()
    assert changes == ['- log.level="info"', '+ log.level="warning"', "- pools.size=4"]
    assert str(number) in rock("history")
    assert "pools.size" in rock("set", "pools.size=-1", status=1)
    assert "is no change" in rock("set", "pools.size", status=1)
    assert "no version 99999" in rock("show", "--version", "99999", status=1)


def test_versions_in_both_stores(tmp_path: Path) -> None:
    async def exercise(store: Store) -> None:
        await store.open()
        try:
            versions = store.configurations
            assert await versions.number() == 0 and list(await versions.list(5)) == []
            for number in (1, 2, 3):
                await versions.add(ConfigurationVersion(version=number, at=number, source="api",
                                                        configuration=Configuration()))
            for number in (3, 5, 1):
                with pytest.raises(Conflict):
                    await versions.add(ConfigurationVersion(version=number, at=0, source="api",
                                                            configuration=Configuration()))
            assert await versions.number() == 3
            assert [item.version for item in await versions.list(2)] == [3, 2]
            assert [item.version for item in await versions.list(2, 2)] == [1]
        finally:
            await store.close()

    asyncio.run(exercise(SqliteStore(tmp_path / "db")))
    pytest.importorskip("asyncpg", reason="asyncpg is not installed: pip install rock-sandbox[postgres]")
    from rock.store.postgres import PostgresStore

    with postgres() as make:
        asyncio.run(exercise(PostgresStore(make())))
    assert MOST_KEPT >= 100


def test_documents() -> None:
    assert parsed(b"", "x") == parsed(b"{}", "x") == Configuration()
    for data in (b"[1]", b"\xff\x00\xfe", b"a: b: c", b"[" * 5000):
        with pytest.raises(InvalidConfig, match=r"^x"):
            parsed(data, "x")
    rules = parsed(b'{"images": {"rewrite": [{"match": "docker.io/library/python:", "replace": "m.example/p:"}]}}', "x")
    assert rules.rewritten("python:3.11") == "m.example/p:3.11"
    assert rules.rewritten("docker.io/library/python:3.11") == "m.example/p:3.11"
    assert [rules.rewritten(name) for name in ("host", "node:22", "quay.io/python:3")] == \
        ["host", "node:22", "quay.io/python:3"]


def test_a_file_that_is_missing_or_too_large(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    assert asyncio.run(FileSource(file, optional=True).changed()) is None
    with pytest.raises(Unavailable, match="cannot be read"):
        asyncio.run(FileSource(file).changed())
    file.write_bytes(b"#" * (2 << 20))
    with pytest.raises(InvalidConfig, match="more than"):
        asyncio.run(FileSource(file).changed())


# ---- Nacos ----

class _Nacos(BaseHTTPRequestHandler):
    """The two routes that the source uses."""

    content: bytes | None = None
    down = False

    def do_GET(self) -> None:
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        if self.down:
            self._reply(500, b"broken")
        elif query.get("accessToken") != "t1":
            self._reply(403, b"forbidden")
        elif self.content is None or (query["dataId"], query["group"], query["tenant"]) != ("rock.yaml", "g", "ns"):
            self._reply(404, b"config data not exist")
        else:
            self._reply(200, self.content)

    def do_POST(self) -> None:
        fields = parse_qs(self.rfile.read(int(self.headers["content-length"])).decode())
        good = self.path == "/nacos/v1/auth/login" and fields == {"username": ["u"], "password": ["p@ss"]}
        self._reply(200 if good else 403, b'{"accessToken": "t1", "tokenTtl": 18000}' if good else b"unknown user")

    def _reply(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def nacos() -> Iterator[str]:
    _Nacos.content, _Nacos.down = None, False
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Nacos)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_nacos_is_followed(nacos: str, tmp_path: Path) -> None:
    _Nacos.content = b"pools: {size: 2}"
    server = RunningServer(tmp_path, ROCK_RUNTIME="fake",
                           ROCK_LIVE_CONFIG=f"nacos://u:p%40ss@{nacos}/rock.yaml?group=g&namespace=ns")  # fmt: skip
    server.start()
    with Client(server.url) as client:
        status = client.get_configuration()
        assert status.configuration.pools.size == 2 and "rock.yaml" in status.source and "p@ss" not in status.source
        _Nacos.content = b"pools: {size: 3}"
        until(lambda: client.get_configuration().configuration.pools.size == 3, 5)
        _Nacos.down = True
        until(lambda: "status 500" in client.get_configuration().error)
        assert client.get_configuration().configuration.pools.size == 3
        _Nacos.down = False
        until(lambda: not client.get_configuration().error)
    server.stop()


def test_errors_of_nacos(nacos: str) -> None:
    async def first(setting: str) -> bytes | None:
        source = NacosSource.parse(setting)
        try:
            return await source.changed()
        finally:
            await source.close()

    for setting, why in ((f"nacos://{nacos}/rock.yaml", "refuses the login"),
                         (f"nacos://x:y@{nacos}/a", "login failed"),
                         (f"nacos://u:p%40ss@{nacos}/rock.yaml?group=g&namespace=ns", "does not exist"),
                         ("nacos://127.0.0.1:9/a", "cannot be read")):  # fmt: skip
        with pytest.raises(Unavailable, match=why):
            asyncio.run(first(setting))
    for setting in ("nacos://", "nacos://host", "nacos://host:99999/x", "nacos://host/a/b", "nacos://host/a?x=1"):
        with pytest.raises(InvalidConfig, match="is no Nacos entry"):
            NacosSource.parse(setting)
