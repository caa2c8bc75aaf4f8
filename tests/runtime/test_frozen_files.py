"""Snapshots of the namespace runtime: live switch of files, copies, refusals before any change, layers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rock import errors, faults
from rock.guest.init import process_tree
from rock.images.records import Bind
from rock.protocol.sandbox import SandboxConfig
from rock.runtime.base import Forks, Frozen, Handle, Process
from rock.runtime.namespace.launcher import switch
from rock.runtime.namespace.runtime import NamespaceRuntime
from tests.runtime.boxes import ROOT, Box, HandMade, leftovers, namespace_runtime, run, until_line

CONFIG = SandboxConfig(image="hand", memory="256m", cpus=1, pids=128)
A, B, C = ("a" * 32, "b" * 32, "c" * 32)

LIVE = ROOT and platform.machine() == "x86_64"
switching = pytest.mark.skipif(not LIVE, reason="files are switched by root on x86_64 only")


@asynccontextmanager
async def forking(folder: Path, images: HandMade | None = None) -> AsyncIterator[tuple[NamespaceRuntime, Box]]:
    """A runtime and a sandbox; nothing may be left at the end."""
    async with namespace_runtime(folder, images=images) as runtime:
        before = leftovers(folder)
        handle = await runtime.create("box", CONFIG)
        box = Box(runtime, handle, Path("/work"))
        try:
            yield runtime, box
        finally:
            box.close()
            await runtime.destroy(box.handle)
            for one in list(runtime.snapshots()):
                await runtime.drop_snapshot(one)
            assert not (runtime._run_dir / "snapshots").exists()
            after = leftovers(folder)
            assert (after["slots"], after["mounts"]) == (before["slots"], before["mounts"])


async def shell(box: Box, script: str = "") -> Process:
    """A shell that stays, after a script."""
    process = await box.spawn("bash", "--norc", stdin="pipe", stderr="stdout")
    await say(process, script or ":")
    return process


async def say(process: Process, script: str) -> str:
    """The output of a script in a shell that stays."""
    assert process.stdin is not None and process.stdout is not None
    os.write(process.stdin, f"{script}\necho --end--\n".encode())
    found = ""
    async with asyncio.timeout(20):
        while not found.endswith("--end--\n"):
            found += (await until_line(process.stdout)).decode()
    return found.removesuffix("--end--\n").strip()


async def child(runtime: NamespaceRuntime, snapshot: str, script: str, name: str = "child") -> str:
    """The output of a script in a new sandbox of a snapshot."""
    handle = await runtime.create(name, CONFIG.model_copy(update={"snapshot": snapshot}))
    box = Box(runtime, handle, Path("/work"))
    try:
        return (await box.sh(script)).strip()
    finally:
        box.close()
        await runtime.destroy(handle)


def layer(runtime: NamespaceRuntime, snapshot: str) -> Path:
    return runtime._run_dir / "snapshots" / snapshot / "upper"


@switching
def test_files_are_switched_below_a_live_shell(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            assert isinstance(runtime, Forks)
            sh = await shell(box, "mkdir -p deep/er; cd deep/er; echo one > log; X=5")
            await say(sh, "exec 7>>log 8<>both; printf 1234 >&8")
            for number, snapshot in enumerate((A, B, C)):
                taken = await runtime.checkpoint(box.handle, snapshot, "switch")
                assert (taken.files, taken.layers) == ("switch", number + 1), taken
                assert 0 < taken.paused_ms < 1000
                # Relative paths, appended files, offsets and variables continue, and reach only the new layer.
                assert await say(sh, f"echo {number} >&7; echo r > rel{number}; printf 56 >&8; pwd; echo $X") == \
                    "/work/deep/er\n5"
            assert await say(sh, "cat log both; ls") == "one\n0\n1\n2\n1234565656both\nlog\nrel0\nrel1\nrel2"
            assert (layer(runtime, A) / "work/deep/er/log").read_text() == "one\n"
            assert (layer(runtime, B) / "work/deep/er/log").read_text() == "one\n0\n"
            assert sorted(os.listdir(layer(runtime, C) / "work/deep/er")) == ["both", "log", "rel1"]
            assert await child(runtime, A, "cat deep/er/log; ls deep/er") == "one\nboth\nlog"
            assert await child(runtime, C, "cat deep/er/log; ls deep/er") == "one\n0\n1\nboth\nlog\nrel0\nrel1"
            assert runtime.parent(box.handle) == C

    run(main())


def test_deletions_modes_owners_and_attributes(tmp_path: Path) -> None:
    script = ("mkdir d; echo x > d/a; echo y > d/b; ln d/a d/hard; ln -s a d/soft; chmod 4751 d/a; mkfifo d/fifo; "
              "mkdir -m 1777 gone; touch gone/x; truncate -s 5M d/sparse; chmod 700 /; touch -d @1000 d/b")
    if ROOT:
        script += "; chown 1000:1000 d/b"

    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            assert await box.sh(script) == ""
            await runtime.checkpoint(box.handle, A, "auto")
            assert await box.sh("rm -r d/a gone; mkdir gone; echo new > gone/y; chmod 600 d/b") == ""
            await runtime.checkpoint(box.handle, B, "copy")
            show = ("stat -c '%n %a %u:%g %s %h %F %Y' / d/b d/hard; find . | sort; cat d/hard d/b; "
                    "stat -c '%a %b' d/sparse; echo ${#X}")
            here = await box.sh(show)
            assert await child(runtime, B, show) == here.strip()
            before = await child(runtime, A, "find . | sort; stat -c '%a %h' d/a; stat -c %a /; ls gone")
            assert before.splitlines()[-3:] == ["4751 2", "700", "x"]

    run(main())


def shared_folder(tmp_path: Path, images: HandMade) -> Path:
    """A folder of the machine, with a file and a folder, that sandboxes of the image may write to at /shared."""
    shared = tmp_path / "shared"
    (shared / "below").mkdir(parents=True)
    (shared / "file").write_text("host\n")
    (images.layer / "shared").mkdir()
    images.binds = (*images.binds, Bind(str(shared), "/shared", writable=True, idmap=ROOT))
    return shared


@switching
def test_folders_of_the_machine_that_a_sandbox_may_write_to(tmp_path: Path) -> None:
    images = HandMade(tmp_path / "image")
    shared = shared_folder(tmp_path, images)

    async def main() -> None:
        async with forking(tmp_path, images) as (runtime, box):
            sh = await shell(box, "cd /shared/below; echo a > a; exec 9>>a")
            for number, snapshot in enumerate((A, B)):
                assert (await runtime.checkpoint(box.handle, snapshot, "switch")).files == "switch"
                await say(sh, f"echo {number} >&9; echo {number} >> rel; echo own >> /shared/file")
            assert await say(sh, "cat a rel; pwd; cat /shared/file") == "a\n0\n1\n0\n1\n/shared/below\nhost\nown\nown"
            assert await child(runtime, B, "cat /shared/below/a /shared/file") == "a\n0\nhost\nown"
        assert (shared / "file").read_text() == "host\n" and os.listdir(shared / "below") == []

    run(main())


def _program(text: str) -> str:
    """Start a program in the background, and wait until it has executed this text."""
    return (f'python3 -c "{text}; open(\'/tmp/up\', \'w\').close(); import time; time.sleep(99)" & '
            "while [ ! -e /tmp/up ]; do sleep 0.05; done")


REFUSED = {
    "deleted": ("exec 7>gone; rm gone", "deleted file"),
    "folder": ("mkdir x; cd x; rmdir ../x", "deleted working directory"),
    "lock": ("exec 7>locked; flock 7", "holds a lock"),
    "fifo": ("mkfifo f; exec 7<>f", "special file"),
    "mapping": (_program("import mmap; f=open('/work/m','w+b'); f.truncate(4096); m=mmap.mmap(f.fileno(),4096); "
                         "f.close()"), "shared writable mapping"),
    "socket": (_program("import socket; s=socket.socket(1); s.bind('/work/s'); s.listen()"), "unix socket is bound"),
    "many": (_program("import resource as r; r.setrlimit(7, (3000, r.getrlimit(7)[1])); "
                      "x=[open('/work/x%d' % n, 'w') for n in range(2100)]"), "files are open|too many open files"),
    "inotify": (_program("import ctypes; ctypes.CDLL(None).inotify_init()"), "inotify"),
    "shared": ("exec 7<>both; (sleep 99) & ", "shares the open file"),
}


@switching
@pytest.mark.parametrize("case", REFUSED)
def test_refusals_change_nothing_and_a_copy_is_possible(tmp_path: Path, case: str) -> None:
    script, reason = REFUSED[case]

    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            sh = await shell(box, f"echo before > file; {script}")
            with pytest.raises(errors.Unsupported, match=reason):
                await runtime.checkpoint(box.handle, A, "switch")
            assert runtime.snapshots() == {}
            slot = runtime._run_dir / box.handle.data["slot"]
            assert sorted(os.listdir(slot)) == ["record.json", "s", "upper", "work"]
            assert await say(sh, "echo after > /work/file; cat /work/file") == "after"
            taken = await runtime.checkpoint(box.handle, A, "auto")
            assert taken.files == "copy" and any(re.search(reason, one) for one in taken.left_out), taken
            assert await say(sh, "echo later > /work/file; cat /work/file") == "later"
            assert await child(runtime, A, "cat file") == "after"

    run(main())


@switching
def test_processes_continue_at_their_instruction(tmp_path: Path) -> None:
    """A system call that was interrupted, a busy loop, threads and children are as before."""
    program = """
