"""A server without a key serves its owner: programs of the same account, without configuration, and nobody else."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.conftest import IMAGE, RunningServer
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from rock import errors
from rock.cli.serve.home import make_private
from rock.http import peers
from rock.sdk import ownerkey
from rock.sync import Sandbox

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="root alone can be another user")

# What a program without a key does: one request per line of its input, each answered with status and body.
CLIENT = """
import encodings.idna, http.client, json, sys
host, port, user = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if user:
    import os
    os.setgroups([]); os.setgid(user); os.setuid(user)
for line in sys.stdin:
    method, path, headers, body = json.loads(line)
    connection = http.client.HTTPConnection(host, port, timeout=60)
    connection.request(method, path, body or None, headers)
    answer = connection.getresponse()
    print(json.dumps([answer.status, answer.read().decode("utf-8", "replace")]), flush=True)
"""
ESCAPE = ("POST", "/v1/sandboxes?wait=20", {}, json.dumps({"image": "host", "runtime": "process"}))
# Each dialect, and each path that is not of the API.
ROWS = [
    ("GET", "/v1/sandboxes", {}, ""),
    ESCAPE,
    ("GET", "/metrics", {}, ""),
    ("GET", "/docs", {}, ""),
    ("GET", "/openapi.json", {}, ""),
    ("GET", "/v1/workers", {}, ""),
    ("GET", "/v1/keys", {}, ""),
    ("GET", "/v1/envs", {}, ""),
    ("POST", "/v1/images/build", {}, "x"),
    ("GET", "/apis/envs/sandbox/v1/sandboxes/x/proxy/", {}, ""),
    ("POST", "/apis/envs/sandbox/v1/start_async", {}, "{}"),
    ("GET", "/v1/sandboxes/x/ports/80/", {}, ""),
    ("GET", "/v1/sandboxes/x/files/content?path=/etc/passwd", {}, ""),
    ("GET", "/v1/node/sandboxes", {}, ""),
    ("GET", "/nothing", {}, ""),
]


def ask(server: RunningServer, *requests: tuple[str, str, dict[str, str], str], user: int = 0,
        prefix: tuple[str, ...] = ()) -> list[tuple[int, str]]:  # fmt: skip
    """Requests of a process of its own, which is another user's when one is given."""
    parts = urlsplit(server.url)
    done = subprocess.run([*prefix, sys.executable, "-c", CLIENT, str(parts.hostname), str(parts.port), str(user)],
                          input="".join(json.dumps(each) + "\n" for each in requests), text=True, timeout=120,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def call(server: RunningServer, method: str, path: str, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
    try:
        connection.putrequest(method, path, skip_host="host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.putheader("content-length", "0")
        connection.endheaders()
        return connection.getresponse().status
    finally:
        connection.close()


def owner_key(server: RunningServer) -> str:
    return (server.home / "owner.key").read_text().strip()


# ---- who is let in


@as_root
def test_another_user_is_refused_on_every_path(server: RunningServer) -> None:
    answers = ask(server, *ROWS, user=NOBODY)
    assert len(answers) == len(ROWS)
    for row, (status, body) in zip(ROWS, answers, strict=True):
        assert status == 401, (row, status, body)
        told = json.loads(body)["error"]
        assert told["code"] == "unauthorized"
        assert "owner.key" in told["hint"] and "ROCK_API_KEY" in told["hint"]
    assert ask(server, ("GET", "/healthz", {}, ""), user=NOBODY)[0][0] == 200


@as_root
def test_another_user_with_the_owner_key_is_let_in(server: RunningServer) -> None:
    for name, value in (("x-rock-api-key", "{}"), ("authorization", "Bearer {}"), ("x-api-key", "{}")):
        headers = {name: value.format(owner_key(server))}
        assert ask(server, ("GET", "/v1/sandboxes", headers, ""), user=NOBODY)[0][0] == 200
        assert ask(server, ("GET", "/v1/sandboxes", {name: value.format("x" * 43)}, ""), user=NOBODY)[0][0] == 401


@as_root
def test_a_request_of_a_socket_that_is_closed_at_once_is_not_let_in(server: RunningServer) -> None:
    """The kernel tells such a socket as root's."""
    program = """
import encodings.idna, os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for _ in range(20):
    with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
        connection.sendall(sys.argv[3].encode())
"""
    parts = urlsplit(server.url)
    body = json.dumps({"image": IMAGE, "sandbox_id": "unasked", "network": "none"})
    request = f"POST /v1/sandboxes HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n{body}"
    subprocess.run([sys.executable, "-c", program, str(parts.hostname), str(parts.port), request], check=True)
    time.sleep(0.5)
    assert call(server, "GET", "/v1/sandboxes/unasked", {}) == 404


@as_root
def test_web_sockets_of_another_user_are_refused(server: RunningServer, sandbox: Sandbox) -> None:
    program = f"""
import asyncio, os, sys
sys.path[:0] = {sys.path!r}
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
os.setgroups([]); os.setgid(65534); os.setuid(65534)
async def main():
    for path in sys.argv[2:]:
        try:
            async with connect(sys.argv[1] + path, proxy=None):
                print(101)
        except InvalidStatus as error:
            print(error.response.status_code)
asyncio.run(main())
"""
    base = f"/v1/sandboxes/{sandbox.sandbox_id}"
    paths = [f"{base}/tunnel/80", f"{base}/ports/80/", f"{base}/terminal", "/v1/node/events"]
    url = server.url.replace("http", "ws")
    done = subprocess.run([sys.executable, "-c", program, url, *paths], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["401"] * len(paths), done.stderr


def test_clients_of_the_same_account_need_nothing(server: RunningServer) -> None:
    with urllib.request.urlopen(f"{server.url}/v1/sandboxes", timeout=20) as answer:
        assert answer.status == 200
    assert [status for status, _ in ask(server, ("GET", "/v1/sandboxes", {}, ""))] == [200]
    # A key that the server does not know is what clients of ROCK send by default.
    assert call(server, "GET", "/v1/sandboxes", {"x-key": "anything", "authorization": "Bearer of-another"}) == 200
    if shutil.which("curl"):
        told = subprocess.run(["curl", "-s", f"{server.url}/v1/sandboxes"], capture_output=True, text=True)
        assert "items" in told.stdout


def test_the_owner_is_recognized_by_either_family_of_addresses(own_server: Callable[..., RunningServer]) -> None:
    server = own_server()
    port = urlsplit(server.url).port
    with socket.socket(socket.AF_INET6) as client:  # an IPv4 connection of an IPv6 socket
        client.connect((f"::ffff:{urlsplit(server.url).hostname}", port))
        client.sendall(b"GET /v1/sandboxes HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")


def test_a_process_in_another_pid_namespace_needs_the_key(server: RunningServer) -> None:
    """As a container of root with the network of its host."""
    prefix = ("unshare", "--pid", "--fork") if os.geteuid() == 0 else ("unshare", "--user", "--pid", "--fork")
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no such namespaces here")
    plain, keyed = ask(server, ("GET", "/v1/sandboxes", {}, ""),
                       ("GET", "/v1/sandboxes", {"x-rock-api-key": owner_key(server)}, ""), prefix=prefix)  # fmt: skip
    assert plain[0] == 401 and "namespace" in plain[1]
    assert keyed[0] == 200


def test_the_sdk_sends_the_key_by_itself(server: RunningServer) -> None:
    """Where it is not recognized otherwise; also over WebSockets."""
    prefix = ("unshare", "--pid", "--fork") if os.geteuid() == 0 else ("unshare", "--user", "--pid", "--fork")
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no such namespaces here")
    program = f"""
import sys, urllib.request
from rock.sync import Sandbox
with Sandbox(base_url={server.url!r}, image={IMAGE!r}, memory="256m") as sandbox:
    sandbox.processes.start(["python3", "-m", "http.server", "8000", "--bind", "127.0.0.1"])
    assert sandbox.arun("echo there").output.strip() == "there"
    sandbox.execute("for i in $(seq 100); do (echo > /dev/tcp/127.0.0.1/8000) 2>/dev/null && break; sleep 0.1; done")
    with sandbox.port_forward(8000) as forward:
        print(urllib.request.urlopen(forward.url, timeout=20).status)
"""
    for home, code in ((server.home, 0), (server.home / "none", 1)):
        done = subprocess.run([*prefix, sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
                              env={**os.environ, "ROCK_HOME": str(home), "ROCK_BASE_URL": server.url})  # fmt: skip
        assert done.returncode == code, done.stderr
        assert ("200" in done.stdout) == (code == 0)
        assert code == 0 or "owner.key" in done.stderr


# ---- code in sandboxes

INSIDE = """
import encodings.idna, http.client, json, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=30)
connection.request("GET" if len(sys.argv) < 3 else "POST", "/v1/sandboxes", *sys.argv[2:])
answer = connection.getresponse()
print(answer.status, answer.read().decode()[:400])
"""


def levels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"image": IMAGE}]  # namespaces as root, userns as an ordinary user
    if os.geteuid() == 0:
        found.append({"image": "host", "isolation": "landlock"})
    return found


@pytest.mark.parametrize("config", levels(), ids=lambda config: str(config.get("isolation", "usual")))
def test_code_in_a_sandbox_on_the_network_of_the_host_is_refused(server: RunningServer, config: dict[str, Any]) -> None:
    port = str(urlsplit(server.url).port)
    try:
        sandbox = Sandbox(base_url=server.url, network="host", memory="256m", **config)
        sandbox.start()
    except errors.Unsupported as error:
        pytest.skip(str(error))
    with sandbox:
        for words in ([port], [port, json.dumps({"image": "host", "runtime": "process"})]):
            told = sandbox.execute(["python3", "-c", INSIDE, *words]).stdout
            assert told.startswith("401"), told
        with pytest.raises(errors.CommandFailed if hasattr(errors, "CommandFailed") else errors.RockError):
            sandbox.execute(f"cat {server.home}/owner.key", check=True)


def test_a_build_on_the_network_of_the_host_is_refused(server: RunningServer, tmp_path: Path) -> None:
    port = urlsplit(server.url).port
    (tmp_path / "ask.py").write_text(INSIDE)
    (tmp_path / "Dockerfile").write_text(
        f"FROM {IMAGE}\nCOPY ask.py /ask.py\nRUN python3 /ask.py {port} > /told; cat /told; grep -q ^401 /told\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "rock.cli.main", "image", "build", "-t", "keyless/test:1", "--network", "host",
         str(tmp_path)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "ROCK_BASE_URL": server.url})  # fmt: skip
    if "from it" in done.stderr:
        pytest.skip("images on this machine's own system are not built upon here")
    subprocess.run([sys.executable, "-m", "rock.cli.main", "image", "rm", "keyless/test:1"], capture_output=True,
                   env={**os.environ, "ROCK_BASE_URL": server.url, "ROCK_HOME": str(server.home)})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr  # grep found it


# ---- web pages


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example:8080"},
        {"host": "evil.example:8080", "sec-fetch-site": "same-origin"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "evil.localhost.example"},
        {"host": "localhost@evil.example"},
        {"host": ""},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "https://localhost"},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/v1/sandboxes", "/metrics", "/v1/sandboxes/x/files/content?path=/tmp/x", "/docs"])
def test_pages_under_other_names_and_of_other_origins_are_refused(
    server: RunningServer, headers: dict[str, str], path: str
) -> None:
    assert call(server, "GET", path, headers) == 401


def test_names_of_loopback_are_good(server: RunningServer) -> None:
    port = urlsplit(server.url).port
    for host in ("localhost", f"localhost:{port}", "127.0.0.1:1", "127.8.8.8", "[::1]:99", "LOCALHOST"):
        assert call(server, "GET", "/v1/sandboxes", {"host": host}) == 200, host
    own = {"host": f"localhost:{port}", "origin": f"http://localhost:{port}", "sec-fetch-site": "same-origin"}
    assert call(server, "GET", "/v1/sandboxes", own) == 200
    followed = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-user": "?1"}
    assert call(server, "GET", "/docs", followed) == 200, "a link that the user followed"
    assert call(server, "POST", "/v1/sandboxes/none/stop", followed) == 401


def test_two_hosts_are_none(server: RunningServer) -> None:
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port)) as client:
        client.sendall(b"GET /v1/sandboxes HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 401")


