"""The life of networks: crashes of the server and of the proxy, stops and restarts, and sandboxes that mean harm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import IMAGE
from tests.network.conftest import HERE, Opener, World, WorldServer
from tests.network.test_nat import attempt, python
from tests.waiting import until

from rock.errors import InvalidConfig, NotFound, Unsupported
from rock.sync import Client, Sandbox, SandboxConfig

_AGAIN_AND_AGAIN = """
import json, socket, time
while True:
    for address in ("203.0.113.10", "203.0.113.11"):
        began = time.time()
        try:
            with socket.create_connection((address, 80), 2) as sock:
                sock.settimeout(2)
                sock.sendall(b"GET / HTTP/1.1\\r\\nConnection: close\\r\\n\\r\\n")
                told = sock.recv(100).decode()[:12]
        except OSError as error: told = type(error).__name__
        print(json.dumps([began, time.time(), address, told]), flush=True)
    time.sleep(0.05)
"""


def config(server: WorldServer, **fields: Any) -> SandboxConfig:
    return SandboxConfig(base_url=server.url, image=IMAGE, memory="512m", cpus=1.0,
                         **{"network": "nat", "auto_clear_seconds": 0, **fields})  # fmt: skip


def proxy_of(server: WorldServer) -> int:
    """The pid of a server's proxy."""
    for name in os.listdir("/proc"):
        try:
            line = Path(f"/proc/{name}/cmdline").read_bytes()
            parent = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if b"egress/proxy.py" in line and parent == server.pid:
            return int(name)
    raise AssertionError("there is no proxy")


def test_a_server_that_is_killed(make_server: Callable[..., WorldServer], world: World) -> None:
    """While it is away nothing gets out; when it is back the same policy holds, and what happened before is known."""
    server = make_server()
    sandbox = Sandbox(config(server, egress=["203.0.113.10"]))
    sandbox.start()
    process = sandbox.processes.start(["python3", "-u", "-c", _AGAIN_AND_AGAIN])

    def lines() -> list[Any]:
        return [json.loads(line) for line in process.logs().data.decode().splitlines()]

    until(lambda: sum(line[3] == "HTTP/1.1 200" for line in lines()) >= 2)
    before = sandbox.egress_log().total
    proxy = proxy_of(server)
    server.kill()
    killed = time.time()
    until(lambda: not os.path.exists(f"/proc/{proxy}"))
    world.seen()
    time.sleep(1.5)
    assert [item for item in world.seen() if item["place"] == "outside"] == []
    back = time.time()
    server.start()
    until(lambda: any(line[0] > back and line[3] == "HTTP/1.1 200" for line in lines()))
    told = lines()
    assert not any(line[3].startswith("HTTP") for line in told if line[2] == "203.0.113.11")
    assert not any(line[3].startswith("HTTP") for line in told if killed + 1 < line[0] and line[1] < back)
    seen = sandbox.egress_log()
    assert seen.total > before and seen.items[0].number == 1
    sandbox.stop()
    assert not [item for item in world.seen() if item.get("address") == "203.0.113.11"]


def test_a_proxy_that_is_killed(opened: Opener, world_server: WorldServer) -> None:
    one, other = opened(), opened(egress=["203.0.113.11"])
    assert attempt(one, ("203.0.113.10", 80))["203.0.113.10 80"].startswith("HTTP")
    proxy = proxy_of(world_server)
    status = Path(f"/proc/{proxy}/status").read_text()
    assert "NoNewPrivs:\t1" in status and "CapEff:\t0000000000000000" in status
    if os.geteuid() == 0:
        assert "Uid:\t65534\t65534\t65534\t65534" in status and "Gid:\t65534\t65534\t65534\t65534" in status
    os.kill(proxy, signal.SIGKILL)
    assert one.arun("echo 42").output == "42\n"
    assert attempt(one, ("203.0.113.10", 80))["203.0.113.10 80"].startswith("HTTP")
    found = attempt(other, ("203.0.113.10", 80), ("203.0.113.11", 80))
    assert [text.startswith("HTTP") for text in found.values()] == [False, True]
    assert proxy_of(world_server) != proxy
    assert [item.number for item in one.egress_log().items] == [1, 2]


