"""HTTPS: both faces, the same connection for many calls, and a certificate that nobody vouches for."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from wire_server import echo, serve

from rock.errors import Unavailable
from rock.sdk.transport import POOL, Transport
from rock.sync.transport import POOL as BLOCKING_POOL
from rock.sync.transport import Transport as BlockingTransport

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


@pytest.fixture
def context(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


@pytest.fixture(autouse=True)
def no_connection_is_left() -> Iterator[None]:
    yield
    POOL.clear()
    BLOCKING_POOL.clear()


def test_both_faces(certificate: tuple[Path, Path], context: ssl.SSLContext) -> None:
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    large = b"x" * (5 << 20)
    with serve(echo, tls=context) as wire:
        for host in ("localhost", "127.0.0.1"):
            url = f"https://{host}:{wire.port}"
            blocking = BlockingTransport(url, ssl_context=trusting)
            transport = Transport(url, ssl_context=trusting)
            for number in range(5):
                assert blocking.json("POST", "/x", number) == number
                assert asyncio.run(transport.json("POST", "/x", number)) == number
            assert blocking.call("PUT", "/x", large) == large == asyncio.run(transport.call("PUT", "/x", large))
        assert wire.connections == 4


def test_an_unknown_certificate_is_refused(context: ssl.SSLContext) -> None:
    with serve(echo, tls=context) as wire:
        url = f"https://127.0.0.1:{wire.port}"
        with pytest.raises(Unavailable, match="TLS"):
            BlockingTransport(url).json("POST", "/x", 1)
        with pytest.raises(Unavailable, match="TLS"):
            asyncio.run(Transport(url).json("POST", "/x", 1))
        assert not wire.requests


def test_a_plain_server_is_told(context: ssl.SSLContext) -> None:
    with serve(echo) as wire, pytest.raises(Unavailable):
        BlockingTransport(f"https://127.0.0.1:{wire.port}", connect_timeout=2).json("POST", "/x", 1)
