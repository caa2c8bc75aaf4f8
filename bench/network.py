"""What network nat costs: starts, connections, round trips, throughput, next to the same machine without it.

    python bench/network.py [--runs 30] [--size 2000] [--json]

Makes a machine with an internet of its own (tests/network/world.py), starts a server in it and measures from inside a
sandbox: through the proxy (nat, and egress by name), and by network host, which is the kernel's own way over the same
link. As root also the kernel's address translation (veth and nftables masquerade), made with `ip` and `nft` where these
are installed, only for what it costs to make. Seconds in milliseconds; median, 95th percentile, least.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.network.conftest import IMAGE, World, WorldServer

from rock.sync import Sandbox, SandboxConfig

_INSIDE = """
import json, socket, sys, time
runs, size = int(sys.argv[1]), int(sys.argv[2]) * 1_000_000
found = {}
def note(name, values): found[name] = values
def timed(work):
    began = time.perf_counter(); work(); return time.perf_counter() - began
def request(address):
    with socket.create_connection((address, 80), 30) as sock:
        sock.sendall(b"GET / HTTP/1.1\\r\\nHost: allowed.test\\r\\nConnection: close\\r\\n\\r\\n")
        while sock.recv(65536): pass
request("203.0.113.10")
note("request on a new connection", [timed(lambda: request("203.0.113.10")) for _ in range(runs * 5)])
if sys.argv[3] != "names":
    with socket.create_connection(("203.0.113.10", 7), 30) as sock:
        sock.setsockopt(6, 1, 1)
        def trip():
            sock.sendall(b"x"); sock.recv(1)
        note("round trip of one byte", [timed(trip) for _ in range(runs * 30)])
    rates = []
    for _ in range(3):
        with socket.create_connection(("203.0.113.10", 9001), 30) as sock:
            sock.sendall(b"%d\\n" % size); buffer, got = bytearray(1 << 18), 0
            began = time.perf_counter()
            while more := sock.recv_into(buffer): got += more
            rates.append(got / (time.perf_counter() - began))
    note("download", rates)
    rates = []
    for _ in range(3):
        with socket.create_connection(("203.0.113.10", 9002), 30) as sock:
            block, left = bytes(1 << 18), size; began = time.perf_counter()
            while left > 0: left -= sock.send(block)
            sock.shutdown(socket.SHUT_WR); sock.recv(100)
            rates.append(size / (time.perf_counter() - began))
    note("upload", rates)
if sys.argv[3] != "host":
    note("name looked up", [timed(lambda: socket.getaddrinfo("allowed.test", 80, socket.AF_INET, socket.SOCK_STREAM))
                            for _ in range(runs * 5)])
print(json.dumps(found))
"""


def starts(server: WorldServer, runs: int, **fields: Any) -> list[float]:
    """Seconds from a request for a sandbox to the answer of its first command."""
    found = []
    for _ in range(runs):
        sandbox = Sandbox(SandboxConfig(base_url=server.url, image=IMAGE, memory="256m", cpus=1.0, **fields))
        began = time.perf_counter()
        sandbox.start()
        sandbox.arun("true")
        found.append(time.perf_counter() - began)
        sandbox.stop()
    return found


def inside(server: WorldServer, runs: int, size: int, kind: str, **fields: Any) -> dict[str, list[float]]:
    with Sandbox(SandboxConfig(base_url=server.url, image=IMAGE, memory="512m", cpus=2.0, **fields)) as sandbox:
        done = sandbox.execute(["python3", "-c", _INSIDE, str(runs), str(size), kind], timeout=600)
        assert done.exit_code == 0, done.stderr
        found: dict[str, list[float]] = json.loads(done.stdout)
        return found


def translation(runs: int) -> list[float]:
    """Seconds to make a veth pair with an address translation by the usual programs, in namespaces of their own."""
    if not (shutil.which("ip") and shutil.which("nft")):
        return []
    rules = "table ip n { chain c { type nat hook postrouting priority 100; ip saddr 10.99.0.2 masquerade } }"
    script = ("import subprocess, time\n"
              "def run(*words, text=None): subprocess.run(words, check=True, input=text, text=True)\n"
              "began = time.perf_counter()\n"
              "run('ip', 'link', 'add', 'a', 'type', 'veth', 'peer', 'name', 'b')\n"
              "run('ip', 'addr', 'add', '10.99.0.1/30', 'dev', 'a')\n"
              "run('ip', 'link', 'set', 'a', 'up')\n"
              f"run('nft', '-f', '-', text={rules!r})\n"
              "print(time.perf_counter() - began)")
    return [float(subprocess.run(["unshare", "-Urn", sys.executable, "-c", script], capture_output=True, text=True,
                                 check=True).stdout) for _ in range(runs)]  # fmt: skip


def shown(name: str, values: list[float]) -> str:
    if name.endswith("load"):
        return f"{name:32} {max(values) * 8 / 1e9:8.2f} Gbit/s (best of {len(values)})"
    ordered = sorted(value * 1000 for value in values)
    late = ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]
    return f"{name:32} {statistics.median(ordered):8.3f} ms  p95 {late:8.3f}  min {ordered[0]:8.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--size", type=int, default=2000, help="megabytes of a transfer")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="rock-bench-", ignore_cleanup_errors=True) as folder:
        world = World(Path(folder))
        try:
            for pool in ("0", "4"):
                server = WorldServer(world, Path(folder) / f"home{pool}", ROCK_POOL_SIZE=pool)
                server.home.mkdir()
                from rock.images.store import ImageStore

                ImageStore(server.home / "images").from_host(IMAGE)
                server.start()
                made = "cold" if pool == "0" else "warm"
                for network in ("none", "nat", "host"):
                    starts(server, 5, network=network)
                    found.setdefault(f"start, {made}", {})[network] = starts(server, options.runs, network=network)
                if pool == "4":
                    for kind, fields in (("nat", {"network": "nat"}), ("host", {"network": "host"}),
                                         ("names", {"egress": ["allowed.test"]})):  # fmt: skip
                        found[f"network {kind}"] = inside(server, options.runs, options.size, kind, **fields)
                server.stop()
        finally:
            world.close()
    if values := translation(options.runs):
        found["made by ip and nft"] = {"veth and masquerade": values}
    if options.json:
        print(json.dumps(found))
        return
    for title, rows in found.items():
        print(title)
        for name, values in rows.items():
            print("  " + shown(name, values))


if __name__ == "__main__":
    main()
