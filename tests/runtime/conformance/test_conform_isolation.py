"""What a sandbox is kept from, as far as its runtime declares it: the host's files and processes, its network, more
than its limits."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from rock import errors
from rock.runtime.base import Limits, Trait, Watches
from tests.runtime.boxes import run
from tests.runtime.conformance.conftest import Bench
from tests.runtime.conformance.subject import needs

GREED = "x = bytearray(900 << 20); import time; time.sleep(9)"


@needs(Trait.ROOT)
def test_the_hosts_files_are_not_there(box: Bench, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the host's")

    async def main() -> None:
        async with box() as b:
            seen = await b.sh(f"cat {secret} 2>&1; ls {tmp_path} 2>&1; cat /proc/1/root{secret} 2>&1")
            assert "the host's" not in seen
            await b.sh(f"mkdir -p {tmp_path} && echo changed > {secret}")
            assert secret.read_text() == "the host's"

    run(main())


@needs(Trait.PROCESSES, Trait.PROGRAMS)
def test_the_hosts_processes_are_out_of_reach(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            seen = await b.sh("for f in /proc/[0-9]*/cmdline; do tr '\\0' ' ' < $f; echo; done 2>/dev/null")
            assert "rock-init" in seen or "sh -c" in seen
            assert "pytest" not in seen
            await b.sh("kill -9 -1")  # itself and all that it can see
            assert (await b.run("sh", "-c", "exit 3"))[0].code == 3
            await b.sh("kill -9 1; kill -STOP 1; kill -TERM 1; kill -INT 1; kill -SEGV 1")
            assert await b.sh("echo alive") == "alive\n"

    run(main())


@needs(Trait.NETWORK, Trait.PROGRAMS)
def test_network_none_is_a_loopback_of_its_own(box: Bench) -> None:
    script = ("import socket\n"
              "s = socket.create_server(('127.0.0.1', {port}))\n"
              "c = socket.create_connection(('127.0.0.1', {port}), 5)\n"
              "print('own')\n"
              "for a in ('169.254.169.254', '8.8.8.8', '10.0.0.1'):\n"
              "  try: socket.create_connection((a, 80), 5); print('reached')\n"
              "  except OSError: print('no')\n")

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as hosts:
            async with box() as b:
                # A port that is taken outside is free inside, and what listens there is not reached.
                assert (await b.python(script.format(port=hosts.getsockname()[1]))).split() == ["own", "no", "no", "no"]
            hosts.settimeout(0)
            with pytest.raises(BlockingIOError):
                hosts.accept()

    run(main())


@needs(Trait.LIMITS, Trait.PROGRAMS, Limits)
def test_memory_is_held_and_pid_1_survives(box: Bench) -> None:
    async def main() -> None:
        async with box(memory="64m") as b:
            assert b.handle.enforced["memory"] != "none"
            for _ in range(2):
                status, _, _ = await b.run(b.interpreter, "-I", "-S", "-c", GREED)
                assert status.signal == 9
            assert await b.sh("echo alive") == "alive\n"
            if isinstance(b.runtime, Watches):
                assert b.runtime.oom_kills(b.handle) >= 2

    run(main())


@needs(Trait.LIMITS, Trait.PROGRAMS, Limits)
def test_processes_are_held_and_a_fork_bomb_is_ended(box: Bench) -> None:
    async def main() -> None:
        async with box(pids=100) as b:
            assert b.handle.enforced["pids"] != "none"
            # It forks once and execs: a shell that cannot fork ends, and its orphans would be out of its tree. Bash's
            # forks are tried again for seconds, so that this one is at its limit and goes on.
            script = ":() { : | : & }; (:) & exec sleep 100"
            bomb = await b.spawn("bash", "-c", script, stdout="null", stderr="null")
            await asyncio.sleep(1.0)
            assert (await b.runtime.usage(b.handle)).pids <= 110
            async with asyncio.timeout(60):
                assert await bomb.kill_tree() > 10
                while (await b.runtime.usage(b.handle)).pids > 20:  # noqa: ASYNC110 - they are dead, and not all gone
                    await asyncio.sleep(0.1)
            await b.spawn("bash", "-c", ":(){ :|:& };:; sleep 100", stdout="null", stderr="null")
            await asyncio.sleep(0.5)
            with pytest.raises(errors.QuotaExceeded):
                for _ in range(300):
                    await b.spawn("sleep", "50")
            async with asyncio.timeout(60):
                await b.runtime.destroy(b.handle)

    run(main(), 150)


@needs(Trait.LIMITS, Trait.PROGRAMS)
def test_cpus_are_held(box: Bench) -> None:
    async def main() -> None:
        async with box(cpus=0.5) as b:
            if b.handle.enforced["cpus"] == "affinity":
                assert await b.python("import os; print(len(os.sched_getaffinity(0)))") == "1\n"
            else:
                assert b.handle.enforced["cpus"] != "none"
                used = await b.python("import time\ne = time.time() + 1\nwhile time.time() < e: pass\n"
                                      "print(time.process_time())")
                assert float(used) < 0.8

    run(main())


@needs(Trait.PROGRAMS)
def test_programs_inherit_nothing_of_the_server(box: Bench) -> None:
    os.environ["ROCK_TEST_SECRET"] = "of the server"
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    try:

        async def main() -> None:
            async with box() as b:
                assert "of the server" not in await b.sh("env; cat /proc/self/environ")
                assert await b.sh("ls /proc/self/fd | wc -l") == "4\n"  # three, and that of ls

        run(main())
    finally:
        del os.environ["ROCK_TEST_SECRET"]
        os.close(reading)
        os.close(writing)
