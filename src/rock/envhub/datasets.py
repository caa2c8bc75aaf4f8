"""The available training sets: ROCK's own, and those of installed packages with an entry point `rock.datasets`."""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from rock.datasets import GROUP, OWN, Dataset
from rock.errors import InvalidConfig, NotFound
from rock.protocol.env import TASK_IMAGES

_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")
_LARGEST = 90_000  # maximum bytes of one adapter: it is one argument of a program, whose limit is 128 KiB


@cache
def _entries() -> dict[str, EntryPoint | Dataset]:
    """Sets by name. A package cannot take the name of a built-in set."""
    found: dict[str, EntryPoint | Dataset] = {entry.name: entry for entry in entry_points(group=GROUP)}
    return {**found, **{own.name: own for own in OWN}}


@cache
def _loaded(name: str) -> Dataset:
    """Load a set. InvalidConfig when its package is faulty; other sets are unaffected."""
    entry = _entries()[name]
    if isinstance(entry, Dataset):
        return entry
    try:
        found = entry.load()
    except Exception as error:
        raise InvalidConfig(f"the training set {name} = {entry.value} cannot be loaded: {error!r}",
                            hint="reinstall or remove the package that provides it; its entry point must be a "
                                 "rock.envhub.Dataset") from error
    if not isinstance(found, Dataset) or found.name != name or not _NAME.fullmatch(name):
        raise InvalidConfig(f"entry point {name} = {entry.value} of {GROUP} is no Dataset of that name",
                            hint="docs/adding-a-dataset.md has an example")  # fmt: skip
    return found


def names() -> list[str]:
    return sorted(_entries())


def find(name: str) -> Dataset:
    """The set of that name in any spelling: BFCL and bfcl, reasoning_gym and reasoning-gym. NotFound."""
    sets = _entries()
    wanted = name.lower().replace("_", "-")
    if wanted in sets:
        return _loaded(wanted)
    near = difflib.get_close_matches(wanted, sets, 3, 0.6)
    raise NotFound(f"there is no training set {name!r}",
                   hint=f"there are: {', '.join(near or sorted(sets))}")  # fmt: skip


def image_of(dataset: Dataset) -> str:
    """The image with the set's packages, which a worker builds on first use."""
    return TASK_IMAGES + dataset.name


def of_image(image: str) -> Dataset | None:
    """The set of an image; None for any other image. NotFound for a set that is not installed here."""
    return find(image.removeprefix(TASK_IMAGES).removesuffix(":latest")) if image.startswith(TASK_IMAGES) else None


def adapter_of(image: str) -> str:
    """The adapter's source for a sandbox of that image, which guest/environments/tasks.py loads; "" without an
    adapter."""
    dataset = of_image(image)
    if dataset is None:
        return ""
    spec = importlib.util.find_spec(dataset.module)
    if spec is None or spec.origin is None:
        raise NotFound(f"the adapter of training set {dataset.name} is not installed: no module {dataset.module}",
                       hint="install the package of the training set on the server, and restart the server")
    text = Path(spec.origin).read_text(encoding="utf-8")
    if len(text.encode()) > _LARGEST:
        raise InvalidConfig(f"the adapter {dataset.module} is larger than {_LARGEST} bytes",
                            hint="what is large belongs into a package of the set")  # fmt: skip
    return json.dumps({"name": dataset.name, "module": dataset.module, "class": dataset.cls, "source": text})
