"""Images of the container engine: pull policy, credentials and pull progress."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from rock import errors
from rock.images.registry.reference import parse
from rock.protocol.sandbox import SandboxConfig
from rock.runtime.docker.engine import Engine, EngineError

_STATES = {"Pull complete": 1, "Already exists": 1}


async def find(engine: Engine, config: SandboxConfig) -> dict[str, Any]:
    """The engine's details of an image. ImageError when the engine does not have it."""
    found = await engine.image(parse(config.image).full)
    if found is None:
        raise errors.ImageError(
            f"the container engine has no image {config.image}" + (
                ", and pull=\"never\" forbids to fetch it" if config.pull == "never" else ""),
            hint="load it into the engine (docker load, docker build), or let it be pulled")
    return found


async def is_ready(engine: Engine, config: SandboxConfig) -> bool:
    """Whether `prepare` has nothing to do."""
    if config.pull == "always":
        return False
    return config.pull == "never" or await engine.image(parse(config.image).full) is not None


async def prepare(engine: Engine, config: SandboxConfig, tell: Callable[[str], None]) -> None:
    """Have the engine pull the image if the policy requires it. ImageError with the registry's error."""
    if await is_ready(engine, config):
        return
    login = None
    if config.registry_username is not None:
        login = config.registry_username, config.registry_password or ""
    progress = Progress()
    try:
        reference = parse(config.image)
        if config.public_registries:  # the engine resolves the name again and connects by itself
            await asyncio.to_thread(_check_reach, reference.domain)
        steps = engine.pull(reference.full, reference.domain, login)
        async with contextlib.aclosing(steps):
            async for step in steps:
                tell(progress.take(step))
    except EngineError as error:
        raise refused(config.image, error) from None


def _check_reach(domain: str) -> None:
    """Raise ImageError for a registry that tenants may not use."""
    from rock.images.registry.reach import addresses_of  # urllib3

    parts = urlsplit(f"//{domain}")
    with contextlib.suppress(OSError):  # the name may be known to the engine only
        addresses_of(parts.hostname or domain, parts.port or 443)


def refused(image: str, error: EngineError) -> errors.ImageError:
    """Translate a registry's rejection into an error."""
    text = error.message
    low = text.lower()
    if any(word in low for word in ("unauthorized", "authentication required", "denied", "no basic auth")):
        return errors.ImageError(f"the registry of {image} wants another login: {text}",
                                 hint="set registry_username and registry_password")
    if "server gave http response" in low:
        return errors.ImageError(f"the registry of {image} speaks no TLS: {text}",
                                 hint="name it under insecure-registries in the engine's daemon.json")
    if error.status == 404 or "not found" in low or "manifest unknown" in low:
        return errors.ImageError(f"no registry has an image {image}: {text}", hint="check its name and tag")
    return errors.ImageError(f"image {image} could not be pulled: {text}",
                             hint="check with `docker pull` on the engine's machine; the registry or the network may "
                                  "be down")


class Progress:
    """Progress text of a pull, from the engine's messages about layers."""

    def __init__(self) -> None:
        self._layers: dict[str, tuple[int, int, bool]] = {}  # received bytes, total bytes, done

    def take(self, step: Mapping[str, Any]) -> str:
        """The text after one more message; the engine's own text when it is not about a layer."""
        id, status = str(step.get("id") or "")[:64], str(step.get("status") or "")[:200]
        detail = step.get("progressDetail") or {}
        known = id in self._layers or status in ("Pulling fs layer", "Already exists", "Waiting", "Downloading")
        if not id or not known or (id not in self._layers and len(self._layers) >= 1000):
            return f"{id}: {status}" if id else status
        came, size, done = self._layers.get(id, (0, 0, False))
        if status == "Downloading" and isinstance(detail.get("current"), int):
            came, size = detail["current"], int(detail.get("total") or size or 0)
        elif status in ("Download complete", "Verifying Checksum", "Extracting"):
            came = size
        self._layers[id] = came, size, done or status in _STATES
        ready = sum(done for _, _, done in self._layers.values())
        total = sum(size for _, size, _ in self._layers.values())
        got = sum(came for came, _, _ in self._layers.values())
        return f"{ready} of {len(self._layers)} layers, {got / 1e6:.1f} of {total / 1e6:.1f} MB"
