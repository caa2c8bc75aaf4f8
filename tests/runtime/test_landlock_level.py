"""The level of Landlock: what its sandboxes can and cannot, and that nothing gets away from them."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rock import errors
from rock.guest.init import process_tree
from rock.protocol.sandbox import Isolation, SandboxConfig
from rock.runtime.base import Liveness
from rock.runtime.landlock import ruleset
from rock.runtime.landlock.runtime import LandlockRuntime
from rock.runtime.process.runtime import children, reap
from tests.runtime.boxes import ROOT, Box, run, until

pytestmark = pytest.mark.skipif(not ROOT or ruleset.version() < 4,
                                reason="isolation landlock takes root, and Landlock of version 4")


@asynccontextmanager
async def landlock_box(folder: Path, **config: object) -> AsyncIterator[Box]:
    runtime = LandlockRuntime(folder / "run")
    await runtime.open()
    handle = await runtime.create("box", SandboxConfig(**{"image": "host", "memory": "256m", "cpus": 1, **config}))
    box = Box(runtime, handle, Path(handle.data["home"]))
    try:
        yield box
    finally:
        box.close()
        await runtime.destroy(handle)
        await runtime.close()
    assert list((folder / "run").iterdir()) == []
    assert not Path(handle.data["home"]).exists()
    assert _of_user(int(handle.data["uid"])) == []


def _of_user(uid: int) -> list[int]:
    found = []
    for pid in process_tree.scan():
        try:
            if os.stat(f"/proc/{pid}").st_uid == uid and process_tree.read(pid).alive:  # type: ignore[union-attr]
                found.append(pid)
        except (OSError, AttributeError):
            continue
    return found


def test_what_it_is(tmp_path: Path) -> None:
    async def main() -> None:
        async with landlock_box(tmp_path, env={"MINE": "1"}, nofile=200) as b:
            assert b.handle.isolation is Isolation.LANDLOCK
            assert b.handle.enforced == {"memory": "watched", "cpus": "affinity", "pids": "rlimit", "nofile": "rlimit"}
            script = 'echo $MINE; pwd; echo "$HOME"; touch "$TMPDIR/x" && echo wrote; ulimit -Hn; nproc'
            out = await b.sh(script, env={})
            mine, cwd, home, wrote, files, cpus = out.split()
            assert (mine, cwd, home, wrote, files, cpus) == ("1", str(b.root), str(b.root), "wrote", "200", "1")
            assert (await b.sh("id -u")).strip() == str(b.handle.data["uid"])
            seen = await b.sh("ls /tmp /root; cat /etc/shadow; touch /usr/x /var/tmp/x")
            assert seen.count("Permission denied") == 5
            assert (await b.sh("stty size", pty=(24, 80))).strip() == "24 80"

    run(main())


def test_files_by_the_api(tmp_path: Path) -> None:
    async def main() -> None:
        async with landlock_box(tmp_path) as b:
            fd, token = await b.runtime.open_write(b.handle, f"{b.root}/a/file", mode=0o640)
            os.write(fd, b"text")
            os.close(fd)
            await b.runtime.commit_write(b.handle, token)
            assert await b.sh("cat a/file; stat -c %a a/file") == "text640\n"
            assert [entry.name for entry in await b.runtime.list(b.handle, str(b.root))] == ["a", "tmp"]
            with pytest.raises(errors.PermissionDenied):
                await b.runtime.open_write(b.handle, "/var/tmp/rock-escape")
            with pytest.raises(errors.Unsupported, match="no ports"):
                await b.runtime.dial(b.handle, 80)

    run(main())


def test_networks(tmp_path: Path) -> None:
    sockets = ("import socket\nfor f, t in ((2, 1), (2, 2), (10, 1), (1, 1)):\n"
               "  try: socket.socket(f, t); print('ok')\n  except OSError as e: print(e.errno)\n"
               "socket.socketpair(); print('pair')")

    async def main() -> None:
        async with landlock_box(tmp_path) as b:
            assert (await b.python(sockets)).split() == ["13"] * 4 + ["pair"]
        async with landlock_box(tmp_path, network="host") as b:
            assert (await b.python(sockets)).split() == ["ok"] * 3 + ["97", "pair"]

    run(main())


def test_nothing_survives_when_its_pid_1_is_killed(tmp_path: Path) -> None:
    """Its programs can end pid 1, as they have its user; the warden then ends them."""
    async def main() -> None:
        async with landlock_box(tmp_path) as b:
            uid = int(b.handle.data["uid"])
            await b.spawn("sh", "-c", "setsid sh -c 'trap \"\" TERM HUP; while :; do sleep 1; done' & sleep 100")
            await until(lambda: len(_of_user(uid)) >= 4)
            os.kill(int(b.handle.data["init"]), 9)
            async with asyncio.timeout(30):
                assert await b.runtime.wait(b.handle) == "exited"
            await until(lambda: _of_user(uid) == [])
            assert await b.runtime.recover(b.handle) is Liveness.GONE

    run(main())


def test_a_new_server_finds_it_again_or_sweeps_it(tmp_path: Path) -> None:
    async def main() -> None:
        first = LandlockRuntime(tmp_path / "run")
        await first.open()
        config = SandboxConfig(image="host", memory="128m", cpus=1)
        kept, lost = await first.create("kept", config), await first.create("lost", config)
        await first.close()
        second = LandlockRuntime(tmp_path / "run")
        await second.open()
        assert await second.recover(kept) is Liveness.RUNNING
        assert await Box(second, kept, Path(kept.data["home"])).sh("echo again") == "again\n"
        assert await second.sweep(["kept"]) == ["lost"]
        assert _of_user(int(lost.data["uid"])) == []
        third = await second.create("third", config)
        assert third.data["uid"] not in (kept.data["uid"], )
        for handle in (kept, third):
            await second.destroy(handle)
        await second.close()
        await until(lambda: bool(reap() or not children))  # it is still their parent

    run(main())


def test_memory_is_watched_and_processes_are_counted(tmp_path: Path) -> None:
    async def main() -> None:
        async with landlock_box(tmp_path, memory="64m", pids=40) as b:
            status, _, _ = await b.run("/usr/bin/python3", "-I", "-S", "-c",
                                       "x = bytearray(500 << 20); import time; time.sleep(30)")
            assert status.signal == 9
            used = await b.runtime.usage(b.handle)
            assert used.oom_kills and used.oom_kills >= 1
            with pytest.raises(errors.QuotaExceeded):
                for _ in range(60):
                    await b.spawn("sleep", "50")
            assert len(_of_user(int(b.handle.data["uid"]))) <= 40

    run(main())


def test_memory_is_watched_while_the_threads_of_the_event_loop_are_busy(tmp_path: Path) -> None:
    async def main() -> None:
        release = threading.Event()
        loop = asyncio.get_running_loop()
        async with landlock_box(tmp_path, memory="64m") as b:
            process = await b.spawn("/usr/bin/python3", "-I", "-S", "-c",
                                    "import time; time.sleep(1); x = bytearray(300 << 20); time.sleep(30)")
            busy = [loop.run_in_executor(None, release.wait, 30) for _ in range(64)]
            try:
                async with asyncio.timeout(15):
                    assert (await process.wait()).signal == 9
            finally:
                release.set()
                await asyncio.gather(*busy)

    run(main())


def test_a_host_without_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version is asked of the kernel once; here of one that has none."""
    async def main() -> None:
        runtime = LandlockRuntime(tmp_path / "run")
        await runtime.open()
        with pytest.raises(errors.Unsupported, match="programs of this machine only"):
            await runtime.check(SandboxConfig(image="host", memory="64m", cpus=1, oci_runtime="runc"))
        monkeypatch.setattr(ruleset, "version", lambda: 0)
        with pytest.raises(errors.Unsupported, match="version 4 is needed, this kernel has none"):
            await runtime.check(SandboxConfig(image="host", memory="64m", cpus=1))
        await runtime.close()

    run(main())
