"""Probes the host for `rock doctor`: tests which features are available and lists missing ones."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from rock.guest.init import native
from rock.host import resources
from rock.runtime.namespace.launcher import seccomp
from rock.runtime.namespace.limits import cgroups, disk_layout

_TRY = """
import os, sys, types
package = types.ModuleType("rock")
package.__path__ = [sys.argv[1]]
sys.modules["rock"] = package
from rock.runtime.namespace.launcher import kernel, userns
what, folder = sys.argv[2], sys.argv[3]
root = os.geteuid() == 0
try:
    if what in ("userns", "nested proc") or not root:
        userns.become_root(kernel.CLONE_NEWNS)
    else:
        kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_SLAVE)
    if what in ("overlay", "idmap"):
        for name in ("rw", "low", "rw/up", "rw/work", "m", "l"):
            os.mkdir(folder + "/" + name)
        os.chdir(folder)
        low = "low"
        if what == "idmap":
            base = userns.IDS.first
            fd = userns.make(userns.IDS.lines(base), userns.IDS.lines(base))
            for source, target in (("low", "l"), ("rw", "rw")):
                tree = kernel.open_tree(source)
                kernel.set_attributes(tree, 0, userns=fd)
                kernel.move_mount(tree, target)
            low = "l"
            kernel.set_file_owner(base)
            kernel.capset((1 << 41) - 1 & int(open("/proc/self/status").read().split("CapPrm:")[1].split()[0], 16))
        kernel.mount("overlay", "m", "overlay", 0, "lowerdir=%s,upperdir=rw/up,workdir=rw/work%s" % (
            low, "" if root else ",userxattr"))
        open("m/file", "w").close()
    if what == "nat":
        from rock.runtime.namespace.launcher import isolated_network
        kernel.unshare(kernel.CLONE_NEWNET)
        isolated_network.furnish("0 0")
    if what in ("proc", "net", "nested proc"):
        pid = kernel.fork_into(kernel.CLONE_NEWPID | kernel.CLONE_NEWNS | (kernel.CLONE_NEWNET if what == "net" else 0))
        if pid == 0:
            try:
                if what == "net":
                    kernel.loopback_up()
                else:
                    kernel.mount("proc", "/proc", "proc", 0)
            except OSError as error:
                sys.stderr.write(str(error))
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
except OSError as error:
    sys.stderr.write(str(error))
    sys.exit(1)
"""


@dataclass(frozen=True)
class Finding:
    """One line of a report. ok: None is neutral. hint: the remedy when it is not ok."""

    name: str
    ok: bool | None
    detail: str
    hint: str = ""


def host_report(run_dir: Path | None = None) -> list[Finding]:
    """The features of this host, each tested; blocks for about a second. `run_dir`: the folder of sandboxes."""
    base = Path(run_dir or tempfile.gettempdir())
    while not base.is_dir():
        base = base.parent
    report = [
        Finding("python", sys.version_info >= (3, 11), platform.python_version(), "Python 3.11 or newer is needed"),
        Finding("kernel", _release() >= (5, 12), platform.release(), "Linux 5.12 or newer is needed, 5.19 as root"),
        Finding("user", None, "root" if os.geteuid() == 0 else f"uid {os.geteuid()}"),
        _native(),
        _open_files(),
    ]
    for what, name, hint in (
        ("userns", "user namespaces", "see kernel.unprivileged_userns_clone, user.max_user_namespaces and, on Ubuntu, "
                                      "kernel.apparmor_restrict_unprivileged_userns in sysctl"),
        ("overlay", "overlay file system", "Linux 5.11 is needed for it in a user namespace"),
        ("proc", "a /proc of its own", "a container with a masked /proc forbids it: run with systempaths=unconfined"),
        ("net", "network namespaces", "see user.max_net_namespaces in sysctl"),
    ):
        report.append(_tried(what, name, hint, base))
    nat = _tried("nat", "network nat", "a kernel with nf_tables, nft_tproxy and nft_reject is needed for it", base)
    report.append(nat if nat.ok else replace(nat, ok=None, detail=f"{nat.detail}; sandboxes cannot have it"))
    if os.geteuid() == 0:
        hint = f"the file system of {base} must support them (ext4, xfs, btrfs, tmpfs of 6.3), with Linux 5.19"
        report.append(_tried("idmap", "idmapped layers", hint, base))
    report += [*_cgroup_findings(str(base)), _seccomp(), _landlock(base), _gvisor(base), _forks(base), _disk(), _kvm(),
               *_microvms()]  # fmt: skip
    report.append(_program("newuidmap", "one user inside without it, when not root"))
    return report


def _release() -> tuple[int, int]:
    parts = platform.release().split("-")[0].split(".")
    return int(parts[0]), int(parts[1])


def masked_proc(base: Path) -> Finding:
    """Whether a sandbox in a user namespace of its own gets a /proc, as root of a container too: the kernel refuses
    that when anything is mounted over the container's."""
    return _tried("nested proc", "a /proc of its own", "securityContext: {procMount: Unmasked}", base)


