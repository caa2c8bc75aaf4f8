"""A server that speaks TLS; and where secrets must not be after a session with them."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import IMAGE, RunningServer

from rock.errors import RockError
from rock.protocol.keys import CreateKey
from rock.sync import Client, Sandbox, SandboxConfig


def rock(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "rock.cli.main", *words], capture_output=True, text=True, timeout=110,
                          env={**os.environ, **environment})  # fmt: skip


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificate")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=box.test",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    return str(cert), str(key)


def test_a_server_with_a_certificate(
    tmp_path: Path, certificate: tuple[str, str], free_port: Callable[[], int]
) -> None:
    cert, key = certificate
    home = {"ROCK_HOME": str(tmp_path / "home"), "ROCK_API_KEY": "open sesame", "ROCK_RUNTIME": "process"}
    port = str(free_port())
    options = ("admin", "start", "--port", port, "--tls-cert", cert, "--tls-key")
    wrong = rock(*options, str(tmp_path / "nothing"), **home)
    assert wrong.returncode == 1 and "TLS cannot be had" in wrong.stderr
    assert "needs a certificate and its key" in rock("admin", "start", "--tls-cert", cert, **home).stderr
    done = rock(*options, key, **home)
    try:
        assert f"https://127.0.0.1:{port}" in done.stdout, done.stderr
        where = {"ROCK_BASE_URL": f"https://localhost:{port}", "SSL_CERT_FILE": cert, "ROCK_API_KEY": "open sesame"}
        ran = rock("run", "host", "--", "echo", "six", **where)
        assert ran.stdout == "six\n", ran.stderr
        assert "TLS" in rock("ps", **{**where, "SSL_CERT_FILE": os.devnull}).stderr
        context = ssl.create_default_context(cafile=cert)
        with urllib.request.urlopen(f"https://localhost:{port}/healthz", context=context, timeout=30) as reply:
            assert json.loads(reply.read())["status"] == "ok"
        with pytest.raises((OSError, ValueError)):
            urllib.request.urlopen(f"http://localhost:{port}/healthz", timeout=30)
    finally:
        stopped = rock("admin", "stop", **home)  # the certificate is not for 127.0.0.1
    assert "stopped" in stopped.stdout, stopped.stderr


SECRETS = {"api": "owner-7b1f94ee", "password": "hunter2-52c6d1", "push": "push-9d0e77a1", "s3": "bucket-e1c95b02"}


def holders(home: Path, secret: str) -> list[str]:
    """Files of a server and processes of this machine that show a secret."""
    found = [str(path) for path in home.rglob("*") if "images" not in path.parts and path.is_file()
             and secret.encode() in path.read_bytes()]  # fmt: skip
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if secret.encode() in (folder / "cmdline").read_bytes():
                found.append(str(folder))
        except OSError:
            continue
    return found


def test_secrets_are_nowhere(own_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    server = own_server(
        ROCK_API_KEY=SECRETS["api"], ROCK_LOG_LEVEL="debug", ROCK_ARCHIVE="s3://bucket/x", ROCK_S3_KEY="id",
        ROCK_S3_SECRET=SECRETS["s3"], ROCK_S3_ENDPOINT="http://127.0.0.1:9",
    )  # fmt: skip
    with Client(server.url, SECRETS["api"]) as owner:
        key = owner.create_key(CreateKey(name="x", tenant="x", scopes=["create", "run", "images"])).key  # type: ignore[list-item]
    secrets = {**SECRETS, "key": key, "half": key[-20:]}
    login = {"registry_username": "me", "registry_password": SECRETS["password"]}
    config = SandboxConfig(base_url=server.url, api_key=key, image=IMAGE, memory="64m", auto_delete_seconds=60, **login)
    with Sandbox(config) as sandbox:
        sandbox.execute("true")
        with pytest.raises(RockError):
            sandbox.commit("localhost:9/x:1", push=True, username="me", password=SECRETS["push"])
        assert SECRETS["password"] not in json.dumps(sandbox.info().model_dump(mode="json"))
        everywhere = {name: holders(server.home, secret) for name, secret in secrets.items()}
        assert not any(everywhere.values()), everywhere
    for image, more in (("127.0.0.1:9/none:1", login), (IMAGE, {**login, "memory": "much"})):
        body = json.dumps({"image": image, **more}).encode()
        request = urllib.request.Request(f"{server.url}/v1/sandboxes?wait=30", body, {"authorization": f"Bearer {key}"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60).close()
        assert SECRETS["password"] not in refused.value.read().decode()
    server.kill()  # what is written at the end, and what is found again
    server.start()
    with Client(server.url, key) as client:  # it is a key still
        assert client.list_sandboxes()
    everywhere = {name: holders(server.home, secret) for name, secret in secrets.items()}
    assert not any(everywhere.values()), everywhere
    assert holders(server.home, "x") and holders(server.home, "rock.cli.server")  # it can be found
