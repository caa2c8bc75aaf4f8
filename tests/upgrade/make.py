"""Make the fixtures of test_upgrade.py: homes and a PostgreSQL dump, written by the server of this checkout.

    python -m tests.upgrade.make [--output tests/upgrade]

Needs root (the namespace runtime with a uid range) and Debian's postgresql. Servers run under the host name "fixture"
below /tmp/rock-upgrade. Each fixture is NAME.tar.gz (the home), NAME.json (what has to be found), and for `postgres`
also postgres.sql. The server is killed with SIGKILL in the middle of its work, as before an upgrade that goes wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rock.sync import Client, Sandbox, SandboxConfig
from tests.conftest import RunningServer
from tests.store.postgres_server import postgres
from tests.upgrade.homes import pack

OWNER = "upgrade-owner-key"
IMAGE, COMMITTED = "upgrade/base:1", "upgrade/committed:1"
FOREVER = 1 << 31  # seconds: retained files do not expire before the test runs
BASE = Path("/tmp/rock-upgrade")
SETTINGS = {"ROCK_API_KEY": OWNER, "ROCK_POOL_SIZE": "0", "ROCK_DRAIN_SECONDS": "0.2"}
IN_HOST_FIXTURE = ["unshare", "--uts", "sh", "-c", 'hostname fixture; exec "$@"', "sh"]
ENDS = {"stopped_by_user", "idle", "deadline", "exited", "lost", "start_failed"}


def call(url: str, method: str, path: str, body: Any = None, key: str = OWNER, once: str = "") -> tuple[int, Any]:
    """(status, JSON) of one request, without the SDK: the SDK may change what it sends. once: an idempotency key."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    if once:
        headers["idempotency-key"] = once
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        reply = connection.getresponse()
        raw = reply.read()
        return reply.status, json.loads(raw) if raw else None
    finally:
        connection.close()


def done(url: str, method: str, path: str, body: Any = None, key: str = OWNER, once: str = "") -> Any:
    """The answer of a request that succeeds."""
    status, answer = call(url, method, path, body, key, once)
    assert status < 300, (method, path, status, answer)
    return answer


