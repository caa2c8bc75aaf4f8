"""How the API server is reached: from inside of a pod, or by a kubeconfig.

    /var/run/secrets/kubernetes.io/serviceaccount/{token,ca.crt,namespace}     read again every minute
    kubeconfig: clusters, users (token, tokenFile, client certificate), contexts

Programs of a kubeconfig (`exec`, `auth-provider`) are refused: a file must not start programs in a server.
"""

from __future__ import annotations

import base64
import binascii
import os
import ssl
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from rock.errors import InvalidConfig, Unavailable, Unsupported

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_FRESH = 60.0  # seconds for which a token or a certificate that was read is current
_LARGEST = 1 << 20  # maximum bytes of a file


def document(path: Path, what: str) -> Any:
    """The content of a YAML or JSON file. InvalidConfig."""
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise InvalidConfig(f"{what}: {path} cannot be read: {error.strerror}", hint="check the path") from None
    if len(data) > _LARGEST:
        raise InvalidConfig(f"{what}: {path} is larger than {_LARGEST >> 20} MiB", hint="check the path")
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass
    try:
        import yaml  # of the extra rock-conf
    except ImportError:
        raise Unsupported(f"{what}: reading YAML needs a package",
                          hint="pip install 'rock-sandbox[rock-conf]', or write the file as JSON") from None
    try:
        return yaml.safe_load(data)
    except yaml.YAMLError as error:
        raise InvalidConfig(f"{what}: {path} is not YAML: {str(error).splitlines()[0]}",
                            hint="check the file") from None


class _File:
    """A text in a file that another program renews."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._text = ""
        self._read_at = float("-inf")

    def text(self) -> str:
        """The content, at most a minute old. Unavailable while it cannot be read for the first time."""
        now = time.monotonic()
        if now - self._read_at > _FRESH:
            try:
                self._text, self._read_at = self._path.read_text().strip(), now
            except OSError as error:
                if not self._text:
                    raise Unavailable(f"{self._path} cannot be read: {error.strerror}", hint="retry") from None
        return self._text

    def forget(self) -> None:
        """Read it again next time: it was refused."""
        self._read_at = float("-inf")


@dataclass
class Access:
    """server: URL of the API server. namespace: of the service account or context, "" when there is none. token: a
    fixed one, or the file of one; ca: the file or the text of certificate authorities. certificate: PEM of a client
    certificate and its key."""

    server: str
    namespace: str = ""
    token: str | _File = ""
    ca: str | _File = ""
    certificate: tuple[bytes, bytes] | None = None
    insecure: bool = False

    def bearer(self) -> str:
        """The token for the next request; "" without one. Unavailable."""
        return self.token if isinstance(self.token, str) else self.token.text()

    def refused(self) -> None:
        """The API server refused the token."""
        if isinstance(self.token, _File):
            self.token.forget()

    def authorities(self) -> str:
        """PEM of the certificate authorities that are trusted now; "" for those of the system. Unavailable."""
        return self.ca if isinstance(self.ca, str) else self.ca.text()

    def tls(self, authorities: str) -> ssl.SSLContext | None:
        """None for a server without TLS. InvalidConfig."""
        if not self.server.startswith("https://"):
            return None
        try:
            context = ssl.create_default_context(cadata=authorities or None)
            if self.insecure:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            if self.certificate is not None:
                with tempfile.NamedTemporaryFile(prefix="rock-kube-") as file:  # mode 0600; ssl reads files only
                    file.write(b"\n".join(self.certificate))
                    file.flush()
                    context.load_cert_chain(file.name)
        except (ssl.SSLError, ValueError) as error:
            raise InvalidConfig(f"the certificates of the cluster are invalid: {error}",
                                hint="check the kubeconfig, or the service account") from None
        return context


def in_cluster(folder: Path = SERVICE_ACCOUNT, host: str = "", port: str = "") -> Access | None:
    """The access of a pod's service account; None outside of a pod. host, port: KUBERNETES_SERVICE_HOST and _PORT."""
    if not host or not (folder / "token").exists():
        return None
    address = f"[{host}]" if ":" in host else host
    namespace = folder / "namespace"
    return Access(f"https://{address}:{port or '443'}", namespace.read_text().strip() if namespace.exists() else "",
                  _File(folder / "token"), _File(folder / "ca.crt"))  # fmt: skip


def from_kubeconfig(path: Path) -> Access:
    """The access of the current context. InvalidConfig, Unsupported."""
    content = document(path, "kubeconfig")
    if not isinstance(content, dict):
        raise _invalid(path, "it has no mapping")
    context = _named(path, content, "contexts", "context", content.get("current-context"))
    cluster = _named(path, content, "clusters", "cluster", context.get("cluster"))
    user = _named(path, content, "users", "user", context.get("user")) if context.get("user") else {}
    for name in ("exec", "auth-provider", "username"):
        if user.get(name):
            raise Unsupported(f"{path}: `{name}` of a user is not supported: a kubeconfig starts no programs here",
                              hint="use a token or a client certificate, or a service account inside of the cluster")
    server = cluster.get("server")
    if not isinstance(server, str) or not server.startswith(("http://", "https://")):
        raise _invalid(path, "the cluster has no server")
    token: str | _File = str(user.get("token") or "")
    if not token and user.get("tokenFile"):
        token = _File(path.parent / str(user["tokenFile"]))
    certificate = None
    if user.get("client-certificate") or user.get("client-certificate-data"):
        certificate = (_bytes(path, user, "client-certificate"), _bytes(path, user, "client-key"))
    ca = _bytes(path, cluster, "certificate-authority").decode("ascii", "replace")
    return Access(server.rstrip("/"), str(context.get("namespace") or ""), token, ca, certificate,
                  cluster.get("insecure-skip-tls-verify") is True)  # fmt: skip


def _named(path: Path, content: dict[str, Any], kind: str, key: str, name: object) -> dict[str, Any]:
    rows = content.get(kind)
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and row.get("name") == name and isinstance(row.get(key), dict):
            found: dict[str, Any] = row[key]
            return found
    raise _invalid(path, f"{kind} has no {name!r}")


def _bytes(path: Path, row: dict[str, Any], name: str) -> bytes:
    """The content of NAME-data, or of the file NAME."""
    data, file = row.get(f"{name}-data"), row.get(name)
    try:
        if data:
            return base64.b64decode(str(data), validate=True)
        return (path.parent / os.fspath(str(file))).read_bytes() if file else b""
    except (binascii.Error, OSError) as error:
        raise _invalid(path, f"{name} cannot be read: {error}") from None


def _invalid(path: Path, why: str) -> InvalidConfig:
    return InvalidConfig(f"{path} is not a usable kubeconfig: {why}", hint="check it with: kubectl --kubeconfig FILE "
                         "config view --minify")  # fmt: skip