def test_web_sockets_of_pages_are_refused(server: RunningServer) -> None:
    async def statuses() -> list[int]:
        found = []
        for headers in ({"origin": "http://evil.example"}, {"host": "evil.example"}):
            with pytest.raises(InvalidStatus) as refused:
                async with connect(f"{server.url.replace('http', 'ws')}/v1/sandboxes/x/tunnel/80", proxy=None,
                                   additional_headers=headers):  # fmt: skip
                    pass
            found.append(refused.value.response.status_code)
        return found

    assert asyncio.run(statuses()) == [401, 401]


def test_public_names(own_server: Callable[..., RunningServer]) -> None:
    server = own_server(ROCK_PUBLIC_NAMES="rock.example, other.example")
    assert call(server, "GET", "/v1/sandboxes", {"host": "rock.example"}) == 200
    assert call(server, "GET", "/v1/sandboxes", {"host": "evil.example"}) == 401
    keyed = {"host": "evil.example", "x-rock-api-key": owner_key(server)}
    assert call(server, "GET", "/v1/sandboxes", keyed) == 401, "with names that are set, a key does not help"
    assert call(server, "GET", "/healthz", {"host": "10.0.0.1"}) == 401


# ---- files


def test_the_home_of_a_server_is_private(own_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    home = tmp_path / "wide"
    home.mkdir(mode=0o755)
    home.chmod(0o755)
    (home / "old.sqlite").write_text("x")
    (home / "old.sqlite").chmod(0o644)
    server = own_server(home)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "old.sqlite").stat().st_mode) == 0o600
    for name in ("owner.key", "server.json", "rock.sqlite", "rock.sqlite-wal", "envhub.sqlite"):
        assert stat.S_IMODE((home / name).stat().st_mode) == 0o600, name
    first = owner_key(server)
    server.kill()
    server.start()
    assert owner_key(server) != first, "a key is good for one run"
    assert call(server, "GET", "/v1/sandboxes", {"x-rock-api-key": first}) == 200, "the account is recognized anyway"


