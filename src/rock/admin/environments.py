"""EnvHub in the native API: environments by id or by name, their versions, and the installation of their packages."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import Any

from pydantic import BaseModel, ValidationError

from rock.admin.sandboxes.service import Service
from rock.envhub import datasets, registry
from rock.envhub.catalogue import Catalogue, Registered
from rock.envhub.packages import GEM, GYM, image_of, requirements_of, with_packages
from rock.errors import InvalidConfig, NoCapacity, NotFound, RockError
from rock.protocol.env import AddEnv, BuildEnv, EnvAbout
from rock.protocol.node import ImageState

_PINNED = re.compile(r"hf://[\w.-]+/[\w.-]+@[0-9a-f]{40}(:.+)?")
_GYM_ID = re.compile(r"([\w.]+:)?([\w:.-]+/)?[\w:.-]+-v\d+")
_KEPT = 100  # versions per name
_SET = "task:"  # prefix of the name of a training set
_HINT = "an id of GEM or Gymnasium, task:SET, hf://ORG/REPO@COMMIT or image://NAME"


class Version(BaseModel):
    """One version of a registered name: a registration that differs from the previous one."""

    version: int
    source: str
    packages: list[str] = []
    imports: list[str] = []
    image: str = ""
    digest: str | None = None

    def is_like(self, other: Version) -> bool:
        return self.model_copy(update={"version": other.version}) == other


class Environments:
    """Descriptions of environments. The catalog stores those with a name."""

    def __init__(self, service: Service, catalogue: Catalogue) -> None:
        self._service = service
        self._catalogue = catalogue

    async def about(self, env_id: str) -> EnvAbout:
        """NotFound for a name that is neither registered nor an id."""
        return await self._seen(await self._known(env_id))

    async def listed(self) -> list[dict[str, Any]]:
        """Rows of the training sets, and of registered environments."""
        rows = []
        for name in datasets.names():
            with contextlib.suppress(RockError):  # a defective package is omitted
                known = _of_set(name)
                rows.append({"id": known.id, "protocol": known.protocol, "image": known.image, "note": known.note,
                             "aliases": []})  # fmt: skip
        for env in await self._catalogue.list():
            with contextlib.suppress(RockError):  # a registration that this release cannot read is omitted
                known = _of_registered(env, "")
                rows.append({"id": env.env_name, "protocol": known.protocol, "image": env.image, "note": known.note,
                             "aliases": []})  # fmt: skip
        return rows

    async def add(self, request: AddEnv) -> EnvAbout:
        """Register; another source, package set or digest than the last one's is a new version.

        A name has precedence over an id of Gymnasium; ids of GEM have a colon, which names cannot contain.
        """
        seen = await self._seen(_of_source(request.source, request.packages))
        versions: list[Version] = []
        with contextlib.suppress(NotFound):
            versions = _versions(await self._catalogue.get(request.name))
        new = Version(version=versions[-1].version + 1 if versions else 1, source=request.source, image=seen.image,
                      packages=sorted(set(request.packages)), imports=request.imports, digest=seen.digest)  # fmt: skip
        if not versions or not new.is_like(versions[-1]):
            versions = [*versions, new][-_KEPT:]
        spec = {"versions": [version.model_dump() for version in versions]}
        await self._catalogue.register(
            Registered(env_name=request.name, image=seen.image, description=request.description, extra_spec=spec)
        )
        return await self.about(request.name)

    async def build(self, request: BuildEnv, wait: float) -> EnvAbout:
        """Build it on every worker; responds after `wait` seconds at the latest, ready or not."""
        known = await self._known(request.env_id)
        if request.packages:
            more = _of_source(known.source, [*known.asked, *request.packages])
            known = more.model_copy(update={"id": known.id, "imports": known.imports})
        return await self._seen(known, wait)

    async def _seen(self, known: EnvAbout, wait: float = 0.0) -> EnvAbout:
        """Adds the state of the workers: it is ready when it is on all of them."""
        workers = list(self._service.workers.values())
        if not workers:
            raise NoCapacity("there is no worker", hint="start one with: rocklet --join")
        found: list[ImageState] = await asyncio.gather(*(worker.image(known.image, wait) for worker in workers))
        ready = all(one.is_ready for one in found)
        seen = {"is_ready": ready, "digest": found[0].digest if ready else None, "packages": found[0].packages}
        return known.model_copy(update=seen)

    async def _known(self, env_id: str) -> EnvAbout:
        name, _, number = env_id.partition("@") if "://" not in env_id else (env_id, "", "")
        try:
            registered = await self._catalogue.get(name)
        except NotFound:
            return _of_source(env_id, [])
        return _of_registered(registered, number)


def _of_registered(env: Registered, number: str) -> EnvAbout:
    versions = _versions(env)
    if not versions:
        return _of_source(f"image://{env.image}", []).model_copy(update={"id": env.env_name, "note": env.description})
    chosen = versions[-1:] if not number else [one for one in versions if str(one.version) == number]
    if not chosen:
        there = ", ".join(str(one.version) for one in versions)
        raise NotFound(f"{env.env_name} has no version {number!r}", hint=f"there are {there}")
    about = _of_source(chosen[0].source, chosen[0].packages)
    more = {"id": env.env_name, "note": env.description or about.note, "imports": chosen[0].imports,
            "asked": chosen[0].packages, "version": chosen[0].version,
            "versions": [version.model_dump() for version in versions]}  # fmt: skip
    return about.model_copy(update=more)


def _versions(env: Registered) -> list[Version]:
    """The versions of a registration that was made here; clients of ROCK may have stored any value in their place."""
    found = (env.extra_spec or {}).get("versions")
    try:
        return [Version.model_validate(one) for one in found] if isinstance(found, list) else []
    except ValidationError:
        return []


def _of_set(name: str) -> EnvAbout:
    dataset = datasets.find(name)
    note = f"wants {dataset.data}" if dataset.data else ""
    return EnvAbout(id=_SET + dataset.name, source=_SET + dataset.name, protocol="task", note=note,
                    image=datasets.image_of(dataset), requirements=list(dataset.packages))  # fmt: skip


def _is_of_gem(source: str) -> bool:
    known = source in registry.IDS or source in registry.ALIASES
    return known or not ("://" in source or _GYM_ID.fullmatch(source))


def _of_source(source: str, packages: list[str]) -> EnvAbout:
    """The properties that follow from a source alone. InvalidConfig, NotFound."""
    if source.startswith("image://"):
        if packages:
            raise InvalidConfig("nothing is installed in an image", hint="put the packages into it")
        image = source.removeprefix("image://").strip()
        if not image:
            raise InvalidConfig(f"{source!r} names no image", hint="image://NAME")
        return EnvAbout(id=source, source=source, protocol="gym", image=image)
    if source.startswith("hf://"):
        if not _PINNED.fullmatch(source):
            raise InvalidConfig(f"{source!r} names no commit, so it may change", hint="hf://ORG/REPO@ and 40 digits")
    elif source.startswith(_SET):
        if packages:
            raise InvalidConfig("the packages of a training set are its own", hint="docs/adding-a-dataset.md")
        return _of_set(source.removeprefix(_SET))
    elif source.startswith(("/", ".", "~", "file:")):
        raise InvalidConfig(f"{source!r} is a folder of one machine alone", hint=_HINT)
    elif _is_of_gem(source):
        spec = registry.find(source)
        image = image_of(with_packages(GEM, packages)) if packages else spec.image
        aliases = [alias for alias, name in registry.ALIASES.items() if name == spec.id]
        return EnvAbout(id=spec.id, source=spec.id, protocol="gem", image=image, note=spec.note, aliases=aliases,
                        requirements=list(requirements_of(image) or ()))  # fmt: skip
    elif "://" in source and not _GYM_ID.fullmatch(source.removeprefix("gym://")):
        raise InvalidConfig(f"source {source!r} is of no known kind", hint=_HINT)
    image = image_of(with_packages(GYM, packages))
    return EnvAbout(id=source.removeprefix("gym://"), source=source, protocol="gym", image=image,
                    requirements=list(requirements_of(image) or ()))  # fmt: skip
