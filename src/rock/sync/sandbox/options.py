# GENERATED from src/rock/sdk/sandbox/options.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""The options of the SDK as typed keywords, and their one table of fields on the wire."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, BinaryIO, Literal, TypedDict, TypeVar, cast

from rock import errors
from rock.protocol.sandbox import BaseConfig, Isolation, SandboxConfig, SandboxGroupConfig
from rock.protocol.wire import InvalidValue

C = TypeVar("C", bound=SandboxConfig)

IsolationLevel = (
    Isolation
    | Literal["none", "landlock", "userns-shared-proc", "userns", "namespaces", "container", "gvisor", "microvm"]
)
# Standard input: str is sent as UTF-8. A binary file and an iterator are read while the program runs.
Stdin = bytes | str | BinaryIO | Iterable[bytes | str] | Iterable[bytes | str]


class ConnectOptions(TypedDict, total=False):
    """How to reach the server.

    base_url: URL of the server; ROCK_BASE_URL by default.
    api_key: API key; ROCK_API_KEY by default.
    extra_headers: headers of every request.
    xrl_authorization: value of ROCK's header of this name.
    reconnect_timeout: seconds for which a request is retried while the server is unavailable; None is
    ROCK_RECONNECT_TIMEOUT, 0 disables retries.
    """

    base_url: str
    api_key: str | None
    extra_headers: dict[str, str]
    xrl_authorization: str | None
    reconnect_timeout: float | None


class SandboxOptions(ConnectOptions, total=False):
    """Options of a new sandbox, beside those of `ConnectOptions`.

    memory: memory limit: "512m", "8g" (powers of 1024), or an int in bytes. Default "8g".
    cpus: CPUs, which other sandboxes may use while this one is idle. Default 2. limit_cpus: hard limit of CPUs.
    pids: maximum number of processes and threads. Default 4096.
    disk: size limit of written files, like `memory`; None is no limit. inodes: maximum number of files, with `disk`.
    nofile: maximum number of open files of a process. shm_size: size of /dev/shm, like `memory`.
    gpus: number of GPUs. gpu_type: model of the GPUs.
    idle_timeout: seconds without a request after which the sandbox stops; 0 is never. Default 300.
    max_lifetime: seconds from its start after which the sandbox stops in any case; None is never. on_timeout: "pause"
    pauses it at that time instead.
    retain: seconds for which the files of the stopped sandbox are retained, for `restart`. None deletes them.
    archive_after: seconds from its stop after which its files move to the archive. It excludes `retain`.
    startup_timeout: seconds that a start may take. Default 180.
    network: "none", "nat" (public addresses, by TCP), "host", or "bridge" (runtime "docker" only). Default "none".
    egress: the only allowed destinations, like "example.com" or "203.0.113.0/24:22"; it implies network "nat".
    runtime: name of the runtime. oci_runtime: "runc", "runsc" or "kata", for runtime "docker".
    use_kata_runtime: the same as oci_runtime "kata".
    isolation: exactly this isolation level. minimum_isolation: the weakest level that is acceptable.
    env: environment variables of all programs. labels: key-value pairs for `Sandbox.list`.
    name: a name for `Sandbox.connect`, unique among your sandboxes until this one ends; then it is free again.
    volumes: volumes by the path inside at which they are mounted: {"/data": "results", "/models": "models:ro"}. A name
    that ends in ":ro" is mounted read-only. `Client.create_volume` creates a volume.
    mounts: host folders by the path inside, read-only: {"/srv": "/srv/datasets"}. The owner of the server lists the
    allowed folders in ROCK_HOST_MOUNTS.
    snapshot: id or name of a snapshot to start from (`Sandbox.checkpoint`); its image is the snapshot's.
    auto_pause: seconds without a request after which its processes stop until the next request.
    record: record every command, file write and environment step, for `Sandbox.replay`.
    agents: agents to mount, like ["claude-code"], for `run_agent`. The worker installs missing ones.
    pull: "missing", "always" or "never". public_registries: pull only from public and listed registries.
    registry_username, registry_password: login for the image's registry.
    sandbox_id: an id of your choice; an id in use is a Conflict.
    image_os, user_id, experiment_id, namespace, cluster, route_key: ROCK's fields; the first four only describe the
    sandbox.
    """

    memory: str | int
    cpus: float
    limit_cpus: float | None
    pids: int
    disk: str | int | None
    inodes: int | None
    nofile: int | None
    shm_size: str | int | None
    gpus: float | None
    gpu_type: str | None
    idle_timeout: int
    max_lifetime: float | None
    on_timeout: Literal["pause"] | None
    retain: int | None
    archive_after: int | None
    startup_timeout: float
    network: Literal["none", "nat", "bridge", "host"]
    egress: list[str] | None
    runtime: str | None
    oci_runtime: Literal["runc", "runsc", "kata"] | None
    use_kata_runtime: bool
    isolation: IsolationLevel | None
    minimum_isolation: IsolationLevel
    env: dict[str, str]
    labels: dict[str, str]
    name: str | None
    volumes: Mapping[str, str]
    mounts: Mapping[str, str]
    agents: list[str]
    snapshot: str
    record: bool
    auto_pause: float
    pull: Literal["missing", "always", "never"]
    public_registries: bool
    registry_username: str | None
    registry_password: str | None
    sandbox_id: str | None
    image_os: str
    user_id: str | None
    experiment_id: str | None
    namespace: str | None
    cluster: str
    route_key: str | None