def _tried(what: str, name: str, hint: str, base: Path) -> Finding:
    import subprocess

    source = str(Path(__file__).parents[2])
    try:
        with tempfile.TemporaryDirectory(dir=base, prefix="rock-probe-", ignore_cleanup_errors=True) as folder:
            run = subprocess.run([sys.executable, "-I", "-S", "-c", _TRY, source, what, folder], capture_output=True,
                                 text=True, timeout=20, check=False)
            # overlay leaves files of mode 000 in its work folder
            for inner in Path(folder).glob("rw/work/*"):
                inner.chmod(0o700)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(name, False, str(error), hint)
    if run.returncode == 0:
        return Finding(name, True, "works")
    return Finding(name, False, run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "it was killed", hint)


def _cgroup_findings(base: str) -> list[Finding]:
    found = cgroups.discover(base)
    report = []
    for name, otherwise in (("memory", "watched by the server"), ("cpu", "by affinity"), ("pids", "by rlimit")):
        version = found.version(name)
        if version:
            report.append(Finding(f"cgroup {name}", True, f"version {version}: {found.places[name].parent}"))
        else:
            report.append(Finding(f"cgroup {name}", None, f"{found.reasons.get(name, 'none')}; held {otherwise}",
                                  "run as root, or with a delegated cgroup"))
    for place in found.places.values():
        try:
            os.rmdir(place.parent)
        except OSError:
            pass
    return report


def _open_files() -> Finding:
    """The hard limit, to which a server raises its own one."""
    files = resources.open_files(hard=True)
    if files is None:
        return Finding("open files", True, "no limit")
    most, memory = resources.within(files), resources.read()[0] // resources.MEMORY_EACH
    text = f"{files}: {most} sandboxes with sessions at most"
    hint = f"the memory suffices for {memory}: raise the hard limit (ulimit -Hn, LimitNOFILE of systemd) for more"
    return Finding("open files", True if most >= memory else None, text, "" if most >= memory else hint)


def _native() -> Finding:
    """Whether the compiled functions are used. Without them starts are slower and take more memory."""
    if native.library is not None:
        return Finding("native", True, f"compiled: {native.library.path}")
    if platform.machine() in native.MACHINES:
        hint = "install a C compiler (gcc or clang), then install ROCK again (in a checkout: pip install -e .)"
    else:
        hint = "nothing to do: all works, with slower starts and more memory"
    return Finding("native", None, f"fork fallback: {native.missing}; {hint}", hint)


def _seccomp() -> Finding:
    known = seccomp.supported()
    text = cgroups.read_text("/proc/sys/kernel/seccomp/actions_avail").strip()
    return Finding("seccomp", bool(text) and known, f"{text or 'not in this kernel'}; {platform.machine()} "
                                                     f"{'has' if known else 'has no'} table",
                   "x86_64 or aarch64 with seccomp is needed for the system call filter")


