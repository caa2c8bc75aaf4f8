"""Registries for the tests: Debian's docker-registry, and one that misbehaves as it is told to."""

from __future__ import annotations

import fcntl
import gzip
import http.server
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.image.image_archives import ARCHITECTURE, config_of, sha

from rock.images.registry.client import INDEXES, MANIFESTS, Registry
from rock.images.registry.logins import Login
from rock.images.registry.reference import parse

USER = Login("alice", "open sesame")
_HTPASSWD = "alice:$2b$04$abcdefghijklmnopqrstuu/LVz6MZlItEy42I2juLihZ66HnQx/cy\n"


def program() -> str:
    """docker-registry: of this machine, or unpacked from Debian's package into the tests' cache."""
    found = shutil.which("docker-registry")
    if found:
        return found
    cache = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests") / "docker-registry"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / "ready").exists():
            _fetch(cache)
            (cache / "ready").touch()
    return str(cache / "usr" / "bin" / "docker-registry")


def _fetch(cache: Path) -> None:
    try:
        command = ["apt-get", "download", "docker-registry"]
        run = subprocess.run(command, cwd=cache, capture_output=True, timeout=100)
        packages = sorted(cache.glob("docker-registry_*.deb"))
        if not packages:
            pytest.skip(f"docker-registry cannot be had: {run.stderr.decode()[-200:].strip()}")
        subprocess.run(["dpkg-deb", "-x", packages[0], cache], check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"docker-registry cannot be had: {error}")


@contextmanager
def docker_registry(folder: Path, login: bool = False) -> Iterator[str]:
    """Its address, like 127.0.0.1:5000; with `login` it takes USER alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = {
        "version": "0.1", "log": {"level": "error", "accesslog": {"disabled": True}}, "http": {"addr": address},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}, "delete": {"enabled": True}},
    }  # fmt: skip
    if login:
        (folder / "htpasswd").write_text(_HTPASSWD)
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}
    (folder / "config.yml").write_text(json.dumps(config))
    with open(folder / "log", "wb") as log:
        child = subprocess.Popen([program(), "serve", folder / "config.yml"], stdout=log, stderr=log)
    try:
        _wait(address, child, folder / "log")
        yield address
    finally:
        child.terminate()
        child.wait(20)


def _wait(address: str, child: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end and child.poll() is None:
        try:
            urllib.request.urlopen(f"http://{address}/v2/", timeout=5).close()
            return
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 401:
                return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"docker-registry did not start: {log.read_text()}")


def blobs_of(layers: list[bytes], pack: Callable[[bytes], bytes] = gzip.compress, **config: object) -> dict[str, bytes]:
    """An image by digest: its config, its layers, and last its manifest."""
    raw = config_of(layers, **config)
    packed = [pack(layer) for layer in layers]
    manifest = json.dumps({
        "schemaVersion": 2, "mediaType": MANIFESTS[0],
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": sha(raw), "size": len(raw)},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": sha(b), "size": len(b)}
                   for b in packed],
    }).encode()  # fmt: skip
    return {sha(blob): blob for blob in (raw, *packed, manifest)}


def push(name: str, layers: list[bytes], folder: Path, login: Login | None = None, index: bool = True,
         **config: object) -> str:  # fmt: skip
    """Put an image into a registry, under an index with other machines' in it; answers its manifest's digest."""
    registry = Registry(parse(name), login)
    blobs = blobs_of(layers, **config)
    *others, manifest = blobs
    for digest in others:
        path = folder / digest.removeprefix("sha256:")
        path.write_bytes(blobs[digest])
        registry.upload(digest, len(blobs[digest]), path)
    registry.put_manifest(manifest, blobs[manifest], MANIFESTS[0])
    tag = parse(name).tag or "latest"
    if index:
        rows = [{"mediaType": MANIFESTS[0], "digest": manifest, "size": len(blobs[manifest]),
                 "platform": {"os": "linux", "architecture": ARCHITECTURE}}]  # fmt: skip
        body = json.dumps({"schemaVersion": 2, "mediaType": INDEXES[0], "manifests": rows}).encode()
        registry.put_manifest(tag, body, INDEXES[0])
    else:
        registry.put_manifest(tag, blobs[manifest], MANIFESTS[0])
    registry.close()
    return manifest


class Odd(http.server.BaseHTTPRequestHandler):
    """Serves `blobs`, after `answer` had the chance to do something else: it answers True when it did."""

    protocol_version = "HTTP/1.1"
    blobs: dict[str, bytes] = {}
    tag = ""
    asked: list[tuple[str, str, str]] = []

    def answer(self, path: str) -> bool:
        return False

    def do_GET(self) -> None:
        path = self.path.partition("/v2/team/tool/")[2]
        self.asked.append((self.command, path or self.path, self.headers.get("authorization", "")))
        if self.answer(path):
            return
        kind, _, what = path.partition("/")
        body = self.blobs.get(self.tag if kind == "manifests" and what == "1.0" else what)
        if body is None:
            self.send(404, b'{"errors": [{"message": "unknown"}]}')
            return
        begin = int((self.headers.get("range") or "bytes=0-")[6:].rstrip("-"))
        self.send(206 if begin else 200, body[begin:])

    do_HEAD = do_GET

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def odd_registry(kind: type[Odd], blobs: dict[str, bytes]) -> Iterator[str]:
    """Its address; the image is team/tool:1.0."""
    kind.blobs, kind.asked, kind.tag = blobs, [], list(blobs)[-1]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