class GroupOptions(SandboxOptions, total=False):
    """Options of a group, beside those of each sandbox.

    size: number of sandboxes. Default 2. mode: "gang" starts all or none, "best_effort" as many as possible.
    placement: "spread" or "pack" over the workers. start_retry_times: number of attempts. Default 3.
    start_concurrency: accepted for compatibility with ROCK and ignored.
    """

    size: int
    mode: Literal["gang", "best_effort"]
    placement: Literal["spread", "pack"]
    start_retry_times: int
    start_concurrency: int


class ProgramOptions(TypedDict, total=False):
    """Options of a program.

    env: environment variables, added to those of the sandbox. cwd: working directory. user: user inside.
    stdin: standard input; without it /dev/null.
    max_output_bytes: limit of stdout and of stderr each; the middle of a longer output is dropped and counted.
    entrypoint: prefix the command, a list, with the ENTRYPOINT of the image; an empty list runs its CMD.
    """

    env: dict[str, str] | None
    cwd: str | None
    user: str | None
    stdin: Stdin | None
    max_output_bytes: int
    entrypoint: bool


class RunOptions(TypedDict, total=False):
    """Options of a command in a session.

    separate: stdout and stderr apart in the result. Without it `output` has both in the order of arrival.
    max_output_bytes: the middle of a longer output is dropped and counted.
    """

    separate: bool
    max_output_bytes: int


class SessionOptions(TypedDict, total=False):
    """Options of a session.

    env: environment variables. cwd: working directory. user: user inside. shell: "bash", "sh" or a path.
    pty: (rows, columns) of a terminal; without it pipes. startup_source: files that the shell sources first.
    """

    env: dict[str, str] | None
    cwd: str | None
    user: str | None
    shell: str | None
    pty: tuple[int, int] | None
    startup_source: list[str]


# Option -> field of SandboxConfig, where the names differ.
FIELDS = {
    "idle_timeout": "auto_clear_seconds",
    "max_lifetime": "timeout",
    "retain": "auto_delete_seconds",
    "archive_after": "auto_archive_seconds",
    "gpus": "num_gpus",
    "gpu_type": "accelerator_type",
}
_OPTIONS = {field: option for option, field in FIELDS.items()}
_SIZES = ("memory", "disk", "shm_size")


def option_of(field: str) -> str:
    """The option that sets a field of SandboxConfig."""
    return _OPTIONS.get(field, field)


