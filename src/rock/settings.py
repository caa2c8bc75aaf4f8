"""The settings, and the only reader of the process's environment.

Client settings are functions, because a script may set a variable after the import. A server reads its own once, into
`Settings`, at startup; other modules do not read the environment.

| variable | default | meaning |
|---|---|---|
| ROCK_BASE_URL | http://127.0.0.1:8080 | address of the server for the SDK and the CLI |
| ROCK_READ_URL | ROCK_BASE_URL | address for read requests and requests to sandboxes; both may be URL,URL |
| ROCK_API_KEY | none | the key that clients send, and that a server requires |
| ROCK_RECONNECT_TIMEOUT | 60 | seconds: a client retries after a lost connection, 0 for no retry; a rocklet keeps \
running operations when the server in front of it is gone |
| ROCK_EXTRA_HEADERS | none | headers that SDK and CLI send with each request: a JSON object |
| ROCK_HOME | ~/.rock | the one folder with all of a server's state |
| ROCK_POOL_SIZE | 4 | warm sandboxes per recently used image; 0 is off |
| ROCK_RUNTIME | namespace | the default runtime: docs/runtimes.md |
| DOCKER_HOST | unix:///var/run/docker.sock | the container engine of runtime "docker": a socket of this machine |
| ROCK_HOST, ROCK_PORT | 127.0.0.1, 8080 | listening address of the server |
| ROCK_PUBLIC_NAMES | none | names by which clients call the server, comma-separated: docs/security.md |
| ROCK_SANDBOX_LIMIT | 0 | maximum concurrent sandboxes on this machine; 0: as memory and file descriptors permit |
| ROCK_PROCESSES | 0 | rocklet processes of this machine (--workers); 0: one below 16 CPUs, else CPUs/8, at most 32 |
| ROCK_UI | on | off: no web page, and no route below /ui |
| ROCK_AUDIT_DAYS | 90 | retention of the audit log in days; 0 keeps no log |
| ROCK_HOST_MOUNTS | none | folders of this machine below which sandboxes may mount folders, read-only: /data:/models |
| ROCK_CONTAINER_IMAGE | none | of a rocklet in a container: its image, which runtime "process" then has |
| ROCK_DISK_LIMIT | 10g | bytes of written files above which a sandbox without `disk` is ended; 0 is no limit |
| ROCK_INSECURE_REGISTRIES | none | registries that are contacted without TLS, comma-separated |
| ROCK_PRIVATE_REGISTRIES | none | registries on private addresses that tenants may use, comma-separated |
| ROCK_REGISTRY_MIRRORS | none | mirrors, tried first: docker.io=mirror.local:5000, comma-separated |
| ROCK_IMAGE_BUDGET | none | bytes of image layers, like 50g, above which the least recently used images are removed |
| ROCK_IMAGE_MAX_BYTES, ROCK_IMAGE_MAX_ENTRIES | 64g, 2000000 | maximum unpacked size of an image: bytes and files |
| DOCKER_CONFIG | ~/.docker | folder of Docker's registry logins, which are used too |
| ROCK_ENV_PIPES | 1 | 0: clients on the server's machine use HTTP for environments too |
| ROCK_ENV_SHARED | 1 | 0: large responses to such clients use the pipes too, and not shared memory |
| ROCK_DIALECT_NETWORK | nat | default network of the ROCK dialect: none, nat, host or bridge |
| ROCK_E2B | on | off: no E2B dialect, and no route below /e2b: docs/integrations/e2b.md |
| ROCK_E2B_IMAGE | host | image of E2B's template "base" |
| ROCK_E2B_NETWORK | nat | network of E2B sandboxes with internet access: none, nat, host or bridge |
| ROCK_E2B_MEMORY, ROCK_E2B_CPUS | 2g, 2 | limits of E2B sandboxes |
| ROCK_E2B_DOMAIN | none | domain below which ports of E2B sandboxes have host names, PORT-ID.DOMAIN, without a key |
| ROCK_GATEWAY | on | off: the server has no model gateway (/v1/runs, /gateway) |
| ROCK_GATEWAY_RETAIN | 604800 | seconds for which an ended run and its recorded calls are kept |
| ROCK_GATEWAY_RUNS | 10000 | maximum runs of one tenant; above it the oldest ended run is deleted |
| ROCK_GATEWAY_ORPHAN | 10 | seconds for which a model call continues after its agent has disconnected |
| ROCK_CONFIG | none | a YAML file of ROCK's own server, of which known keys are applied: docs/guides/from-rock.md |
| ROCK_LIVE_CONFIG | config.yaml in ROCK_HOME, if it exists | source of the live configuration: a file, \
nacos://HOST:PORT/DATA_ID, or api: docs/guides/configuration.md |
| ROCK_IDLE_AFTER | 30 | seconds without a request after which a worker closes the descriptors of a sandbox |
| ROCK_ENV_LEASE | 50 | seconds without a renewal by a client process after which its environments are released |
| ROCK_ARCHIVE | archive in ROCK_HOME | location of archived sandboxes: a folder, s3://BUCKET/PREFIX, or "off" |
| ROCK_SNAPSHOT_MEMORY | a quarter | bytes, like 4g, for the memory of copied processes; 0 copies no processes |
| ROCK_SNAPSHOT_TTL | 3600 | seconds without use after which a snapshot is deleted, unless it has its own retention |
| ROCK_ARCHIVE_LIMIT | 64g | maximum bytes of files in one archive, holes included |
| ROCK_S3_ENDPOINT, ROCK_S3_REGION | Amazon's, us-east-1 | of an archive in a bucket |
| ROCK_S3_KEY, ROCK_S3_SECRET | none | credentials of its requests |
| ROCK_NETWORK_RESOLVERS | those of /etc/resolv.conf | of network nat: ADDRESS[:PORT], comma-separated |
| ROCK_TLS_CERT, ROCK_TLS_KEY | none | a chain of certificates and its key (PEM): the server uses TLS |
| SSL_CERT_FILE | the system's | certificate authorities that clients trust |
| ROCK_STORE | rock.sqlite in ROCK_HOME | database of the server: a file, or postgresql://USER@HOST/DATABASE |
| ROCK_STORE_CHANGED | none | action of a start on sandboxes that are not in its store: adopt or abandon |
| ROCK_WORKERS | none | an admin without sandboxes of its own: its rocklets, as NAME=URL,NAME=URL; or "none" |
| ROCK_WORKER_KEY | ROCK_API_KEY | the key that rocklets require, and with which a rocklet may join |
| ROCK_WORKER_LEASE | 10 | seconds of the lease of a worker that joined |
| ROCK_ROLE | all | role of a server: all, write (or admin), read (or proxy) |
| ROCK_WRITER, ROCK_READER | none | of a reader, a writer: where it forwards requests of the other role; URL,URL |
| ROCK_JOIN, ROCK_WORKER_NAME, ROCK_ADVERTISE | none | of a rocklet: --join, --name, --advertise |
| ROCK_TUNNEL | off | of a rocklet: on: it has no inbound ports, and opens tunnels to the servers (--tunnel) |
| ROCK_WORKER_GRACE | 60 | seconds without a heartbeat after which such a worker is declared lost; at least 6 leases \
unless it is set |
| ROCK_LEASE_LOST | keep | of a rocklet: its sandboxes while no server responds: keep, or stop after 2/3 of the grace \
period |
| ROCK_DIRECT | machine | where clients send requests to the worker of a sandbox instead of the proxy: off; machine: \
the processes of --workers; all: also workers that joined by an address. In a client: off never does so |
| ROCK_MULTIPLEX | on | off: a server accepts no upgraded connections (docs/reference/frames.md); a client uses none |
| ROCK_SCHEDULER | local | "ray": a Ray cluster decides the placement, docs/guides/ray.md; "kubernetes": one pod for \
each sandbox, docs/guides/kubernetes.md |
| ROCK_RAY_ADDRESS, ROCK_RAY_HOME | auto, ~/.rock-ray | of that cluster; the homes of its rocklets, on each node |
| ROCK_KUBERNETES_TEMPLATES | none | ROCK_SCHEDULER=kubernetes: the pod templates, a YAML or JSON file |
| ROCK_KUBERNETES_CONFIG | the service account | a kubeconfig, for a server outside of the cluster |
| ROCK_KUBERNETES_NAMESPACE | the context's, else rock | the namespace of sandbox pods |
| ROCK_KUBERNETES_INSTANCE | rock | a name of this installation; pods of others in the namespace are not touched |
| ROCK_KUBERNETES_KIND | Pod | the kind of object by which a sandbox gets its pod: Pod, BatchSandbox, Sandbox or \
SandboxClaim |
| ROCK_KUBERNETES_QPS | 50 | requests per second to the API server, after a burst of twice as many |
| ROCK_KUBERNETES_RESYNC | 60 | seconds between two lists of all pods, beside the watch |
| ROCK_CAPACITY_WAIT | 0 | seconds that a create waits while no worker has capacity; 0 fails at once |
| ROCK_KUBERNETES_UNSCHEDULABLE | 60 | seconds that a pod may wait for a node until its sandbox fails |
| KUBERNETES_SERVICE_HOST, KUBERNETES_SERVICE_PORT | none | the API server, as a cluster gives it to its pods |
| ROCK_LOG_LEVEL | info | debug, info, warning, error |
| ROCK_FAULTS | none | for tests: faults at named points, see faults.py |
| ROCK_LOG_FORMAT | text | text, or json: one object per line |
| ROCK_OTEL_ENDPOINT | OTEL_EXPORTER_OTLP_ENDPOINT | receiver of traces and metrics by OTLP, as http://HOST:4318 |
| ROCK_OTEL_ATTRIBUTES | none | tags of traces and metrics: NAME=VALUE,NAME=VALUE |
| ROCK_OTEL_INTERVAL | 30 | seconds between two exports of the metrics |
| ROCK_TRACE | 0 | 1: the SDK starts a trace for a call outside of one |
| ROCK_DRAIN_SECONDS | 5 | seconds that a stopping server waits for pending requests |
| HF_ENDPOINT | https://huggingface.co | location of the repositories of `hf://` sources |
| ROCK_ENVHUB_DB_URL | envhub.sqlite in ROCK_HOME | database of an `envhub`: sqlite:///FILE |
| ROCK_ENVHUB_BASE_URL | http://localhost:8081 | address of the registry of environments for the SDK |
| ROCK_RTENV_PYTHON_V31114_INSTALL_CMD, ..._PYTHON_V31212_..., ..._NODE_V22180_... | none | commands that install one |
"""

