"""Sandboxes as containers: their state, and their fields in the form of Docker.

The label `rock.docker` of a sandbox records what Docker stores of a container and ROCK does not: the command line, the
working directory, the user, and the background process that is its main program.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

from rock.cli.connection import new_sandbox
from rock.cli.docker.flags import Refused
from rock.cli.output import short
from rock.errors import InvalidConfig, NotFound, RockError
from rock.protocol.action import ProcessInfo
from rock.protocol.sandbox import Cause, SandboxInfo, State, parse_size
from rock.sync import Client, Sandbox
from rock.sync.primitives import gather

LABEL = "rock.docker"
LIVING = "pending,running,stopping"
KILLED = 137
_MISSING = "no such container"
_LIST = "`docker ps -a` lists the containers"
_LONGEST = 4096  # characters of a recorded command line
_ENDED = (State.STOPPED, State.ARCHIVING, State.ARCHIVED)


@dataclass
class Record:
    """What the label holds. process: id of the main program, for `run -d`. code: its exit code, once it is known."""

    argv: list[str] = field(default_factory=list)
    workdir: str | None = None
    user: str | None = None
    remove: bool = False
    tty: bool = False
    process: str | None = None
    code: int | None = None

    @classmethod
    def of(cls, info: SandboxInfo) -> Record:
        """The record of a sandbox; an empty one for a sandbox that another client created. Labels are not trusted."""
        try:
            found = json.loads(info.labels.get(LABEL, "{}"))
            record = cls(**{name: found[name] for name in asdict(cls()) if name in found})
        except (ValueError, TypeError):
            return cls()
        words = record.argv if isinstance(record.argv, list) else []
        code = record.code if isinstance(record.code, int) else None
        texts = [value if isinstance(value, str) else None for value in (record.workdir, record.user, record.process)]
        return cls([str(word) for word in words], texts[0], texts[1], record.remove is True, record.tty is True,
                   texts[2], code)  # fmt: skip

    def labels(self, own: dict[str, str]) -> dict[str, str]:
        """The labels of a sandbox with this record."""
        words = self.argv if sum(map(len, self.argv)) <= _LONGEST else [*(word[:200] for word in self.argv[:3]), "..."]
        return {**own, LABEL: json.dumps({**asdict(self), "argv": words})}


@dataclass
class Container:
    """A sandbox and its main program. process: None where it has no main program."""

    info: SandboxInfo
    record: Record
    process: ProcessInfo | None = None

    @property
    def id(self) -> str:
        return self.info.sandbox_id

    @property
    def name(self) -> str:
        return self.info.name or short(self.id)

    @property
    def status(self) -> str:
        """The state in Docker's words."""
        if self.info.state is State.PENDING:
            return "created"
        if self.info.state is State.STOPPING:
            return "removing" if self.record.remove else "running"
        if self.info.state in _ENDED:
            return "exited"
        if self.info.state is not State.RUNNING:
            return "dead"
        if self.process is not None and not self.process.running:
            return "exited"
        return "paused" if self.info.paused_at else "running"

    @property
    def code(self) -> int:
        if self.status != "exited":
            return 0
        if self.process is not None and not self.process.running:
            return code_of(self.process)
        if self.record.code is not None:
            return self.record.code
        if self.info.exit_code is not None:
            return self.info.exit_code
        return KILLED

    @property
    def began(self) -> float:
        return self.info.started_at or self.info.created_at

    @property
    def ended(self) -> float | None:
        if self.process is not None and self.process.ended_at:
            return self.process.ended_at
        return self.info.stopped_at


def refusal(error: RockError) -> str:
    """An error of the server as Docker prints those of its daemon."""
    text = error.message or type(error).__name__
    if text.startswith(_MISSING):
        text = text[:1].upper() + text[1:]
    return f"Error response from daemon: {text}"


def code_of(end: Any) -> int:
    """The exit code of an ended program: 128 and the number for a signal."""
    if end.signal is not None:
        return 128 + int(end.signal)
    return KILLED if end.exit_code is None else int(end.exit_code)


