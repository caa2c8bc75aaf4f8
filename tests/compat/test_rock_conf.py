"""ROCK's own server configuration: what has a meaning here is applied, everything else is reported."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

pytest.importorskip("yaml", reason="install the development extra: pip install -e .[dev]")

from rock.settings import Settings

BASE = """
ray: {address: "auto", namespace: xrl-sandbox}
database: {url: "sqlite:///%s/rock.db", pool_size: 300}
lifecycle:
  archive:
    enabled: true
    max_dir_upload_size: 16g
    dir_storage: {type: oss}
oss:
  primary: {endpoint: "http://127.0.0.1:9000", bucket: kept, access_key_id: id, access_key_secret: hidden}
runtime: {operator_type: k8s, user_defined_tags: {team: a, cell: 1}, project_root: /root/x}
nacos: {endpoint: "x:1"}
"""
OVER = "_base: base.yml\nruntime: {metrics_endpoint: 'http://127.0.0.1:4318'}\nray: {address: 'ray://head:1'}\n"


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    (tmp_path / "base.yml").write_text(BASE % tmp_path)
    path = tmp_path / "rock-test.yml"
    path.write_text(OVER)
    return path


def test_what_is_applied(conf: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "rock.server"):
        settings = Settings.read({"ROCK_CONFIG": str(conf)})
    assert settings.store == f"{conf.parent}/rock.db"
    assert (settings.archive, settings.archive_limit) == ("s3://kept/rock-archives", "16g")
    assert (settings.s3_endpoint, settings.s3_key, settings.s3_secret) == ("http://127.0.0.1:9000", "id", "hidden")
    assert (settings.otel_endpoint, settings.otel_attributes) == ("http://127.0.0.1:4318", "team=a,cell=1")
    assert settings.ray_address == "ray://head:1" and settings.scheduler == "local"
    (record,) = caplog.records
    told = record.getMessage()
    for key in ("database.pool_size", "nacos.endpoint", "ray.namespace", "runtime.operator_type"):
        assert key in told
    assert "oss." not in told and "hidden" not in told and "dir_storage" not in told
    with caplog.at_level(logging.WARNING, "rock.server"):
        Settings.read({"ROCK_CONFIG": str(conf)})
    assert len(caplog.records) == 1, "each key once"


def test_the_environment_goes_first(conf: Path) -> None:
    settings = Settings.read({"ROCK_CONFIG": str(conf), "ROCK_STORE": "/other.db", "ROCK_ARCHIVE": "off"})
    assert (settings.store, settings.archive) == ("/other.db", "off")


@pytest.mark.parametrize(
    ("text", "why"),
    [("- a", "holds no mapping"), ("a: [", "is not YAML"), ("_base: none.yml", "cannot be read"),
     ("_base: x.yml", "name each other"), ("database: {url: 3}", "has to be text"),
     ("database: {url: 'mysql://x'}", "neither sqlite nor postgresql"),
     ("lifecycle: {archive: {enabled: 'yes'}}", "has to be bool"),
     ("lifecycle: {archive: {enabled: true, dir_storage: {type: ftp}}}", "neither oss nor s3")],
)  # fmt: skip
def test_what_is_wrong_with_it(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "x.yml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"ROCK_CONFIG: .*{why}"):
        Settings.read({"ROCK_CONFIG": str(path)})


def test_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "x.yml"
    path.write_text("# nothing\n")
    assert Settings.read({"ROCK_CONFIG": str(path)}) == Settings.read({})