from __future__ import annotations

import configparser
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_URL = "http://127.0.0.1:8080"
_RUNTIME_ENVS = {
    ("python", "default"): "PYTHON_V31114",
    ("python", "3.11"): "PYTHON_V31114",
    ("python", "3.12"): "PYTHON_V31212",
    ("node", "default"): "NODE_V22180",
    ("node", "22.18.0"): "NODE_V22180",
}


def base_url() -> str:
    """ROCK_BASE_URL, or the default address; with ROCK_READ_URL "WRITERS;READERS"."""
    write, read = os.environ.get("ROCK_BASE_URL") or DEFAULT_URL, os.environ.get("ROCK_READ_URL")
    return f"{write};{read}" if read else write


def variable(name: str) -> str | None:
    """A variable of the process's environment, for `rock.env_vars`; None when unset."""
    return os.environ.get(name)


def api_key() -> str | None:
    """ROCK_API_KEY, if set and not empty."""
    return os.environ.get("ROCK_API_KEY") or None


RECONNECT_TIMEOUT = 60.0


def reconnect_timeout(given: float | None = None) -> float:
    """Seconds for which a client retries after a lost connection: the argument, else ROCK_RECONNECT_TIMEOUT.
    ValueError."""
    text = os.environ.get("ROCK_RECONNECT_TIMEOUT")
    try:
        seconds = given if given is not None else float(text) if text else RECONNECT_TIMEOUT
    except ValueError:
        seconds = float("nan")
    if not 0 <= seconds <= 3600:
        raise ValueError(f"ROCK_RECONNECT_TIMEOUT={text if given is None else given!r} is not between 0 and 3600")
    return seconds