@as_root
def test_the_home_of_another_user_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "foreign"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    with pytest.raises(errors.InvalidConfig, match="belongs to user 65534"):
        make_private(home)


def test_the_sdk_sends_the_key_to_its_own_server_alone(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from rock.sdk.http import Address

    monkeypatch.setenv("ROCK_HOME", str(server.home))
    monkeypatch.setattr(ownerkey._Cache, "until", 0.0)
    address = Address.parse(server.url)
    assert ownerkey.key_for(address) == owner_key(server)
    for other in (f"http://127.0.0.1:{address.port + 1}", f"http://rock.example:{address.port}"):
        assert ownerkey.key_for(Address.parse(other)) == ""
    assert ownerkey.headers_for(address, {"Authorization": "Bearer x"}) == {}
    monkeypatch.setenv("ROCK_HOME", str(tmp_path))
    monkeypatch.setattr(ownerkey._Cache, "until", 0.0)
    assert ownerkey.key_for(address) == ""
    monkeypatch.setenv("ROCK_HOME", str(server.home))
    assert ownerkey.key_for(address) == owner_key(server), "a server that was started since is known at once"
    monkeypatch.setattr(ownerkey._Cache, "until", 0.0)


# ---- the kernel's answers


@pytest.mark.skipif(not peers.IDENTIFIES, reason="Linux alone tells the owner of a connection")
def test_owners_of_sockets() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
        with ours:
            owner = peers.owner_of(ours)
            assert owner is not None and owner.uid == os.geteuid()
            assert owner.inode == os.fstat(client.fileno()).st_ino
            assert peers._confined(owner) == ""
            client.close()
            assert peers.owner_of(ours) is None, "nobody holds it any more"
    a, b = socket.socketpair()
    with a, b:
        owner = peers.owner_of(a)
        assert owner is not None and owner.pid == os.getpid() and peers._confined(owner) == ""


@pytest.mark.skipif(not peers.IDENTIFIES, reason="Linux alone tells the owner of a connection")
def test_a_listener_on_the_port_of_a_client_that_left_is_not_its_owner() -> None:
    with socket.socket() as listener, socket.socket() as other:
        for sock in (listener, other):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", 0))
            sock.listen()
        source, target = other.getsockname(), listener.getsockname()
        assert peers._tcp(*_ends(source), *_ends(target)) is None


@pytest.mark.skipif(not peers.IDENTIFIES, reason="Linux alone tells the owner of a connection")
@pytest.mark.parametrize(
    ("family", "address", "there"),
    [(socket.AF_INET, "127.0.0.1", "127.0.0.1"), (socket.AF_INET6, "::1", "::1"), (socket.AF_INET6, "::", "127.0.0.1")],
)
def test_the_lists_of_proc_say_the_same(family: int, address: str, there: str) -> None:
    """They are read where NETLINK_SOCK_DIAG is forbidden, as in a container with a system call filter."""
    with socket.socket(family) as listening:
        listening.bind((address, 0))
        listening.listen()
        with socket.create_connection((there, listening.getsockname()[1])) as client:
            served, _ = listening.accept()
            with served:
                ends = (*_ends(served.getpeername()), *_ends(served.getsockname()))
                found = peers._listed(*ends)
                assert found is not None and found == peers._tcp(*ends) == peers.owner_of(served)
                assert found.inode == os.fstat(client.fileno()).st_ino
                assert peers._listed(ends[0], 1, ends[2], ends[3]) is None


def _ends(name: Any) -> tuple[Any, int]:
    return peers._plain(name[0]), name[1]
