"""What a pod gives the sandboxes inside it: the level A to E, why not a higher one, and the YAML that would change it.

    A  namespaces    a user namespace of the pod (hostUsers: false), capabilities in it, an unmasked /proc
    B  userns        an ordinary user who may create user namespaces; an unmasked /proc
    C  namespaces    privileged: root of the node
    D  landlock      root without capabilities that matter: no namespaces, no ports
    E  process       the wall of the container's runtime class (gVisor, Kata), or none

The level is found by probes. docs/guides/kubernetes.md has the table, generated from `LEVELS`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rock.runtime.namespace.launcher import userns
from rock.runtime.namespace.probe import Finding, host_report, masked_proc

_ALL_IDS = 1 << 31
_SYS_ADMIN, _NET_ADMIN = 21, 12


@dataclass(frozen=True)
class Level:
    """gives: what sandboxes have. pod: the lines of the pod's YAML. admission: the level of pod security admission."""

    name: str
    runtime: str
    gives: str
    pod: str
    admission: str


LEVELS = (
    Level("A", "namespace", "namespaces and a system call filter of their own; root inside has no rights on the node; "
          "1023 user ids each where idmapped mounts work, else one", "hostUsers: false, procMount: Unmasked, "
          "capabilities, seccompProfile, appArmorProfile: Unconfined", "privileged"),
    Level("B", "namespace", "the same, with one user id each; network nat only where the node's kernel has its modules",
          "runAsUser: 1000, procMount: Unmasked, seccompProfile, appArmorProfile: Unconfined", "privileged"),
    Level("C", "namespace", "everything, with cgroups and disk limits; a sandbox that breaks out is root of the node",
          "privileged: true", "privileged"),
    Level("D", "landlock", "files and system calls restricted; no namespaces and no ports",
          "none: the default pod, as root", "baseline"),
    Level("E", "process", "what the container's runtime isolates, as gVisor and Kata do; one sandbox for each pod",
          "runtimeClassName, mode: pod", "restricted"),
)  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What was probed. ids: of the user namespace. working: names of probes that succeeded. capabilities: effective."""

    uid: int
    ids: int
    working: frozenset[str]
    capabilities: int = 0

    @property
    def in_user_namespace(self) -> bool:
        return self.ids < _ALL_IDS

    def has(self, capability: int) -> bool:
        return bool(self.capabilities >> capability & 1)


def level_of(facts: Facts) -> str:
    """The level that the pod gives now. Pure."""
    namespaces = {"user namespaces", "overlay file system", "a /proc of its own"} <= facts.working
    if namespaces and facts.uid == 0 and facts.has(_SYS_ADMIN):
        return "A" if facts.in_user_namespace else "C"
    if namespaces:
        return "B"
    if "landlock" in facts.working and facts.uid == 0:
        return "D"
    return "E"


def advice(facts: Facts) -> list[tuple[str, str]]:
    """What keeps the pod from level A: (the reason, the YAML that changes it). Pure."""
    found: list[tuple[str, str]] = []
    if not facts.in_user_namespace and facts.uid == 0:
        found.append(("root of the container is root of the node", "spec: {hostUsers: false}"))
    if facts.uid != 0:
        found.append((f"the container runs as user {facts.uid}",
                      "spec: {hostUsers: false}, securityContext: {runAsUser: 0}"))
    if "user namespaces" not in facts.working:
        found.append(("no user namespace can be created",
                      "securityContext: {seccompProfile: {type: Unconfined}, appArmorProfile: {type: Unconfined}}"))
    if "a /proc of its own" not in facts.working:
        found.append(("/proc is masked", "securityContext: {procMount: Unmasked} (needs hostUsers: false)"))
    if "overlay file system" not in facts.working:
        found.append(("ROCK_HOME is on the container's own file system, on which there is no overlay",
                      "volumes: [{name: home, emptyDir: {}}], mounted at ROCK_HOME"))
    if facts.uid == 0 and not facts.has(_SYS_ADMIN):
        found.append(("the container has no CAP_SYS_ADMIN in its user namespace",
                      "securityContext: {capabilities: {add: [SYS_ADMIN, NET_ADMIN, SETUID, SETGID, SETPCAP, CHOWN, "
                      "DAC_OVERRIDE, FOWNER, KILL, MKNOD, SYS_CHROOT, SYS_PTRACE]}}"))  # fmt: skip
    return found


def report(run_dir: Path | None = None, host: Callable[[Path | None], list[Finding]] = host_report) -> list[Finding]:
    """The level of this pod, and limits that a pod adds; blocks for about a second."""
    probed = {finding.name: finding for finding in host(run_dir)}
    with tempfile.TemporaryDirectory(prefix="rock-pod-") as folder:
        nested = masked_proc(Path(folder))
    probed[nested.name] = nested
    facts = Facts(os.geteuid(), _ids(), frozenset(name for name, one in probed.items() if one.ok), _capabilities())
    name = level_of(facts)
    level = next(one for one in LEVELS if one.name == name)
    found = [Finding("level", name in ("A", "B", "D") or None, f"{name}: runtime {level.runtime}; {level.gives}")]
    if name != "A":
        found += [Finding("for level A", None, f"{why} -> {yaml}") for why, yaml in advice(facts)]
    elif "idmapped layers" not in facts.working:
        found.append(Finding("user ids", None, "idmapped mounts are refused on the file system of ROCK_HOME, which the "
                             "node has mounted: sandboxes have one user id each"))  # fmt: skip
    else:
        ids = userns.IDS
        found.append(Finding("user ids", True, f"{ids.size - 1} for each of {ids.most} sandboxes at most; more with "
                             "userNamespaces.idsPerPod of the kubelet"))  # fmt: skip
    return [*found, *_limits(Path("/sys/fs/cgroup"), probed)]


def _limits(cgroup: Path, probed: Mapping[str, Finding]) -> list[Finding]:
    """What the container's own cgroup limits."""
    found = []
    group = _read(cgroup / "memory.oom.group")
    if group == "1":
        found.append(Finding("memory.oom.group", False, "1: one sandbox that runs out of memory ends the whole worker",
                             "kubelet: singleProcessOOMKill: true (Kubernetes 1.32)"))  # fmt: skip
    elif group:
        found.append(Finding("memory.oom.group", True, "0: the kernel ends single processes"))
    limit = _read(cgroup / "memory.max")
    if limit:
        found.append(Finding("memory.max", None, f"{limit}: of all sandboxes and the rocklet together"))
    pids = _read(cgroup / "pids.max")
    if pids:
        few = pids.isdigit() and int(pids) < 4096
        found.append(Finding("pids.max", False if few else None, f"{pids}: of all sandboxes together",
                             "kubelet: podPidsLimit: -1, or a larger number"))  # fmt: skip
    memory = probed.get("cgroup memory")
    if memory is not None and not memory.ok:
        found.append(Finding("limits of sandboxes", None, "memory is watched, CPUs by affinity, pids by rlimit: the "
                             "cgroup of the container is read-only (containerd 2.1: cgroup_writable)"))  # fmt: skip
    return found


def _ids() -> int:
    try:
        return userns.available(Path("/proc/self/uid_map").read_text())
    except (OSError, ValueError):
        return _ALL_IDS


def _capabilities() -> int:
    for line in _read(Path("/proc/self/status")).splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def table() -> str:
    """The levels as a Markdown table."""
    rows = ["| level | runtime | a sandbox has | lines of the pod | admission |", "|---|---|---|---|---|"]
    rows += [f"| {one.name} | {one.runtime} | {one.gives} | {one.pod} | {one.admission} |" for one in LEVELS]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())  # noqa: T201 - for docs/guides/kubernetes.md