def _landlock(base: Path) -> Finding:
    """Whether `isolation="landlock"` works, by creating such a sandbox."""
    from rock.errors import Unsupported
    from rock.runtime.landlock import ruleset
    from rock.runtime.landlock.runtime import LandlockRuntime

    async def attempt(folder: str) -> None:
        runtime = LandlockRuntime(Path(folder))
        await runtime.open()
        try:
            await runtime.probe()
        finally:
            await runtime.close()

    version = ruleset.version()
    if version == 0:
        return Finding("landlock", None, "not in this kernel, or switched off")
    try:
        with tempfile.TemporaryDirectory(dir=base, prefix="rock-probe-", ignore_cleanup_errors=True) as folder:
            asyncio.run(attempt(folder))
    except (Unsupported, OSError) as error:
        return Finding("landlock", None, f"version {version}; {error}")
    return Finding("landlock", True, f'version {version}; isolation="landlock" works')


def _gvisor(base: Path) -> Finding:
    """Whether `isolation="gvisor"` works, by creating such a sandbox."""
    from rock.errors import Unsupported
    from rock.images.store import ImageStore
    from rock.runtime.gvisor.runtime import GvisorRuntime

    async def attempt(folder: Path) -> None:
        runtime = GvisorRuntime(folder / "run", folder / "guest-python", ImageStore(folder / "images"))
        await runtime.open()
        try:
            await runtime.probe()
        finally:
            await runtime.close()

    path = shutil.which("runsc")
    if path is None:
        return Finding("gvisor", None, "runsc is not installed; apt install runsc gives isolation=\"gvisor\"")
    try:
        with tempfile.TemporaryDirectory(dir=base, prefix="rock-probe-", ignore_cleanup_errors=True) as folder:
            asyncio.run(attempt(Path(folder)))
    except (Unsupported, OSError) as error:
        return Finding("gvisor", None, f"{path}; {error}")
    return Finding("gvisor", True, f'{path}; isolation="gvisor" works')


def _forks(base: Path) -> Finding:
    """What a fork of a running sandbox copies here, by such a fork."""
    from rock.runtime.namespace import fork_probe

    with tempfile.TemporaryDirectory(dir=base, prefix="rock-probe-", ignore_cleanup_errors=True) as folder:
        reason = asyncio.run(fork_probe.why_not(Path(folder)))
    if reason:
        return Finding("forks", None, f"files and sessions; no processes: {reason}")
    return Finding("forks", True, "files, sessions and processes")


def _disk() -> Finding:
    """The mechanism of a disk limit."""
    if os.geteuid() == 0 and shutil.which("mke2fs", path=disk_layout.PATH) and os.path.exists("/dev/loop-control"):
        return Finding("disk limits", None, "by files and loop devices; the first sandbox with disk= proves it")
    return Finding("disk limits", None, "in memory (tmpfs), for at most half of it; "
                                        "root with mke2fs and /dev/loop-control would have files")


def _microvms() -> list[Finding]:
    """MicroVM engines, each tested by a boot where it is installed."""
    from concurrent.futures import ThreadPoolExecutor

    from rock.host import microvm

    with ThreadPoolExecutor(len(microvm.ENGINES)) as pool:
        return [Finding(f"microVM {boot.engine}", boot.ok or None, boot.detail)
                for boot in pool.map(microvm.try_engine, microvm.ENGINES)]


def _kvm() -> Finding:
    if not os.path.exists("/dev/kvm"):
        return Finding("kvm", None, "no /dev/kvm")
    access = "can be opened" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "cannot be opened by this user"
    return Finding("kvm", None, f"/dev/kvm is there and {access}; only a boot would prove that it works")


def _program(name: str, use: str) -> Finding:
    path = shutil.which(name)
    return Finding(name, None, path or f"not installed; {use}")