def known(options: Mapping[str, Any], kind: type, what: str) -> None:
    """InvalidConfig for an option that a TypedDict does not have; the hint is the closest name."""
    names: frozenset[str] = kind.__required_keys__ | kind.__optional_keys__  # type: ignore[attr-defined]
    for name in options:
        if name not in names:
            more = {"image"} if what.startswith("Sandbox") else {"timeout", "check", "session"}
            raise InvalidValue(f"{what} has no option {name!r}", hint=_closest(name, names | more))


def require_flag(name: str, value: object) -> None:
    """InvalidConfig for anything but True and False: ROCK's `check` is a word."""
    if value is not True and value is not False:
        raise errors.InvalidConfig(f"{name} is {value!r}", hint="use True or False")


def _closest(name: str, names: frozenset[str]) -> str:
    if name == "timeout" and "stdin" in names:
        return "a background process has no time limit: use wait(timeout) and kill()"
    if name in _OPTIONS and "idle_timeout" in names:
        return f"its name is {_OPTIONS[name]!r}; {name!r} is a field of SandboxConfig"
    other = {"mem": "memory", "cpu": "cpus", "gpu": "gpus", "lifetime": "max_lifetime", "environment": "env",
             "working_dir": "cwd", "wait_timeout": "timeout"}.get(name)  # fmt: skip
    close = [other] if other is not None and other in names else get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"the options are {', '.join(sorted(names))}"


def fields_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of SandboxConfig that options set. Sizes given as int are bytes."""
    fields = {FIELDS.get(name, name): value for name, value in options.items()}
    for name in _SIZES:
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            fields[name] = str(value)
    if "volumes" in fields:
        pairs = _paths(fields["volumes"], "volumes", '{"/data": "my-volume"}').items()
        fields["volumes"] = [
            {"target": target, "name": name.removesuffix(":ro"), "read_only": name.endswith(":ro")}
            for target, name in pairs
        ]
    if "mounts" in fields:
        pairs = _paths(fields["mounts"], "mounts", '{"/data": "/srv/datasets"}').items()
        fields["mounts"] = [{"target": target, "source": source} for target, source in pairs]
    return fields


def _paths(value: object, option: str, example: str) -> Mapping[str, str]:
    """A mapping of strings to strings. InvalidConfig."""
    if not isinstance(value, Mapping) or not all(isinstance(one, str) for pair in value.items() for one in pair):
        raise InvalidValue(f"{option} is no mapping of paths to strings", hint=f"write it like {option}={example}")
    return value


def config_of(
    kind: type[C], image: str | SandboxConfig | None, config: SandboxConfig | None, options: Mapping[str, Any]
) -> C:
    """The configuration of `Sandbox(image, **options)` or `Sandbox(config)`. InvalidConfig: an option is wrong."""
    if isinstance(image, SandboxConfig):
        image, config = None, image if config is None else config
    what = "SandboxGroup" if issubclass(kind, SandboxGroupConfig) else "Sandbox"
    if config is not None:
        if image is not None or options:
            raise errors.InvalidConfig(
                f"{what} received a config and options",
                hint="set the values in the config, or pass options only",
            )
        if not isinstance(config, kind):
            raise errors.InvalidConfig(
                f"{what} received a {type(config).__name__} as its config", hint=f"pass a {kind.__name__}"
            )
        return config
    known(options, GroupOptions if issubclass(kind, SandboxGroupConfig) else SandboxOptions, what)
    if image is not None and not isinstance(image, str):
        raise errors.InvalidConfig(
            f"the image is a {type(image).__name__}", hint='pass its name, like Sandbox("python:3.11")'
        )
    fields = fields_of(options)
    if image is not None:
        fields["image"] = image
    try:
        return kind(**fields)
    except errors.InvalidConfig as error:
        field = error.details.get("field")
        if field in _OPTIONS:
            error.message = error.message.replace(str(field), _OPTIONS[field])
        raise


def reach_of(options: ConnectOptions, what: str) -> dict[str, Any]:
    """The fields of BaseConfig that options set. InvalidConfig."""
    known(options, ConnectOptions, what)
    BaseConfig(**options)
    return cast(dict[str, Any], dict(options))
