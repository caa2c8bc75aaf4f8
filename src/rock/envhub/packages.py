"""Package sets of environments. A set has a name, from which its image's name derives.

All environments of one set share a layer on disk, and may share a sandbox. The name of a user-defined set encodes its
requirements, so every worker can decode them.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence

from rock.envhub import datasets
from rock.errors import InvalidConfig

_PREFIX = "rock.local/env/"

GEM = "gem"
GEM_GAMES = "gem-games"
GEM_CROSSWORDS = "gem-crosswords"
GYM = "gym"
_OTHER = "with-"
# A name, extras and versions: no option, URL or path in pip's syntax
_REQUIREMENT = re.compile(r"[A-Za-z0-9][\w.-]{0,99}(\[[\w.,-]{1,200}\])?([<>=!~]=?=?[\w.*+]{1,50}(,|$)){0,8}")
# An environment marker (PEP 508): comparisons of variables and quoted values, joined by `and` or `or`
_TERM = r"""(?:[a-z_]{2,40}|'[\w.+* -]{0,50}'|"[\w.+* -]{0,50}")"""
_COMPARED = rf"{_TERM} ?(?:[<>=!~]=|[<>]|===|in|not in) ?{_TERM}"
_MARKER = re.compile(rf"{_COMPARED}(?: (?:and|or) {_COMPARED}){{0,8}}")

# The modules that GEM's games import. GEM itself also requires reasoning-gym and math-verify, which are three quarters
# of its installed size: sympy, matplotlib, fonttools and others.
_GAMES = ("gem-llm==0.1.0", "numpy", "nltk==3.9.1", "click", "joblib", "regex", "tqdm")

SETS: dict[str, tuple[str, ...]] = {
    GEM: ("gem-llm==0.1.0",),
    GEM_GAMES: _GAMES,
    GEM_CROSSWORDS: (*_GAMES, "pandas", "python-dateutil", "pytz", "six", "tzdata"),
    GYM: ("gymnasium[classic-control]>=1.1,<2",),
}
_COMPLETE = (GEM_GAMES, GEM_CROSSWORDS)  # sets that name all their distributions


def image_of(name: str) -> str:
    """The image with the packages of a set; a worker builds it on first use."""
    return _PREFIX + name


def with_packages(name: str, packages: Sequence[str]) -> str:
    """The name of the set `name` with further packages. InvalidConfig unless each is a package name with versions."""
    if not packages:
        return name
    asked = "\n".join(sorted({_requirement(package) for package in packages}))
    return f"{_OTHER}{name}-{_encoded(asked)}"


def _requirement(package: str) -> str:
    """A user's requirement in its normal form: no blanks before the marker. InvalidConfig."""
    versions, semicolon, marker = package.partition(";")
    versions, marker = versions.replace(" ", ""), " ".join(marker.split())
    if not _REQUIREMENT.fullmatch(versions) or (semicolon and not _MARKER.fullmatch(marker)):
        raise InvalidConfig(
            f"package {package!r} is not a package name with versions",
            hint='write a requirement such as "ale-py>=0.11,<1"; options, addresses and paths are not accepted',
        )
    return f"{versions};{marker}" if semicolon else versions


def _encoded(text: str) -> str:
    """`text` in the characters that a repository name may have: lower-case letters and digits (base32, unpadded)."""
    return base64.b32encode(text.encode()).decode().rstrip("=").lower()


def _decoded(text: str) -> str:
    """The inverse of `_encoded`. ValueError."""
    return base64.b32decode(text.upper() + "=" * (-len(text) % 8)).decode()


def requirements_of(image: str) -> tuple[str, ...] | None:
    """The requirements that pip installs for `image`; None for an image that is not of a package set."""
    if not image.startswith(_PREFIX):
        return None
    dataset = datasets.of_image(image)
    if dataset is not None:
        return dataset.packages
    name = image.removeprefix(_PREFIX).removesuffix(":latest")
    if name.startswith(_OTHER):
        base, _, asked = name.removeprefix(_OTHER).partition("-")
        try:
            packages = _decoded(asked).split("\n")
            known = base in SETS and with_packages(base, packages) == name
        except (ValueError, InvalidConfig):
            known = False
        if known:
            return (*SETS[base], *packages)
    if name not in SETS:
        raise InvalidConfig(f"there is no environment image {image!r}", hint=f"there are: {', '.join(sorted(SETS))}")
    return SETS[name]


def wheels_only(image: str) -> bool:
    """Whether the set is user-defined: building a package runs its code on the worker, so only wheels are accepted."""
    return image.removeprefix(_PREFIX).startswith(_OTHER)


def without_dependencies(image: str) -> bool:
    """Whether exactly the requirements of that image are installed, without their dependencies."""
    dataset = datasets.of_image(image)
    if dataset is not None:
        return dataset.no_deps
    return image.removeprefix(_PREFIX).removesuffix(":latest") in _COMPLETE