def extra_headers() -> dict[str, str]:
    """ROCK_EXTRA_HEADERS: headers that clients send with each request, as a JSON object. ValueError."""
    text = os.environ.get("ROCK_EXTRA_HEADERS")
    if not text:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"ROCK_EXTRA_HEADERS={text[:80]!r} is not a JSON object of texts")
    return found


def give(**variables: str) -> None:
    """Set variables of this process's environment, for global options of a command."""
    os.environ.update(variables)


def client_file(path: str) -> dict[str, str]:
    """The variables from ROCK's client configuration: an INI file with [rock] base_url and [rock.extra_headers].
    ValueError states what is wrong with it."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment]  # preserve header case
    try:
        with open(Path(path).expanduser(), encoding="utf-8") as file:
            parser.read_file(file)
    except (OSError, configparser.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a configuration file: {str(error).splitlines()[0]}") from None
    found: dict[str, str] = {}
    if parser.get("rock", "base_url", fallback=""):
        found["ROCK_BASE_URL"] = parser.get("rock", "base_url")
    if parser.has_section("rock.extra_headers"):
        found["ROCK_EXTRA_HEADERS"] = json.dumps(dict(parser.items("rock.extra_headers")))
    return found


def direct() -> bool:
    """ROCK_DIRECT: whether the SDK sends requests to workers, where the server permits it."""
    return os.environ.get("ROCK_DIRECT", "") != "off"


def multiplex() -> bool:
    """ROCK_MULTIPLEX: whether the SDK upgrades connections, where the server permits it."""
    return os.environ.get("ROCK_MULTIPLEX", "") != "off"


def trace() -> bool:
    """ROCK_TRACE: whether the SDK starts a trace for a call outside of one."""
    return os.environ.get("ROCK_TRACE", "0") not in ("", "0")


def otel() -> tuple[str, str]:
    """ROCK_OTEL_ENDPOINT, else OTEL_EXPORTER_OTLP_ENDPOINT; and ROCK_OTEL_ATTRIBUTES. Empty when unset."""
    endpoint = os.environ.get("ROCK_OTEL_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or ""
    return endpoint, os.environ.get("ROCK_OTEL_ATTRIBUTES", "")


def env_pipes() -> bool:
    """ROCK_ENV_PIPES: whether a client on the server's machine uses direct pipes to environments; 0 for never."""
    return os.environ.get("ROCK_ENV_PIPES", "1") != "0"