def find(server: Client, text: str) -> Container:
    """The container with this id, name, or beginning of an id; those that run come first. NotFound, InvalidConfig."""
    try:
        return filled(server, server.get_sandbox(text))
    except (NotFound, InvalidConfig) as error:
        if isinstance(error, InvalidConfig) and not text:
            raise NotFound("no such container: an empty name", hint=_LIST) from None
    for states in (LIVING, None):
        known = [info for info in server.list_sandboxes(states) if info.state is not State.DELETED]
        found = [info for info in known if info.name == text][:1] or [
            info for info in known if info.sandbox_id.startswith(text)]  # fmt: skip
        if len(found) > 1:
            raise InvalidConfig(f"multiple IDs found with provided prefix: {text}", hint="write more digits of the id")
        if found:
            return filled(server, found[0])
    raise NotFound(f"no such container: {text}", hint=_LIST)


def filled(server: Client, info: SandboxInfo) -> Container:
    """A container of a sandbox, with the state of its main program."""
    if info.state is State.DELETED:
        raise NotFound(f"no such container: {info.sandbox_id}", hint=_LIST)
    container = Container(info, Record.of(info))
    if container.record.process and info.state is State.RUNNING and not info.paused_at:
        try:
            container.process = attached(info).processes.get(container.record.process).info
        except RockError:
            container.process = None
    return container


def listed(server: Client, states: str | None) -> list[Container]:
    """Containers, newest first. A sandbox that never started is no container."""
    known = [info for info in server.list_sandboxes(states)
             if info.state is not State.DELETED and info.cause is not Cause.START_FAILED]  # fmt: skip
    found = gather([partial(filled, server, info) for info in known], 16)
    return [one for one in found if isinstance(one, Container)]


def attached(info: SandboxInfo) -> Sandbox:
    """The sandbox of a record, without a request."""
    sandbox = new_sandbox(info.image)
    sandbox.sandbox_id = info.sandbox_id
    return sandbox


def running(container: Container, text: str) -> Sandbox:
    """The sandbox of a container that runs. Refused."""
    if container.status == "running":
        return attached(container.info)
    if container.status == "paused":
        raise Refused(f"Error response from daemon: container {text} is paused, unpause the container before exec", 1)
    raise Refused(f"Error response from daemon: container {container.id} is not running", 1)


# ---- the forms of `ps` and `inspect`