import os, sys, threading, time
print(os.getpid(), flush=True)
os.makedirs('/work/p', exist_ok=True); os.chdir('/work/p')
log = open('log', 'a', buffering=1)
done = []
threading.Thread(target=lambda: (time.sleep(0.5), done.append(1))).start()
total = 0
end = time.monotonic() + 1.0
while time.monotonic() < end:
    total += sum(range(1000)); log.write('x')
began = time.monotonic(); time.sleep(0.3); slept = time.monotonic() - began
child = os.fork()
if child == 0:
    time.sleep(0.2); os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), done, total % 499500, slept >= 0.3, os.getcwd(), flush=True)
print(sys.stdin.readline(), flush=True)
"""

    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            process = await box.spawn("python3", "-c", program, stdin="pipe", stderr="stdout")
            assert process.stdout is not None and process.stdin is not None
            await until_line(process.stdout)
            taken = []
            for number in range(12):
                taken.append(await runtime.checkpoint(box.handle, f"{number:032x}", "auto"))
                await asyncio.sleep(0.12)
            os.write(process.stdin, b"typed\n")
            assert await until_line(process.stdout) == b"7 [1] 0 True /work/p\n"
            assert await until_line(process.stdout) == b"typed\n"
            assert sum(one.files == "switch" for one in taken) >= 6, [(one.files, one.left_out) for one in taken]
            total = len(await box.sh("cat /work/p/log"))
            assert [len(await child(runtime, f"{n:032x}", "cat /work/p/log")) for n in (2, 5)] < [total, total]

    run(main(), timeout=120)


def test_children_are_separate_and_layers_live_as_long_as_their_users(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            await box.sh("echo base > file")
            await runtime.checkpoint(box.handle, A, "auto")
            config = CONFIG.model_copy(update={"snapshot": A})
            handles = [await runtime.create(f"c{number}", config) for number in range(3)]
            boxes = [Box(runtime, handle, Path("/work")) for handle in handles]
            for number, one in enumerate(boxes):
                assert await one.sh(f"cat file; echo {number} >> file; cat file") == f"base\nbase\n{number}\n"
            assert await box.sh("cat file") == "base\n"
            assert sorted(runtime.snapshots()[A]) == [*(["box"] if LIVE else []), "c0", "c1", "c2"]
            await runtime.checkpoint(handles[0], B, "auto")
            assert runtime.snapshots()[B] == (["c0"] if LIVE else [])
            assert not await runtime.drop_snapshot(A)  # it is hidden, and its layer stays
            assert set(runtime.snapshots()) == {B} and layer(runtime, A).exists()
            with pytest.raises(errors.NotFound, match="no snapshot"):
                await runtime.create("late", config)
            assert await child(runtime, B, "cat file") == "base\n0"
            for one in (*boxes, box):
                one.close()
            for handle in (*handles, box.handle):
                await runtime.destroy(handle)
            assert layer(runtime, A).exists()  # B needs it
            await runtime.drop_snapshot(B)
            assert not layer(runtime, A).exists() and not layer(runtime, B).exists()

    run(main())


def test_rollback_replaces_a_sandbox(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            await box.sh("echo good > file")
            await runtime.checkpoint(box.handle, A, "auto")
            await box.sh("echo bad > file; touch more")
            new = await runtime.replace(box.handle, CONFIG, A)
            assert new.id == "box" and new.data["slot"] != box.handle.data["slot"]
            other = Box(runtime, new, Path("/work"))
            assert await other.sh("cat file; ls") == "good\nfile\n"
            assert await box.sh("cat file") == "bad\n"  # until it is destroyed
            await runtime.destroy(box.handle)
            box.close()
            box.handle, box.started = new, other.started

    run(main())


def test_children_have_an_identity_of_their_own(tmp_path: Path) -> None:
    images = HandMade(tmp_path / "image")
    (images.layer / "etc/machine-id").write_text("0" * 32 + "\n")

    async def main() -> None:
        async with forking(tmp_path, images) as (runtime, box):
            await box.sh("mkdir -p /etc/ssh; chmod 750 /etc/ssh; echo key > /etc/ssh/ssh_host_rsa_key; "
                         "echo c > /etc/ssh/config; rm /etc/group")
            await runtime.checkpoint(box.handle, A, "auto")
            show = "cat /etc/machine-id; ls /etc/ssh; stat -c '%a %u' /etc/ssh /etc; ls /etc/group 2>&1"
            ids = set()
            for number in range(2):
                identity, *rest = (await child(runtime, A, show, f"c{number}")).splitlines()
                assert len(identity) == 32 and rest[:3] == ["config", "750 0", "755 0"] and "No such" in rest[3]
                ids.add(identity)
            assert len({*ids, "0" * 32}) == 3
            assert (await box.sh("cat /etc/machine-id")).strip() == "0" * 32

    run(main())


@pytest.mark.skipif(not ROOT, reason="a small disk is mounted by root")
def test_snapshots_leave_space_for_sandboxes(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            sh = await shell(box, "echo x > file")
            with pytest.raises(errors.StorageFull):
                await runtime.checkpoint(box.handle, A, "auto")
            assert runtime.snapshots() == {} and await say(sh, "echo y > file; cat file") == "y"

    (tmp_path / "run").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "small", str(tmp_path / "run")], check=True)
    try:
        run(main())
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "run")], check=True)


def test_a_link_in_place_of_etc_is_not_followed(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            await box.sh("touch /etc/machine-id; mv /etc /etc2; ln -s /etc2 /etc")
            await runtime.checkpoint(box.handle, A, "auto")
            assert await child(runtime, A, "readlink /etc; ls /etc/passwd") == "/etc2\n/etc/passwd"

    run(main())


# ---- a server that ends in the middle ----


@switching
@pytest.mark.parametrize("step", ["journal", "moved", "switched", "frozen"])
def test_an_interrupted_switch_is_completed_or_undone(tmp_path: Path, step: str) -> None:
    """The state after a crash at each step, found by the next start of the runtime."""

    async def main() -> None:
        images = HandMade(tmp_path / "image")
        async with namespace_runtime(tmp_path, images=images) as runtime:
            handle = await runtime.create("box", CONFIG)
            box = Box(runtime, handle, Path("/work"))
            await box.sh("echo one > file")
            slot = runtime._run_dir / handle.data["slot"]
            device = os.stat(f"/proc/{handle.data['pid']}/root/").st_dev
            frozen = runtime._run_dir / "snapshots" / A
            if step in ("journal", "moved"):
                frozen.mkdir(parents=True)
                (slot / switch.JOURNAL).write_text(json.dumps({"frozen": str(frozen), "device": device}))
            if step == "moved":
                for name in ("upper", "work"):
                    os.rename(slot / name, frozen / name)
                    (slot / name).mkdir()
            if step in ("switched", "frozen"):
                faults.arm(f"namespace.checkpoint.{step}=error")
                try:
                    with pytest.raises(errors.RockError):
                        await runtime.checkpoint(handle, A, "switch")
                finally:
                    faults.arm("")
            box.close()
        async with namespace_runtime(tmp_path, images=images) as runtime:
            await runtime.recover(handle)
            box = Box(runtime, handle, Path("/work"))
            assert not (slot / switch.JOURNAL).exists()
            assert await box.sh("cat file; echo two >> file; cat file") == "one\none\ntwo\n"
            assert runtime.snapshots() == {}
            assert frozen.exists() is (step in ("switched", "frozen"))
            assert (await runtime.checkpoint(handle, B, "switch")).files == "switch"
            assert await child(runtime, B, "cat file") == "one\ntwo"
            box.close()
            await runtime.destroy(handle)
            await runtime.drop_snapshot(B)
            assert not (runtime._run_dir / "snapshots").exists()

    run(main())


def test_a_stopped_sandbox_restarts_on_its_layers(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"auto_delete_seconds": 60})

    async def main() -> None:
        images = HandMade(tmp_path / "image")
        async with namespace_runtime(tmp_path, images=images) as runtime:
            handle = await runtime.create("box", config)
            box = Box(runtime, handle, Path("/work"))
            await box.sh("echo one > a")
            await runtime.checkpoint(handle, A, "auto")
            await box.sh("echo two > b")
            box.close()
            kept = await runtime.rest(handle)
            await runtime.drop_snapshot(A)
        async with namespace_runtime(tmp_path, images=images) as runtime:
            woken = await runtime.wake(kept, config)
            box = Box(runtime, woken, Path("/work"))
            assert await box.sh("cat a b") == "one\ntwo\n"
            box.close()
            await runtime.destroy(woken)
            assert not (runtime._run_dir / "snapshots").exists()

    run(main())


# ---- hostile guests ----


@switching
def test_a_fork_bomb_ends_no_other_process(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            sh = await shell(box, "echo x > file; f() { sleep 0.01 & f; sleep 0.01; }; (f) 2>/dev/null & sleep 0.3")
            with contextlib.suppress(errors.Unsupported):
                await runtime.checkpoint(box.handle, A, "switch")
            assert process_tree.lives(box.handle.data["pid"], box.handle.data["start"])
            slot = runtime._run_dir / box.handle.data["slot"]
            assert not (slot / switch.JOURNAL).exists()
            os.kill(box.handle.data["pid"], 0)
            sh.close()

    run(main())


@switching
def test_paths_of_a_guest_lead_nowhere_else(tmp_path: Path) -> None:
    """Names with line ends, spaces, backslashes and the mark of a deleted file; links in place of mount points."""
    script = r"""mkdir -p $'a\nb (deleted)/c d\\040e'; cd $'a\nb (deleted)/c d\\040e'; echo x > 'f (deleted)'