def env_shared() -> bool:
    """ROCK_ENV_SHARED: whether large responses use shared memory, where pipes are used; 0 for never."""
    return os.environ.get("ROCK_ENV_SHARED", "1") != "0"


def hub_endpoint() -> str:
    """HF_ENDPOINT: the location of repositories of `hf://` sources."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


_GIT_KEPT = ("PATH", "http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY")
_CA_BUNDLES = ("GIT_SSL_CAINFO", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def git_environment(home: str) -> dict[str, str]:
    """The environment for a git without user configuration and prompts: the proxies and certificates of this process,
    and nothing else. home: its HOME folder, which may be any folder."""
    kept = {name: os.environ[name] for name in _GIT_KEPT if name in os.environ}
    bundle = next((os.environ[name] for name in _CA_BUNDLES if os.environ.get(name)), None)
    if bundle is not None:
        kept["GIT_SSL_CAINFO"] = bundle
    return {
        **kept, "HOME": home, "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull, "GIT_ATTR_NOSYSTEM": "1", "GIT_ALLOW_PROTOCOL": "http:https",
    }  # fmt: skip


def insecure_registries() -> frozenset[str]:
    """ROCK_INSECURE_REGISTRIES: registries, by their names in images, that are contacted without TLS;
    comma-separated."""
    names = os.environ.get("ROCK_INSECURE_REGISTRIES", "").split(",")
    return frozenset(name.strip() for name in names if name.strip())


def private_registries() -> frozenset[str]:
    """ROCK_PRIVATE_REGISTRIES: registries on private addresses that tenants may use; comma-separated."""
    names = os.environ.get("ROCK_PRIVATE_REGISTRIES", "").split(",")
    return frozenset(name.strip() for name in names if name.strip())


def registry_mirrors() -> dict[str, list[str]]:
    """ROCK_REGISTRY_MIRRORS: the mirrors of each registry, tried first, as REGISTRY=MIRROR; comma-separated."""
    found: dict[str, list[str]] = {}
    for pair in os.environ.get("ROCK_REGISTRY_MIRRORS", "").split(","):
        registry, _, mirror = (part.strip() for part in pair.partition("="))
        if registry and mirror:
            found.setdefault(registry, []).append(mirror)
    return found


def docker_config() -> Path:
    """DOCKER_CONFIG, or ~/.docker: the folder of Docker's own configuration."""
    return Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker").expanduser().absolute()