def timestamp(seconds: float | None) -> str:
    if not seconds:
        return "0001-01-01T00:00:00Z"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def duration(seconds: float) -> str:
    """A duration in words, as Docker prints it."""
    if seconds < 1:
        return "Less than a second"
    for limit, unit, word in ((60, 1, "second"), (3600, 60, "minute"), (172_800, 3600, "hour"),
                              (1_209_600, 86_400, "day"), (5_184_000, 604_800, "week"),
                              (63_072_000, 2_592_000, "month")):  # fmt: skip
        if seconds < limit:
            count = int(seconds // unit)
            if count == 1 and word in ("minute", "hour"):
                return "About a minute" if word == "minute" else "About an hour"
            return f"{count} {word}{'s' * (count != 1)}"
    return f"{int(seconds // 31_536_000)} years"


def own_labels(info: SandboxInfo) -> dict[str, str]:
    return {name: value for name, value in info.labels.items() if name != LABEL}


def row(container: Container, whole: bool) -> dict[str, Any]:
    """The fields of `docker ps --format`."""
    info, now = container.info, time.time()
    line = json.dumps(" ".join(container.record.argv), ensure_ascii=False)[1:-1] if container.record.argv else ""
    if not whole and len(line) > 20:
        line = line[:19] + "…"
    status = container.status
    if status == "exited":
        words = f"Exited ({container.code}) {duration(now - (container.ended or now))} ago"
    elif status in ("running", "paused"):
        words = f"Up {duration(now - container.began)}{' (Paused)' * (status == 'paused')}"
    else:
        words = status.capitalize()
    labels = own_labels(info)
    return {
        "ID": info.sandbox_id if whole else short(info.sandbox_id), "Image": info.image, "Command": f'"{line}"',
        "CreatedAt": datetime.fromtimestamp(info.created_at, UTC).strftime("%Y-%m-%d %H:%M:%S +0000 UTC"),
        "CreatedFor": f"{duration(now - info.created_at)} ago", "RunningFor": f"{duration(now - info.created_at)} ago",
        "Ports": "", "State": status, "Status": words, "Names": container.name, "Networks": info.network,
        "Labels": ",".join(f"{name}={value}" for name, value in sorted(labels.items())), "Mounts": "",
        "LocalVolumes": "0", "Size": "0B",
    }  # fmt: skip


def document(container: Container) -> dict[str, Any]:
    """The document of `docker inspect`, in Docker's structure. It has the fields that ROCK knows."""
    info, record, status = container.info, container.record, container.status
    words = record.argv
    ended = container.ended if status == "exited" else None
    return {
        "Id": info.sandbox_id,
        "Created": timestamp(info.created_at),
        "Path": words[0] if words else "",
        "Args": words[1:],
        "State": {
            "Status": status, "Running": status in ("running", "paused"), "Paused": status == "paused",
            "Restarting": False, "OOMKilled": info.cause is Cause.OUT_OF_MEMORY, "Dead": status == "dead",
            "Pid": container.process.pid if container.process and container.process.running else 0,
            "ExitCode": container.code, "Error": (info.reason or "") if info.cause is Cause.START_FAILED else "",
            "StartedAt": timestamp(info.started_at), "FinishedAt": timestamp(ended),
        },
        "Image": info.image,
        "Name": f"/{container.name}",
        "RestartCount": 0,
        "Platform": "linux",
        "Mounts": [],
        "HostConfig": {
            "NetworkMode": info.network, "AutoRemove": record.remove, "NanoCpus": int(info.cpus * 1e9),
            "Memory": _bytes(info.memory), "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
        },
        "Config": {
            "Hostname": info.host_name or "", "User": record.user or "", "Tty": record.tty, "Cmd": words,
            "Image": info.image, "WorkingDir": record.workdir or "", "Labels": own_labels(info),
        },
        "NetworkSettings": {"IPAddress": "", "Ports": {}},
        "Rock": {"State": info.state.value, "Cause": info.cause.value if info.cause else None,
                 "Isolation": info.isolation.value if info.isolation else None, "Runtime": info.runtime,
                 "Worker": info.worker},
    }  # fmt: skip


def _bytes(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError:
        return 0


# ---- filters of `ps`


def chosen(filters: Sequence[str]) -> Callable[[Container], bool]:
    """A test of all filters. Docker joins filters of one key by "or", and different keys by "and". Refused."""
    tests: dict[str, list[Callable[[Container], bool]]] = {}
    for text in filters:
        key, equals, value = text.partition("=")
        if not equals or key not in _FILTERS:
            raise Refused(f"invalid filter '{key}'", hint=f"ROCK supports the filters {', '.join(_FILTERS)}")
        test = partial(_FILTERS[key], value)
        # labels are joined by "and"
        tests.setdefault(text if key == "label" else key, []).append(test)
    return lambda container: all(any(test(container) for test in group) for group in tests.values())


def _labeled(value: str, container: Container) -> bool:
    name, equals, wanted = value.partition("=")
    labels = own_labels(container.info)
    return name in labels and (not equals or labels[name] == wanted)


def _of_image(value: str, container: Container) -> bool:
    image = container.info.image
    return image == value or (":" not in value and image.partition(":")[0] == value)


_FILTERS: dict[str, Callable[[str, Container], bool]] = {
    "id": lambda value, container: container.id.startswith(value),
    "name": lambda value, container: value.lstrip("/^").rstrip("$") in container.name,
    "label": _labeled,
    "status": lambda value, container: container.status == value,
    "ancestor": _of_image,
    "exited": lambda value, container: container.status == "exited" and str(container.code) == value,
}