def test_one_that_does_not_answer_keeps_nobody_waiting(opened: Opener, world_server: WorldServer) -> None:
    """A new proxy is given every sandbox's sockets by its pid 1; here the first one's is not there to do so."""
    stuck, other = opened(), opened()
    records = (json.loads(file.read_text()) for file in world_server.home.rglob("record.json"))
    pid = next(int(record["pid"]) for record in records if record.get("id") == stuck.sandbox_id)
    os.kill(pid, signal.SIGSTOP)
    try:
        os.kill(proxy_of(world_server), signal.SIGKILL)
        assert attempt(other, ("203.0.113.10", 80))["203.0.113.10 80"].startswith("HTTP")
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: attempt(stuck, ("203.0.113.10", 80))["203.0.113.10 80"].startswith("HTTP"))


def test_after_the_end(opened: Opener, world_server: WorldServer) -> None:
    sandbox = opened()
    attempt(sandbox, ("203.0.113.10", 80), ("10.9.9.9", 80))
    sandbox.processes.start(["python3", "-c", "import socket, time\n"
                           "s = socket.create_connection(('203.0.113.10', 7))\ns.sendall(b'x')\ntime.sleep(1000)"])
    until(lambda: any(item.sent == 1 for item in sandbox.egress_log().items))
    assert sandbox.egress_log().items[-1].ended_at is None
    sandbox.stop()
    seen = sandbox.egress_log()
    assert [(item.address, item.port, item.allowed) for item in seen.items] == [
        ("203.0.113.10", 80, True), ("10.9.9.9", 80, False), ("203.0.113.10", 7, True)]
    assert seen.items[-1].ended_at is not None
    told = subprocess.run(
        [sys.executable, "-m", "rock.cli.main", "--base-url", world_server.url, "connections", "--refused",
         str(sandbox.sandbox_id)], capture_output=True, text=True, timeout=60, check=True).stdout  # fmt: skip
    assert "10.9.9.9:80" in told and "private address" in told and "203.0.113.10" not in told
    sandbox.delete()
    with pytest.raises(NotFound):
        sandbox.egress_log()
    again = opened(sandbox_id=sandbox.sandbox_id)
    assert again.egress_log().items == []  # another life, another history


def test_a_restart_keeps_network_and_history(opened: Opener) -> None:
    sandbox = opened(auto_delete_seconds=600, egress=["203.0.113.10"])
    attempt(sandbox, ("203.0.113.10", 80))
    sandbox.stop()
    sandbox.restart()
    found = attempt(sandbox, ("203.0.113.10", 80), ("203.0.113.11", 80))
    assert [text.startswith("HTTP") for text in found.values()] == [True, False]
    assert [item.number for item in sandbox.egress_log().items] == [1, 2, 3]
    assert sandbox.arun("cat /etc/resolv.conf").output == "nameserver 192.0.0.1\n"
    sandbox.delete()


def test_made_ahead(make_server: Callable[..., WorldServer]) -> None:
    """The warm pool has sandboxes with a network too; each gets the policy of who claims it."""
    server = make_server(ROCK_POOL_SIZE="2")
    for number in range(6):
        address = f"203.0.113.{10 + number % 2}"
        with Sandbox(config(server, egress=[address])) as sandbox:
            found = attempt(sandbox, ("203.0.113.10", 80), ("203.0.113.11", 80))
            assert [key.split()[0] for key, text in found.items() if text.startswith("HTTP")] == [address]
            assert sandbox.egress_log().total == 2


def test_a_network_never_comes_to_another_sandbox(opened: Opener, world: World) -> None:
    """Namespaces of sandboxes that never used theirs are given to others, those with a way out are not."""
    for _ in range(6):
        opened().stop()
        none = opened(network="none")
        told = python(none, """
import json, socket
def attempt():
    try: socket.create_connection(("203.0.113.10", 80), 5); return "connected"
    except OSError as error: return error.errno
print(json.dumps([attempt(), open("/proc/net/fib_trie").read().count("192.0.0")]))
""")
        assert told == [101, 0]  # ENETUNREACH
        none.stop()
    assert world.seen() == []