exec 7>>'f (deleted)'
rm -rf /mnt; ln -s /etc /mnt; rm -rf /sys 2>/dev/null; ln -s / /work/root"""

    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            sh = await shell(box, script)
            taken = await runtime.checkpoint(box.handle, A, "auto")
            assert await say(sh, "echo y >&7; cat 'f (deleted)'; pwd | wc -l; ls /mnt/passwd") == "x\ny\n2\n/mnt/passwd"
            assert taken.files == "switch", taken.left_out
            assert await child(runtime, A, "cat a*/c*/f*") == "x"

    run(main())


@switching
def test_a_killed_launcher_leaves_processes_running(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            sh = await shell(box, "cd /tmp; echo 1 > n; (while :; do sleep 0.01; date +%N > tick; done) &")
            pid = runtime._slots.launcher.pid
            task = asyncio.create_task(runtime.checkpoint(box.handle, A, "switch"))
            await asyncio.sleep(0.002)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            taken: Frozen | BaseException = (await asyncio.gather(task, return_exceptions=True))[0]
            first = await say(sh, "cat tick; sleep 0.2")
            assert await say(sh, "cat tick n") not in ("", first)
            handle: Handle = box.handle
            assert isinstance(taken, (Frozen, errors.RockError)), taken
            assert (await runtime.checkpoint(handle, B, "auto")).layers >= 1

    run(main())
