"""Which packages environments need. A set has a name, and an image is named after it.

All environments of one set share a layer on disk, and may share a sandbox.
"""

from __future__ import annotations

from rock.errors import InvalidConfig

_PREFIX = "rock.local/env/"

GEM = "gem"
GEM_PANDAS = "gem-pandas"

SETS: dict[str, tuple[str, ...]] = {
    GEM: ("gem-llm==0.1.0",),
    GEM_PANDAS: ("gem-llm==0.1.0", "pandas"),  # for crosswords alone: a third more to fetch
}


def image_of(name: str) -> str:
    """The image with the packages of a set; a worker builds it when it is first asked for."""
    return _PREFIX + name


def requirements_of(image: str) -> tuple[str, ...] | None:
    """What pip has to install for `image`; None when it is an image like any other, not of a package set."""
    if not image.startswith(_PREFIX):
        return None
    name = image.removeprefix(_PREFIX).removesuffix(":latest")
    if name not in SETS:
        raise InvalidConfig(f"there is no environment image {image!r}", hint=f"there are: {', '.join(sorted(SETS))}")
    return SETS[name]