_FLOOD = """
import json, socket, sys, time
sockets = []
for number in range(600):
    sock = socket.socket(); sock.setblocking(False)
    sock.connect_ex(("203.0.113.10", int(sys.argv[1]))); sockets.append(sock)
time.sleep(2)
for sock in sockets:
    try: sock.send(sys.argv[2].encode().decode("unicode_escape").encode())
    except OSError: pass
print("ready", flush=True)
time.sleep(1000)
"""


def test_one_that_floods_does_not_hurt_others(opened: Opener, world_server: WorldServer) -> None:
    """Connections and what waits in them are bounded for each sandbox, and the server answers as before."""
    bad, good = opened(), opened()
    proxy = proxy_of(world_server)

    def resident() -> int:
        return int(Path(f"/proc/{proxy}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def descriptors() -> int:
        """Its open files, which it shows to root alone."""
        return len(os.listdir(f"/proc/{proxy}/fd")) if os.geteuid() == 0 else 0

    before = resident()
    flood = bad.processes.start(["python3", "-u", "-c", _FLOOD, "9001", r"4000000000\n"])  # which it never reads
    until(lambda: b"ready" in flood.logs().data)
    until(lambda: sum(item.received > 1 << 18 for item in bad.egress_log().items) > 100)
    still_open = [item for item in bad.egress_log().items if item.ended_at is None]
    assert len(still_open) <= 256
    assert descriptors() < 700
    assert resident() - before < 200 << 20
    assert attempt(good, ("203.0.113.10", 80))["203.0.113.10 80"].startswith("HTTP")
    assert bad.arun("echo 42").output == "42\n"
    with Client(world_server.url) as client:
        assert client.server_info().pid == world_server.pid
    bad.stop()
    until(lambda: descriptors() < 60)
    # the same with connections that say nothing, and questions for names
    worse = opened(egress=["allowed.test"])
    worse.processes.start(["python3", "-u", "-c", _FLOOD, "80", "x"])
    worse.processes.start(["python3", "-c", "import os, socket\n"
                         "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('192.0.0.1', 53))\n"
                         "while True:\n    try: s.send(os.urandom(40))\n    except OSError: pass"])
    assert attempt(good, ("allowed.test", 80))["allowed.test 80"].startswith("HTTP")


def test_a_host_that_cannot(make_server: Callable[..., WorldServer]) -> None:
    """Refused before anything is started, with the reason; and all else works."""
    server = make_server((sys.executable, str(HERE / "without_nftables.py")))
    for fields in ({}, {"network": "nat"}, {"egress": ["allowed.test"]}, {"egress": []}):
        with pytest.raises(Unsupported, match=r"nat.*Protocol not supported"):
            Sandbox(config(server, **fields)).start()
    with pytest.raises(InvalidConfig, match="egress"):
        Sandbox(SandboxConfig.model_construct(
            base_url=server.url, image=IMAGE, egress=["allowed.test"], network="host",
            _fields_set={"image", "egress", "network"}, sandbox_id=None)).start()
    with Sandbox(config(server, network="none")) as sandbox:
        assert sandbox.arun("echo 42").output == "42\n"
    told = subprocess.run(
        [sys.executable, str(HERE / "without_nftables.py"), sys.executable, "-m", "rock.cli.main", "doctor", "--json"],
        capture_output=True, text=True, timeout=100, check=False).stdout  # fmt: skip
    finding = next(item for item in json.loads(told) if item["name"] == "network nat")
    assert finding["ok"] is None and "Protocol not supported" in finding["detail"]


def test_the_doctor_tells() -> None:
    told = subprocess.run([sys.executable, "-m", "rock.cli.main", "doctor", "--json"], capture_output=True, text=True,
                          timeout=100, check=False).stdout  # fmt: skip
    finding = next(item for item in json.loads(told) if item["name"] == "network nat")
    assert finding["detail"] == "works"
