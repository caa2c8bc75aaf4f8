"""For a tenant the server connects to public addresses and to registries that its owner has named, and to no others."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.admin.conftest import OWNER
from tests.admin.test_keys import SMALL, key_for, sandbox_of
from tests.conftest import RunningServer

from rock.errors import ImageError, RockError
from rock.images.registry import reach
from rock.images.registry.client import Registry
from rock.images.registry.reference import Reference, parse
from rock.protocol.keys import Access
from rock.sync import Client

# Each is the machine itself, or on its link.
SPELLINGS = ("127.0.0.1", "127.1", "2130706433", "0177.0.0.1", "0x7f000001", "localhost", "LOCALHOST", "[::1]",
             "0.0.0.0", "[::ffff:7f00:1]", "169.254.169.254", "x.localhost")  # fmt: skip


class Listener:
    """Counts who connects, and answers nothing."""

    def __init__(self) -> None:
        self.count = 0
        self._socket = socket.socket()
        self._socket.bind(("0.0.0.0", 0))
        self._socket.listen()
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                self.count += 1
                client.close()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.close()


def test_no_spelling_of_a_near_address_is_contacted_by_a_create(guarded: RunningServer, listener: Listener) -> None:
    with Client(guarded.url, OWNER) as owner:
        key = key_for(owner, "near").key
    told = set()
    for host in SPELLINGS:
        for port in (listener.port, 9):  # one is open, the other closed
            image = f"{host}:{port}/x/y:1"
            for pull in ("missing", "always"):
                with pytest.raises(RockError) as refused:
                    sandbox_of(guarded, key, image=image, pull=pull).start()
                told.add((type(refused.value), str(refused.value).replace(image, "IMAGE")))
    assert listener.count == 0
    assert len(told) == 1, "an open port and a closed one are told alike"


def test_no_build_and_no_push_contacts_one(guarded: RunningServer, listener: Listener, tmp_path: Path) -> None:
    with Client(guarded.url, OWNER) as owner:
        key = key_for(owner, "nearbuild", Access.IMAGES, Access.CREATE, Access.RUN).key
    with Client(guarded.url, key) as client:
        for host in SPELLINGS[:-1]:  # the last one has an address with some resolvers alone
            name = f"{host}:{listener.port}/x/y:1"
            (tmp_path / "Dockerfile").write_text(f"FROM {name}\n")
            with pytest.raises(ImageError, match="server's own networks"):
                client.build_image(tmp_path, "nearbuild/x:1")
    assert listener.count == 0
    with sandbox_of(guarded, key) as sandbox, pytest.raises(RockError):
        sandbox.commit(f"127.0.0.1:{listener.port}/x/y:1", "user", "password")
    assert listener.count == 0


def test_the_owner_may(guarded: RunningServer, listener: Listener) -> None:
    with pytest.raises(ImageError, match="cannot be reached"):
        sandbox_of(guarded, OWNER, image=f"127.0.0.1:{listener.port}/x/y:1").start()
    assert listener.count > 0
    assert SMALL


# ---- connections


def public(name: str) -> Reference:
    from dataclasses import replace

    return replace(parse(name), public_only=True)


def ask(reference: Reference) -> None:
    registry = Registry(reference)
    with contextlib.closing(registry):
        registry.manifest("1")


def test_the_address_that_is_connected_to_is_decided_on(monkeypatch: pytest.MonkeyPatch, listener: Listener) -> None:
    """A name that has a public address when it is looked up first, and another one then (DNS rebinding)."""
    answers = ["93.184.215.14", "127.0.0.1", "10.0.0.1"]
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, *args: Any, **more: Any) -> list[Any]:
        asked.append(host)
        address = host if host[0].isdigit() else answers[min(len(asked), len(answers) - 1)]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(ImageError, match="server's own networks"):
        ask(public(f"rebound.example:{listener.port}/x:1"))
    assert asked == ["rebound.example"] and listener.count == 0


def test_addresses_of_this_machine_are_near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "_is_own", lambda address: address == "93.184.215.14")
    for text, is_open in (("93.184.215.14", False), ("93.184.215.15", True), ("10.1.1.1", False), ("fe80::1", False),
                          ("::ffff:10.0.0.1", False), ("64:ff9b::7f00:1", False), ("100.64.0.1", False)):  # fmt: skip
        assert reach._is_open(text, 443) is is_open, text
    monkeypatch.undo()
    assert reach._is_own("127.0.0.1") and not reach._is_own("93.184.215.14")


@pytest.fixture
def leading(listener: Listener) -> Iterator[Callable[[dict[str, str], int], str]]:
    """A registry that answers with given headers."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def make(headers: dict[str, str], status: int) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"127.0.0.1:{servers[-1].server_port}"

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_named_registry_is_reached_and_leads_nowhere_near(
    leading: Callable[[dict[str, str], int], str], listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = f"https://127.0.0.1:{listener.port}/token"
    for headers, status in (({"location": near}, 307), ({"www-authenticate": f'Bearer realm="{near}"'}, 401)):
        address = leading(headers, status)
        with pytest.raises(ImageError, match="server's own networks"):
            ask(public(f"{address}/x:1"))
        monkeypatch.setenv("ROCK_PRIVATE_REGISTRIES", f"other.example,{address}")
        with pytest.raises(ImageError, match="server's own networks"):
            ask(public(f"{address}/x:1"))
    assert listener.count == 0
    address = leading({}, 404)
    monkeypatch.setenv("ROCK_PRIVATE_REGISTRIES", address)
    with pytest.raises(ImageError, match="has no"):
        ask(public(f"{address}/x:1"))


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "..x", "x..y"])
def test_a_host_name_that_cannot_be_encoded_is_not_reached(host: str) -> None:
    with pytest.raises(OSError, match="is no host name"):
        reach.addresses_of(host, 80)