def until(found: Callable[[], bool], why: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, why
        time.sleep(0.05)


class Making:
    """One home. manifest: what the test has to find in it."""

    def __init__(self, name: str, store: str = "") -> None:
        self.name = name
        home = BASE / name / "home"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        self.server = RunningServer(home, **SETTINGS, **({"ROCK_STORE": store} if store else {}))
        self.server.prefix = IN_HOST_FIXTURE
        log = ["git", "log", "-1", "--format=%H", "--", "src"]
        commit = subprocess.run(log, capture_output=True, text=True, check=True)
        self.manifest: dict[str, Any] = {"written_by": commit.stdout.strip(), "owner_key": OWNER,
                                         "images": [IMAGE, COMMITTED], "sandboxes": {}}  # fmt: skip

    @property
    def url(self) -> str:
        return self.server.url

    def config(self, **fields: Any) -> dict[str, Any]:
        return {"image": "host", "runtime": "process", "memory": "64m", "cpus": 0.5, "auto_clear_seconds": 3600,
                **fields}  # fmt: skip

    def create(self, name: str, key: str = OWNER, **fields: Any) -> dict[str, Any]:
        """A running sandbox with that id, created with the idempotency key "create-NAME"."""
        body = self.config(sandbox_id=name, labels={"case": name, "fixture": "upgrade"}, **fields)
        self.manifest.setdefault("creates", {})[name] = {"body": body, "key": key, "once": f"create-{name}"}
        answer: dict[str, Any] = done(self.url, "POST", "/v1/sandboxes?wait=60", body, key, f"create-{name}")
        assert answer["state"] == "running", answer
        return answer

    def sandbox(self, name: str, key: str = OWNER) -> Sandbox:
        return Sandbox(SandboxConfig(base_url=self.url, api_key=key)).attach(name)

    def post(self, name: str, what: str, key: str = OWNER, body: Any = None) -> Any:
        return done(self.url, "POST", f"/v1/sandboxes/{name}/{what}", body, key)

    def state(self, name: str) -> str:
        return str(done(self.url, "GET", f"/v1/sandboxes/{name}")["state"])

    def stopped(self, name: str) -> None:
        until(lambda: self.state(name) == "stopped", f"{name} does not stop")

    def roots(self) -> set[int]:
        """The pid 1 of each sandbox of the process runtime: its output goes to the sandbox's folder."""
        found = set()
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{entry}/fd/1").startswith(f"{self.server.home}/run/process/"):
                    found.add(int(entry))
        return found

    def doomed(self, name: str) -> int:
        """Create a sandbox, and return its pid 1."""
        before = self.roots()
        self.create(name)
        until(lambda: len(self.roots() - before) == 1, "it starts more than its pid 1")  # children begin as its copies
        return next(iter(self.roots() - before))

    def make(self, output: Path, also: Callable[[], Any] = lambda: None) -> None:
        """Write the fixture; whatever happens, no sandbox of it runs on. also: called when the server is dead."""
        try:
            self.write()
            self.pack(output)
            also()
        finally:
            self.clear()

    # ---- contents

    def write(self) -> None:
        self._images()
        self.server.start()
        self._keys()
        self._ended()
        self._retained()
        self._group()
        self._environments()
        self._lost()
        self._running()
        self._finish()

    def _images(self) -> None:
        root = self.server.home.parent / "root"
        shutil.rmtree(root, ignore_errors=True)
        (root / "etc").mkdir(parents=True)
        (root / "work").mkdir()
        (root / "etc" / "motd").write_text("from the image\n")
        (root / "etc" / "passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
        rock = [sys.executable, "-m", "rock.cli.main", "image", "import", str(root), IMAGE]
        subprocess.run(rock, env={**os.environ, "ROCK_HOME": str(self.server.home)}, check=True, capture_output=True)

    def _keys(self) -> None:
        """Keys of two tenants with quotas, and a revoked one."""
        wanted = {
            "alpha": {"name": "alpha's", "tenant": "alpha", "quota": {"sandboxes": 1, "cpus": 4.0, "memory": "1g"}},
            "beta": {"name": "beta's", "tenant": "beta", "quota": {"creates_per_minute": 0}},
            "reader": {"name": "looks", "tenant": "alpha", "scopes": ["read"]},
            "revoked": {"name": "revoked", "tenant": "alpha"},
        }
        self.keys = {name: done(self.url, "POST", "/v1/keys", body) for name, body in wanted.items()}
        done(self.url, "DELETE", f"/v1/keys/{self.keys['revoked']['id']}")
        self.manifest["keys"] = {name: made["key"] for name, made in self.keys.items()}

    def _ended(self) -> None:
        """An ended sandbox of each cause in ENDS, but for `lost`."""
        self.create("by-user", env={"A": "1"}, user_id="someone", experiment_id="first", namespace="space")
        self.sandbox("by-user").arun("echo hello")
        self.post("by-user", "stop")
        self.create("by-idle", auto_clear_seconds=1)
        self.create("by-deadline", timeout=1.0)
        os.kill(self.doomed("by-exit"), 9)
        body = self.config(sandbox_id="by-start", image=IMAGE, runtime="namespace", startup_timeout=0.001)
        assert call(self.url, "POST", "/v1/sandboxes?wait=60", body)[0] == 410
        self.stopped("by-start")
        for name in ("by-idle", "by-deadline", "by-exit"):
            self.stopped(name)

    def _retained(self) -> None:
        """Stopped sandboxes whose files are kept: on the worker, in the archive; and an image of one."""
        key = self.keys["alpha"]["key"]
        retained = {"image": IMAGE, "runtime": "namespace", "auto_delete_seconds": FOREVER}
        for name, owner in (("alpha-retained", key), ("archived", OWNER)):
            self.create(name, owner, **retained)
            box = self.sandbox(name, owner)
            box.write_file_by_path(f"written in {name}\n", "/work/note.txt")
            box.write_file_by_path("changed\n", "/etc/motd")
            self.post(name, "stop", owner)
        commit = {"image_tag": COMMITTED}
        done(self.url, "POST", "/v1/sandboxes/archived/commit?wait=60", commit)
        until(lambda: done(self.url, "GET", "/v1/sandboxes/archived/commit?wait=5")["phase"] == "SUCCEEDED", "commit")
        self.post("archived", "archive?wait=60")
        until(lambda: self.state("archived") == "archived", "it is not archived")
        self.create("deleted", **retained)
        self.post("deleted", "stop")
        done(self.url, "DELETE", "/v1/sandboxes/deleted")
        self.manifest["files"] = {
            name: {"/work/note.txt": f"written in {name}\n", "/etc/motd": "changed\n"}
            for name in ("alpha-retained", "archived")
        }

    def _group(self) -> None:
        """Two sandboxes of one request."""
        body = {"config": self.config(labels={"case": "group"}), "size": 2}
        made = done(self.url, "POST", "/v1/groups?wait=60", body, OWNER, "create-group")
        ids = [row["sandbox_id"] for row in made["sandboxes"]]
        for name in ids:
            self.post(name, "stop")
        self.manifest["group"] = {"body": body, "once": "create-group", "ids": ids}

    def _environments(self) -> None:
        body = {"name": "upgrade/guess", "source": "game:GuessTheNumber-v0-easy", "description": "kept over an upgrade"}
        self.manifest["environment"] = done(self.url, "POST", "/v1/envs/add", body)

    def _lost(self) -> None:
        """A sandbox that died while no server ran, and that this version reported as lost."""
        pid = self.doomed("by-loss")
        self.server.kill()
        os.kill(pid, 9)
        self.server.start()
        self.stopped("by-loss")

    def _running(self) -> None:
        """Sandboxes that run when the server is killed, with commands, programs and processes that had keys."""
        self.create("alive-process")
        self.create("alive-namespace", image=IMAGE, runtime="namespace")
        self.sandbox("alive-namespace").write_file_by_path("written\n", "/work/note.txt")
        top = "/v1/sandboxes/alive-process"
        requests = {
            "session": ("/sessions", {"session": "work"}),
            "run": ("/sessions/work/run", {"command": "echo run >> $HOME/marks; echo answer; (exit 5)"}),
            "execute": ("/execute", {"command": ["sh", "-c", "echo executed; exit 6"]}),
            "process": ("/processes", {"command": ["sleep", "600"]}),
        }
        self.manifest["journal"] = [
            {"path": top + path, "body": body, "once": f"alive-{what}",
             "answer": done(self.url, "POST", top + path, body, OWNER, f"alive-{what}")}
            for what, (path, body) in requests.items()
        ]  # fmt: skip

    def _finish(self) -> None:
        listed = done(self.url, "GET", "/v1/sandboxes?limit=500&history=1&state=pending,running,stopping,stopped,"
                                       "archiving,archived,deleted")  # fmt: skip
        for info in listed["items"]:
            self.manifest["sandboxes"][info["sandbox_id"]] = info
        causes = {info["cause"] for info in listed["items"]} - {None}
        assert causes >= ENDS, causes
        self.manifest["key_infos"] = done(self.url, "GET", "/v1/keys")["items"]
        self.manifest["server"] = done(self.url, "GET", "/v1/server")
        self.server.kill()

    # ---- packing

    def pack(self, output: Path) -> None:
        """Write NAME.tar.gz and NAME.json."""
        size = pack(self.server.home, output / f"{self.name}.tar.gz")
        (output / f"{self.name}.json").write_text(json.dumps(self.manifest, indent=1, sort_keys=True) + "\n")
        print(f"{self.name}: {size:,} bytes, {len(self.manifest['sandboxes'])} sandboxes")

    def clear(self) -> None:
        """End what still runs."""
        if self.server.process is None or self.server.process.poll() is not None:
            self.server.start()
        with Client(self.url, OWNER) as client:
            for info in client.list_sandboxes(states="pending,running,stopping"):
                client.stop_sandbox(info.sandbox_id)
        assert self.server.process is not None
        self.server.process.terminate()
        self.server.process.wait(60)


def dump(url: str) -> str:
    """A database as SQL text: the schema as pg_dump writes it, and a row an INSERT."""
    shown = subprocess.run(["pg_dump", "--inserts", "--no-owner", "--no-privileges", "--no-comments", url],
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    kept = [line for line in shown.splitlines() if line and not line.startswith(("--", "SET ", "\\"))
            # the lease of the server that was killed: it has run out when a fixture is read
            and "set_config(" not in line and not line.startswith("INSERT INTO public.lease")]  # fmt: skip
    return "\n".join(kept) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    output = parser.parse_args().output
    assert os.geteuid() == 0, "only root can write the fixture: its files have the owners of a uid range"
    Making("sqlite").make(output)
    with postgres() as database:
        url = database()
        Making("postgres", url).make(output, lambda: (output / "postgres.sql").write_text(dump(url)))


if __name__ == "__main__":
    main()