def proxy_for(url: str) -> str | None:
    """The proxy of HTTP_PROXY, HTTPS_PROXY and NO_PROXY for an address."""
    import urllib.parse
    import urllib.request  # an HTTP client, which most commands do not need

    parts = urllib.parse.urlsplit(url)
    if urllib.request.proxy_bypass(parts.netloc) or parts.hostname in ("localhost", "127.0.0.1", "::1"):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def envhub_url() -> str:
    """ROCK_ENVHUB_BASE_URL, or the default address of an `envhub`."""
    return os.environ.get("ROCK_ENVHUB_BASE_URL") or "http://localhost:8081"


def envhub_database() -> str | None:
    """ROCK_ENVHUB_DB_URL: the database of an `envhub`."""
    return os.environ.get("ROCK_ENVHUB_DB_URL") or None


def runtime_env_install(kind: str, version: str) -> str | None:
    """The user-defined commands that install a runtime environment: ROCK_RTENV_..._INSTALL_CMD; None when unset."""
    name = _RUNTIME_ENVS.get((kind, version))
    return os.environ.get(f"ROCK_RTENV_{name}_INSTALL_CMD") or None if name else None


def home() -> Path:
    """ROCK_HOME, or ~/.rock."""
    return Path(os.environ.get("ROCK_HOME") or Path.home() / ".rock").expanduser().absolute()


def terminal_environment() -> dict[str, str]:
    """TERM and the locale of this process, for an interactive shell inside."""
    return {k: v for k, v in os.environ.items() if k in ("TERM", "LANG", "COLORTERM") or k.startswith("LC_")}


def child_environment(**extra: str) -> dict[str, str]:
    """The complete environment of this process, for a server that is started as a child."""
    return {**os.environ, **extra}


