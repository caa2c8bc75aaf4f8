"""Reader of the original ROCK server's YAML configuration (ROCK_CONFIG, `rock-conf/rock-*.yml`); supported keys:

    database.url                                     ROCK_STORE
    lifecycle.archive.enabled, .dir_storage          ROCK_ARCHIVE, ROCK_S3_ENDPOINT, _REGION, _KEY, _SECRET
    lifecycle.archive.max_dir_upload_size            ROCK_ARCHIVE_LIMIT
    oss (primary too)                                the same, where dir_storage names no account
    ray.address                                      ROCK_RAY_ADDRESS
    runtime.metrics_endpoint, .user_defined_tags     ROCK_OTEL_ENDPOINT, ROCK_OTEL_ATTRIBUTES

`_base` names a file in the same folder whose values are the defaults. Variables of the environment take precedence over
the file. Each other key is reported once, so that no setting is ignored silently.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger("rock.server")

_LONGEST_CHAIN = 8  # maximum length of a chain of base files
_LARGEST = 1 << 20  # maximum bytes of a file
_reported: set[tuple[str, str]] = set()


def read(path: str) -> dict[str, Any]:
    """Settings of the file, by the names of `rock.settings.Settings`. ValueError states what is wrong with it."""
    document = _load(Path(path).expanduser().absolute(), 0)
    found, used = _settings(document)
    ignored = sorted(key for key in _leaves(document) if not _is_below(key, used))
    new = [key for key in ignored if (path, key) not in _reported]
    _reported.update((path, key) for key in new)
    if new:
        log.warning("%s: these keys have no meaning here and are ignored: %s (docs/guides/from-rock.md)", path,
                    ", ".join(new))  # fmt: skip
    return found


def yaml_document(data: bytes) -> Any:
    """The document of a YAML text. ValueError states what is wrong with it."""
    try:
        import yaml
    except ImportError:
        raise ValueError("reading YAML needs a package; pip install 'rock-sandbox[rock-conf]'") from None
    try:
        return yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"it is not YAML: {str(error).splitlines()[0]}") from None


def _load(path: Path, depth: int) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"ROCK_CONFIG: {path} cannot be read: {error.strerror}") from None
    if len(data) > _LARGEST:
        raise ValueError(f"ROCK_CONFIG: {path} is larger than {_LARGEST >> 20} MiB")
    try:
        document = yaml_document(data)
    except ValueError as error:
        raise ValueError(f"ROCK_CONFIG: {path}: {error}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ValueError(f"ROCK_CONFIG: {path} holds no mapping")
    base = document.pop("_base", None)
    if base is None:
        return document
    if depth >= _LONGEST_CHAIN:
        raise ValueError(f"ROCK_CONFIG: {path}: more than {_LONGEST_CHAIN} files name each other in _base")
    return _merged(_load(path.parent / str(base), depth + 1), document)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def _settings(document: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """(settings, keys from which they come)."""
    found: dict[str, Any] = {}
    used: set[str] = set()

    def take(key: str, kind: type, setting: str | None = None) -> Any:
        value: Any = document
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is None:
            return None
        used.add(key)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            wanted = "text" if kind is str else kind.__name__
            raise ValueError(f"ROCK_CONFIG: {key} is a {type(value).__name__}, and has to be {wanted}")
        if setting is not None:
            found[setting] = value
        return value

    url = take("database.url", str)
    if url is not None:
        found["store"] = url.removeprefix("sqlite:///") if url.startswith("sqlite:///") else url
        if "://" in found["store"] and not found["store"].startswith("postgresql://"):
            raise ValueError(f"ROCK_CONFIG: database.url {url.partition('://')[0]!r} is neither sqlite nor postgresql")
    take("ray.address", str, "ray_address")
    take("runtime.metrics_endpoint", str, "otel_endpoint")
    tags = take("runtime.user_defined_tags", dict)
    if tags:
        found["otel_attributes"] = ",".join(f"{name}={value}" for name, value in tags.items())
    if take("lifecycle.archive.enabled", bool):
        take("lifecycle.archive.max_dir_upload_size", str, "archive_limit")
        _archive(take, found)
    return found, used


def _archive(take: Any, found: dict[str, Any]) -> None:
    """The location of archives: a bucket if configured, else the server's folder."""
    kind = take("lifecycle.archive.dir_storage.type", str) or "oss"
    if kind not in ("oss", "s3"):
        raise ValueError(f"ROCK_CONFIG: lifecycle.archive.dir_storage.type {kind!r} is neither oss nor s3")
    for account in ("lifecycle.archive.dir_storage", "oss.primary", "oss"):
        bucket = take(f"{account}.bucket", str)
        if bucket:
            found["archive"] = f"s3://{bucket}/rock-archives"
            for key, setting in (("endpoint", "s3_endpoint"), ("region", "s3_region"), ("access_key_id", "s3_key"),
                                 ("access_key_secret", "s3_secret")):  # fmt: skip
                take(f"{account}.{key}", str, setting)
            return


def _leaves(value: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of all values that are not mappings; empty mappings have none."""
    for name, item in value.items():
        key = f"{prefix}{name}"
        if isinstance(item, dict):
            yield from _leaves(item, f"{key}.")
        elif item is not None:
            yield key


def _is_below(key: str, used: set[str]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in used)
