"""The namespace runtime: what gets out (nothing), what is held, what is left (nothing). The holes that once were."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from rock import errors
from rock.protocol.sandbox import Isolation, SandboxConfig
from rock.runtime.namespace.runtime import NamespaceRuntime
from tests.runtime.boxes import ROOT, Box, HandMade, namespace_box, namespace_runtime, run, until

GREED = "x = bytearray(900 << 20); import time; time.sleep(9)"
CALLS = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def call(name, number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    print(name, errno.errorcode.get(ctypes.get_errno(), "ok") if result < 0 else "ok", flush=True)
    return result
"""


def x86(b: Box) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers in this test are those of x86_64")


def test_what_it_is(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_box(tmp_path) as b:
            assert b.handle.isolation == (Isolation.NAMESPACES if ROOT else Isolation.USERNS)
            assert set(b.handle.enforced) == {"memory", "cpus", "pids", "disk"}
            status = await b.sh("id -u; hostname; echo $FROM_IMAGE; pwd; ls -A /proc | grep -c '^[0-9]'", env={})
            uid, host, image, cwd, processes = status.split()
            assert (uid, image, cwd) == ("0", "yes", "/work")
            assert host == "sandbox"
            assert int(processes) <= 5

    run(main())


def test_privileges_are_gone(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_box(tmp_path) as b:
            lines = (await b.sh("cat /proc/self/status")).splitlines()
            status = dict(line.split(":\t") for line in lines if ":\t" in line)
            assert status["NoNewPrivs"] == "1"
            assert status["Seccomp"] == "2"
            kept = sum(1 << number for number in (0, 1, 3, 4, 5, 6, 7, 10, 18))
            for name in ("CapBnd", "CapEff", "CapPrm"):
                assert int(status[name], 16) & ~kept == 0
            assert int(status["CapInh"], 16) == 0

    run(main())


def test_host_secrets_are_not_there(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_box(tmp_path) as b:
            out = await b.sh(f"ls /home /srv /var {tmp_path} {Path.home()}/.ssh 2>&1 | grep -v 'No such file'; "
                             "cat /etc/shadow 2>&1; ls -A /root; "
                             "cat /proc/1/environ /proc/1/cmdline 2>/dev/null | tr '\\0' ' '")
            assert out.replace(" ", "") == "cat:/etc/shadow:Nosuchfileordirectory\nrock-init".replace(" ", "")
            assert "Permission denied" in await b.sh("ls /proc/1/fd; cat /proc/1/mem; ls /proc/1/root/")
            assert str(tmp_path) not in await b.sh("cat /proc/self/mountinfo /proc/self/mounts | grep -v overlay")

    run(main())


def test_raw_clone_cannot_make_a_user_namespace(tmp_path: Path) -> None:
    """Hole 1: unshare was refused, clone with the same flag was not."""
    async def main() -> None:
        async with namespace_box(tmp_path) as b:
            x86(b)
            out = await b.python(CALLS + (
                "for flag in (0x10000000, 0x20000000, 0x00020000, 0x40000000, 0x02000000, 0x04000000, 0x08000000):\n"
                "  if call('clone', 56, flag | 17, 0, 0, 0, 0) == 0: os._exit(0)\n"
                "  call('unshare', 272, flag)\n"
                "call('unshare-time', 272, 0x80)\ncall('clone3', 435, 0, 0)\ncall('files', 272, 0x400)\n"))
            lines = out.splitlines()
            assert lines[:14] == ["clone EPERM", "unshare EPERM"] * 7
            assert lines[14:] == ["unshare-time EPERM", "clone3 ENOSYS", "files ok"]

    run(main())


def test_devices_cannot_be_made_or_opened(tmp_path: Path) -> None:
    """Hole 2: mknod in a /dev without nodev opened /dev/kvm and /dev/net/tun."""
    async def main() -> None:
        async with namespace_box(tmp_path) as b:
            x86(b)
            out = await b.python(CALLS + (
                "for folder in (b'/work', b'/tmp', b'/dev/shm', b'/dev'):\n"
                "  call('mknod', 133, ctypes.c_char_p(folder + b'/kvm'), 0o20666, os.makedev(10, 232))\n"
                "  call('mknodat', 259, -100, ctypes.c_char_p(folder + b'/vda'), 0o60666, os.makedev(254, 0))\n"
                "call('fifo', 133, ctypes.c_char_p(b'/work/fifo'), 0o10666, 0)\n"))
            assert out.split() == ["mknod", "EPERM", "mknodat", "EPERM"] * 4 + ["fifo", "ok"]
            flags = await b.sh("while read a b c d e; do echo $b $d; done < /proc/self/mounts")
            for line in flags.splitlines():
                where, options = line.split()
                if not where.startswith(("/dev/", "/proc/")) or where in ("/dev/shm",):
                    assert "nodev" in options.split(","), line
                if where not in ("/dev/null", "/proc/keys") and not where.startswith("/dev/"):
                    assert "nosuid" in options.split(",") or where.startswith("/proc/"), line
            script = "echo x > /dev/null; head -c 4 /dev/urandom | wc -c; ls /dev/kvm /dev/vda 2>&1 | wc -l"
            assert await b.sh(script) == "4\n2\n"

    run(main())


def test_a_memory_bomb_does_not_kill_pid_1(tmp_path: Path) -> None:
    """Hole 3: the kernel chose pid 1, and the whole sandbox died."""
    async def main() -> None:
        async with namespace_box(tmp_path, memory="64m") as b:
            for _ in range(3):
                status, _, _ = await b.run("/usr/bin/python3", "-I", "-S", "-c", GREED)
                assert status.signal == 9
            await b.sh("head -c 200m /dev/zero > /work/big")  # page cache is given back
            await b.sh("head -c 200m /dev/zero > /dev/shm/big")
            segments = CALLS + ("libc.shmat.restype = ctypes.c_void_p\n"
                                "for i in range(8):\n"
                                "  s = libc.shmget(0, 30 << 20, 0o1600)\n"
                                "  if s < 0: print('no'); break\n"
                                "  ctypes.memset(libc.shmat(s, None, 0), 1, 30 << 20)\n")
            assert await b.python(segments) == "no\n"
            assert await b.sh("echo alive") == "alive\n"
            await b.sh("rm -f /dev/shm/big")
            assert await b.sh("echo alive") == "alive\n"
            assert b.runtime.oom_kills(b.handle) >= 3
            assert (await b.runtime.usage(b.handle)).oom_kills >= 3
            assert str(await b.runtime.recover(b.handle)) == "running"

    run(main())


def test_calls_that_have_opened_sandboxes_are_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_box(tmp_path) as b:
            x86(b)
            calls = {
                "ptrace": (101, 0), "process_vm_readv": (310,), "pidfd_getfd": (438,), "kcmp": (312,),
                "keyctl": (250, 0), "bpf": (321, 0), "perf_event_open": (298,), "userfaultfd": (323,),
                "io_uring_setup": (425, 1), "mount": (165,), "umount2": (166,), "pivot_root": (155,), "setns": (308,),
                "open_tree": (428,), "fsopen": (430,), "move_mount": (429,), "mount_setattr": (442,), "swapon": (167,),
                "reboot": (169,), "kexec_load": (246,), "init_module": (175,), "open_by_handle_at": (304,),
                "acct": (163,), "settimeofday": (164,), "syslog": (103, 3), "sethostname": (170,),
                "personality": (135, 0x0400000 | 0x1000000), "quotactl": (179,),
            }
            script = CALLS + "".join(f"call({name!r}, *{arguments!r})\n" for name, arguments in calls.items())
            assert (await b.python(script)).splitlines() == [f"{name} EPERM" for name in calls]
            kinds = ((17, 3, 0), (40, 1, 0), (16, 3, 15), (16, 3, 16), (38, 5, 0), (16, 3, 0), (1, 1, 0))
            sockets = (f"import socket\nfor f, t, p in {kinds}:\n"
                       "  try: socket.socket(f, t, p); print('ok')\n  except OSError as e: print('no')")
            assert (await b.python(sockets)).split() == ["no"] * 5 + ["ok"] * 2
            terminal = ("import fcntl\ntry: fcntl.ioctl(0, 0x5412, b'x'); print('sent')\n"
                        "except OSError as e: print(e.errno)")
            process = await b.spawn("/usr/bin/python3", "-I", "-S", "-c", terminal, pty=(24, 80))
            assert (await process.wait()).code == 0
            assert os.read(process.stdout, 100).strip() == b"1"
            x32 = await b.run("/usr/bin/python3", "-I", "-S", "-c", CALLS + "call('x32', 0x40000000 | 39)")
            assert x32[1] == b"x32 ENOSYS\n"

    run(main())


def test_kernel_settings_are_out_of_reach(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_box(tmp_path) as b:
            out = await b.sh("for f in /proc/sys/kernel/hostname /proc/sys/kernel/core_pattern "
                             "/proc/sys/vm/overcommit_memory /proc/sysrq-trigger /sys/kernel/uevent_helper "
                             "/proc/sys/net/ipv4/ip_forward; do [ -e $f ] && echo x > $f && echo wrote $f; done "
                             "2>/dev/null; mount -t tmpfs x /tmp 2>/dev/null && echo mounted; "
                             "/usr/sbin/chroot / true && echo chroot; "
                             "date -s 2020-01-01 2>/dev/null >&2 && echo dated; true")
            assert out == "chroot\n"

    run(main())


def test_network_host(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_box(tmp_path, network="host") as b:
            assert os.readlink("/proc/self/ns/net") == (await b.sh("readlink /proc/self/ns/net")).strip()

    run(main())


def test_files_of_the_image_are_shared_and_written_apart(tmp_path: Path) -> None:
    images = HandMade(tmp_path / "image")
    upper = tmp_path / "second"
    (upper / "work").mkdir(parents=True)
    (upper / "work/from-layer").write_text("layer")
    (upper / "data").mkdir()
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("original")
    images.extra = (str(upper),)
    from rock.images.records import Bind
    images.binds = (*images.binds, Bind(str(source), "/data", writable=True, idmap=True))

    async def main() -> None:
        async with namespace_box(tmp_path, images) as b:
            assert await b.sh("cat from-layer; stat -c %u from-layer; cat /data/file") == "layer0\noriginal"
            out = await b.sh("echo changed > from-layer; cat from-layer; echo changed > /data/file && cat /data/file; "
                             "touch /usr/x 2>&1 | grep -o Read-only")
            assert out.splitlines()[0] == "changed"
            assert "Read-only" in out
            if ROOT:
                assert out.splitlines()[1] == "changed"

    run(main())
    assert (upper / "work/from-layer").read_text() == "layer"
    assert (source / "file").read_text() == "original"


def test_its_descriptors_are_not_those_of_pid_1(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_box(tmp_path) as b:
            out = await b.sh("ls -l /proc/self/fd; cat /proc/net/unix 2>/dev/null | grep -c /s$")
            assert "socket" not in out

    run(main())


def test_ranges_of_user_ids_are_apart(tmp_path: Path) -> None:
    async def main() -> None:
        config = SandboxConfig(image="hand", memory="64m", cpus=1, pids=64)
        async with namespace_runtime(tmp_path) as runtime:
            handles = await asyncio.gather(*(runtime.create(f"s{i}", config) for i in range(10)))
            if runtime.isolation == Isolation.NAMESPACES:
                assert len({handle.data["base"] for handle in handles}) == 10
            await asyncio.gather(*(runtime.destroy(handle) for handle in handles))

    run(main())


def test_many_layers(tmp_path: Path) -> None:
    images = HandMade(tmp_path / "image")
    layers = []
    for number in range(60):
        layer = tmp_path / f"a-rather-long-name-of-a-layer-folder-that-fills-the-option-string-{number:03}"
        (layer / "work").mkdir(parents=True)
        (layer / "work" / f"file{number}").write_text(str(number))
        layers.append(str(layer))
    images.extra = tuple(layers)

    async def main() -> None:
        async with namespace_box(tmp_path, images) as b:
            assert await b.sh("ls /work | wc -l; cat /work/file59") == "60\n59"

    run(main())


def test_requests_that_cannot_be_met(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_runtime(tmp_path) as runtime:
            def config(**values: object) -> SandboxConfig:
                return SandboxConfig(**{"image": "hand", "memory": "64m", "cpus": 1, **values})

            for values, kind, text in (
                ({"cpus": 1000}, errors.InvalidConfig, "Requested CPUs 1000.0 exceed"),
                ({"memory": "90t"}, errors.InvalidConfig, "90t"),
                ({"disk": "1g", "auto_delete_seconds": 60}, errors.Unsupported, "disk"),
                ({"num_gpus": 1}, errors.Unsupported, "accelerators"),
                ({"use_kata_runtime": True}, errors.Unsupported, "kata"),
                ({"image_os": "windows"}, errors.Unsupported, "windows"),
                ({"minimum_isolation": "microvm"}, errors.Unsupported, "microvm"),
                ({"image": "absent"}, errors.ImageError, "absent"),
            ):
                with pytest.raises(kind, match=text):
                    await runtime.check(config(**values))
                with pytest.raises(kind):
                    await runtime.create("x", config(**values))
            await runtime.check(config(minimum_isolation=runtime.isolation))
            assert list((tmp_path / "run").glob("n-*")) == []

    run(main())


def test_a_broken_image_leaves_nothing(tmp_path: Path) -> None:
    from rock.images.records import Bind

    images = HandMade(tmp_path / "image")

    async def main() -> None:
        async with namespace_runtime(tmp_path, images=images) as runtime:
            launcher = runtime._slots.launcher.pid
            images.binds = (Bind("/no/such/source", "/usr"),)
            with pytest.raises(errors.StartFailed, match="/no/such/source"):
                await runtime.create("x", SandboxConfig(image="hand", memory="64m", cpus=1))
            images.binds = ()
            images.extra = ("/no/such/layer",)
            with pytest.raises(errors.StartFailed, match="no/such/layer"):
                await runtime.create("x", SandboxConfig(image="hand", memory="64m", cpus=1))
            assert list((tmp_path / "run").glob("n-*")) == []
            assert runtime._slots.launcher.pid == launcher  # it was not taken for the broken sandbox's pid 1

    run(main())


def test_pool(tmp_path: Path) -> None:
    async def main() -> None:
        config = SandboxConfig(image="hand", memory="64m", cpus=1, pids=64, env={"A": "1"})
        async with namespace_runtime(tmp_path, pool=2) as runtime:
            first = await runtime.create("first", config)
            await until(lambda: runtime._pool.ready == 2)
            slots = {path.name for path in (tmp_path / "run").glob("n-*")}
            second = await runtime.create("second", config)
            assert second.data["slot"] in slots  # it was there already
            box = Box(runtime, second, Path("/work"))
            assert await box.sh("echo $A", env={}) == "1\n"
            status, _, _ = await box.run("/usr/bin/python3", "-I", "-S", "-c", GREED)
            assert status.signal == 9
            await until(lambda: runtime._pool.ready == 2)
            for member in runtime._pool.members():
                os.kill(member.pid, 9)  # dead members are never given out
            await asyncio.sleep(1.0)
            third = await runtime.create("third", config)
            assert await Box(runtime, third, Path("/work")).sh("echo fine") == "fine\n"
            box.close()
            await asyncio.gather(*(runtime.destroy(handle) for handle in (first, second, third)))
        assert list((tmp_path / "run").glob("n-*")) == []

    run(main())


def test_closing_while_the_pool_is_filled_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        config = SandboxConfig(image="hand", memory="64m", cpus=1, pids=64)
        for delay in (0.0, 0.03, 0.035, 0.038, 0.04, 0.042, 0.045, 0.05, 0.06):
            async with namespace_runtime(tmp_path, pool=3) as runtime:
                handle = await runtime.create("one", config)
                await asyncio.sleep(delay)
                await runtime.destroy(handle)
            assert list((tmp_path / "run").glob("n-*")) == []

    run(main())


def test_a_network_namespace_is_used_again_only_when_it_was_never_used(tmp_path: Path) -> None:
    touch = ("import socket; s = socket.socket(); s.bind(('127.0.0.1', 5001)); s.listen(); "
             "c = socket.create_connection(s.getsockname()); s.accept(); print('touched')")

    async def one(runtime: NamespaceRuntime, name: str, *, use: bool) -> str:
        handle = await runtime.create(name, SandboxConfig(image="hand", memory="128m", cpus=1.0))
        b = Box(runtime, handle, Path("/"))
        seen = await b.sh("readlink /proc/self/ns/net; ls /sys/class/net 2>/dev/null | xargs")
        assert seen.split()[1:] in (["lo"], []), "of the host's devices nothing may be seen"
        if use:
            assert await b.python(touch) == "touched\n"
        await runtime.destroy(handle)
        return seen.split()[0]

    async def main() -> None:
        async with namespace_runtime(tmp_path) as runtime:
            first = await one(runtime, "one", use=False)
            if runtime.isolation != Isolation.NAMESPACES:
                return  # an ordinary user makes a new one each time
            assert await one(runtime, "two", use=False) == first
            assert await one(runtime, "three", use=True) == first
            assert await one(runtime, "four", use=False) != first
            # a port rests for a minute after its use; not so in the next sandbox
            for name in ("five", "six"):
                await one(runtime, name, use=True)

    run(main())