@dataclass(frozen=True)
class Settings:
    """One server's settings."""

    home: Path
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = field(default=None, repr=False)
    public_names: str = ""
    pool_size: int = 4
    runtime: str = "namespace"
    sandbox_limit: int = 0
    processes: int = 0
    disk_limit: str = "10g"
    container_image: str = ""
    host_mounts: str = ""
    network_resolvers: str = ""
    docker_host: str = ""
    log_level: str = "info"
    log_format: str = "text"
    otel_endpoint: str = ""
    otel_attributes: str = ""
    otel_interval: float = 30.0
    drain_seconds: float = 5.0
    tls_cert: str = ""
    tls_key: str = ""
    store: str = field(default="", repr=False)
    store_changed: str = ""
    workers: str = ""
    worker_key: str = field(default="", repr=False)
    worker_lease: float = 10.0
    worker_grace: float = 0.0  # 0: derived from the lease
    reconnect_timeout: float = RECONNECT_TIMEOUT
    role: str = "all"
    writer: str = ""
    reader: str = ""
    join: str = ""
    worker_name: str = ""
    tunnel: str = ""
    advertise: str = ""
    direct: str = "machine"
    multiplex: str = "on"
    direct_host: str = field(default="", metadata={"internal": True})
    scheduler: str = "local"
    ray_address: str = ""
    ray_home: str = "~/.rock-ray"
    kubernetes_templates: str = ""
    kubernetes_config: str = ""
    kubernetes_namespace: str = ""
    kubernetes_instance: str = "rock"
    kubernetes_kind: str = "Pod"
    kubernetes_qps: float = 50.0
    kubernetes_resync: float = 60.0
    kubernetes_unschedulable: float = 60.0
    capacity_wait: float = 0.0
    kubernetes_host: str = ""
    kubernetes_port: str = ""
    lease_lost: str = "keep"
    archive: str = ""
    archive_limit: str = "64g"
    snapshot_memory: str = ""
    snapshot_ttl: float = 3600.0
    image_budget: str = ""
    image_max_bytes: str = "64g"
    image_max_entries: int = 2_000_000
    s3_endpoint: str = ""
    s3_region: str = "us-east-1"
    s3_key: str = ""
    s3_secret: str = field(default="", repr=False)
    faults: str = ""
    live_config: str = field(default="", repr=False)
    env_lease: float = 50.0
    idle_after: float = 30.0
    dialect_network: str = "nat"
    e2b: str = "on"
    e2b_image: str = "host"
    e2b_network: str = "nat"
    e2b_memory: str = "2g"
    e2b_cpus: float = 2.0
    e2b_domain: str = ""
    gateway: str = "on"
    gateway_retain: float = 604_800.0
    gateway_runs: int = 10_000
    gateway_orphan: float = 10.0
    ui: str = "on"
    audit_days: float = 90.0
    # of one of several rocklet processes of a server, set by that server: its number, their number, the server's home
    process: int = field(default=0, metadata={"internal": True})
    share: int = field(default=1, metadata={"internal": True})
    server_home: Path | None = field(default=None, metadata={"internal": True})

    @property
    def archive_dir(self) -> Path:
        """The folder of archives, when they are in a folder."""
        return Path(self.archive).expanduser().absolute() if self.archive else self.home / "archive"

    @property
    def resolvers(self) -> list[str]:
        """Name servers for sandboxes; empty means this machine's own."""
        return [text.strip() for text in self.network_resolvers.split(",") if text.strip()]

    @property
    def host_mount_folders(self) -> list[str]:
        """Folders of this machine below which sandboxes may mount folders."""
        return [path for path in self.host_mounts.split(":") if path]

    @property
    def run_dir(self) -> Path:
        """State of the current boot: sandboxes, sockets, locks."""
        return self.home / "run"

    @property
    def image_dir(self) -> Path:
        return (self.server_home or self.home) / "images"

    @property
    def registries(self) -> Path:
        """Logins of registries; apart from the images, and readable by the user only."""
        return (self.server_home or self.home) / "registries.json"

    @property
    def gateway_dir(self) -> Path:
        """State of the model gateway: upstreams with their keys, runs and their calls."""
        return self.home / "gateway"

    @property
    def log_dir(self) -> Path:
        return (self.server_home or self.home) / "logs"

    @property
    def process_dir(self) -> Path:
        """Identity and sockets of this rocklet process; the home of a rocklet that is the only one."""
        return self.home if self.server_home is None else self.server_home / PROCESSES / str(self.process)

    @property
    def catalogue(self) -> Path:
        """The registered environments."""
        return self.home / "envhub.sqlite"

    @property
    def database(self) -> Path:
        return self.home / "rock.sqlite"

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None, **given: Any) -> Settings:
        """Settings from the environment; values of `given` that are not None take precedence. ValueError names a bad
        value."""
        env = os.environ if environ is None else environ
        values: dict[str, object] = {"home": home(), "api_key": env.get("ROCK_API_KEY") or None,
                                     "docker_host": env.get("DOCKER_HOST", ""),
                                     "kubernetes_host": env.get("KUBERNETES_SERVICE_HOST", ""),
                                     "kubernetes_port": env.get("KUBERNETES_SERVICE_PORT", ""),
                                     "otel_endpoint": env.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")}  # fmt: skip
        if env.get("ROCK_CONFIG"):
            from rock import rock_conf  # a YAML parser, needed only here

            values |= rock_conf.read(env["ROCK_CONFIG"])
        for name, kind in (
            ("host", str),
            ("public_names", str),
            ("runtime", str),
            ("network_resolvers", str),
            ("log_level", str),
            ("log_format", str),
            ("otel_endpoint", str),
            ("otel_attributes", str),
            ("otel_interval", float),
            ("drain_seconds", float),
            ("tls_cert", str),
            ("tls_key", str),
            ("store", str),
            ("store_changed", str),
            ("workers", str),
            ("worker_key", str),
            ("worker_lease", float),
            ("worker_grace", float),
            ("reconnect_timeout", float),
            ("role", str),
            ("writer", str),
            ("reader", str),
            ("join", str),
            ("worker_name", str),
            ("tunnel", str),
            ("advertise", str),
            ("direct", str),
            ("multiplex", str),
            ("scheduler", str),
            ("ray_address", str),
            ("ray_home", str),
            ("kubernetes_templates", str),
            ("kubernetes_config", str),
            ("kubernetes_namespace", str),
            ("kubernetes_instance", str),
            ("kubernetes_kind", str),
            ("kubernetes_qps", float),
            ("kubernetes_resync", float),
            ("kubernetes_unschedulable", float),
            ("capacity_wait", float),
            ("lease_lost", str),
            ("archive", str),
            ("archive_limit", str),
            ("snapshot_memory", str),
            ("snapshot_ttl", float),
            ("disk_limit", str),
            ("container_image", str),
            ("host_mounts", str),
            ("image_budget", str),
            ("image_max_bytes", str),
            ("s3_endpoint", str),
            ("s3_region", str),
            ("s3_key", str),
            ("s3_secret", str),
            ("faults", str),
            ("live_config", str),
            ("env_lease", float),
            ("idle_after", float),
            ("dialect_network", str),
            ("e2b", str),
            ("e2b_image", str),
            ("e2b_network", str),
            ("e2b_memory", str),
            ("e2b_cpus", float),
            ("e2b_domain", str),
            ("gateway", str),
            ("gateway_retain", float),
            ("gateway_orphan", float),
            ("gateway_runs", int),
            ("ui", str),
            ("audit_days", float),
            ("port", int),
            ("image_max_entries", int),
            ("pool_size", int),
            ("sandbox_limit", int),
            ("processes", int),
        ):
            text = env.get(f"ROCK_{name.upper()}")
            if text:
                try:
                    values[name] = kind(text)
                except ValueError:
                    raise ValueError(f"ROCK_{name.upper()}={text!r} is not a number") from None
        values |= {k: v for k, v in given.items() if v is not None}
        for name, least in (("otel_interval", 0.1), ("drain_seconds", 0.0), ("reconnect_timeout", 0.0),
                            ("env_lease", 1.0), ("idle_after", 0.5), ("kubernetes_qps", 0.1),
                            ("kubernetes_resync", 1.0), ("kubernetes_unschedulable", 0.0),
                            ("capacity_wait", 0.0)):
            number = values.get(name, least)
            if not isinstance(number, int | float) or not least <= number <= 3600:
                raise ValueError(f"ROCK_{name.upper()}={number} is not between {least:g} and 3600")
        processes = values.get("processes", 0)
        if not isinstance(processes, int) or not 0 <= processes <= 64:
            raise ValueError(f"ROCK_PROCESSES={processes} is not between 0 and 64")
        limit = values.get("sandbox_limit", 0)
        if not isinstance(limit, int) or limit < 0:
            raise ValueError(f"ROCK_SANDBOX_LIMIT={limit} is below 0")
        for name, most in (("gateway_retain", 10 * 31_536_000), ("gateway_runs", 1_000_000), ("gateway_orphan", 3600)):
            number = values.get(name, 1)
            if not isinstance(number, int | float) or not 0 <= number <= most:
                raise ValueError(f"ROCK_{name.upper()}={number} is not between 0 and {most}")
        if values.get("gateway", "on") not in ("on", "off"):
            raise ValueError(f"ROCK_GATEWAY={values['gateway']!r} is neither on nor off")
        for name in ("dialect_network", "e2b_network"):
            network = values.get(name, "nat")
            if network not in ("none", "nat", "host", "bridge"):
                raise ValueError(f"ROCK_{name.upper()}={network!r} is none of none, nat, host and bridge")
        cpus = values.get("e2b_cpus", 2.0)
        if not isinstance(cpus, int | float) or not 0 < cpus <= 4096:
            raise ValueError(f"ROCK_E2B_CPUS={cpus} is not above 0 and at most 4096")
        for name, usual in (("ui", "on"), ("e2b", "on"), ("multiplex", "on"), ("tunnel", "off")):
            if values.get(name, usual) not in ("on", "off"):
                raise ValueError(f"ROCK_{name.upper()}={values[name]!r} is neither on nor off")
        days = values.get("audit_days", 90.0)
        if not isinstance(days, int | float) or not 0 <= days <= 36500:
            raise ValueError(f"ROCK_AUDIT_DAYS={days} is not between 0 and 36500")
        if values.get("log_format", "text") not in ("text", "json"):
            raise ValueError(f"ROCK_LOG_FORMAT={values['log_format']!r} is neither text nor json")
        return cls(**values)  # type: ignore[arg-type]


# ---- files in ROCK_HOME by which clients of the same account find their server, and prove that they are its owner ----

PROCESSES = "processes"  # the folder of the rocklet processes of a server
NOTE = "server.json"  # where the server listens: pid, host, port
STORE_NOTE = "store.json"  # in the run folder: the identity of the store that owns the sandboxes
RESTORED = "restored"  # the identity of a store into which a backup was restored
OWNER_KEY = "owner.key"  # a key that a server without a key of its own makes at each start; mode 0600
