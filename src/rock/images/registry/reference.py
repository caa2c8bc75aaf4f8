"""Names of images, as everybody writes them.

    python:3.11                 ->  docker.io/library/python:3.11
    me/tool                     ->  docker.io/me/tool:latest
    localhost:5000/a/b@sha256:… ->  the same, by digest
    host                        ->  this machine's own system; a name of its own, without tag
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from rock.errors import InvalidConfig

HOST = "host"
HUB = "docker.io"
BUILD_STEPS = "localhost/rock-build:"  # how the names of build steps begin

_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]{{1,5}})?", re.ASCII)
_REPOSITORY = re.compile(rf"{_PART}(?:/{_PART})*", re.ASCII)
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[a-f0-9]{64}", re.ASCII)
_LONGEST = 255
_OWN = "rock.local"  # names that this server makes up; never on a registry, so a registry's limit does not apply
_LONGEST_OWN = 8192


@dataclass(frozen=True)
class Reference:
    """A normalised name. `tag` is None only where a digest is given without one. public_only: it
    leads to public addresses, or to registries that the owner of the server has named: reach.py."""

    domain: str
    repository: str
    tag: str | None = None
    digest: str | None = None
    public_only: bool = field(default=False, compare=False)

    @property
    def full(self) -> str:
        """The whole name, which the store knows the image by; a digest wins over a tag."""
        return self._with(f"{self.domain}/{self.repository}")

    @property
    def familiar(self) -> str:
        """The name as people write it, without what is implied."""
        name = f"{self.domain}/{self.repository}"
        name = name.removeprefix("docker.io/library/") if name.count("/") == 2 else name
        return self._with(name.removeprefix("docker.io/"))

    def _with(self, name: str) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return name + tag + (f"@{self.digest}" if self.digest else "")


def parse(name: str) -> Reference:
    """The reference that `name` stands for. InvalidConfig says what is wrong with it."""
    rest, at, digest = name.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise _invalid(name, "its digest is not sha256: and 64 hexadecimal digits")
    path, tag = rest, None
    if ":" in rest.rpartition("/")[2]:
        path, _, tag = rest.rpartition(":")
        if not _TAG.fullmatch(tag):
            raise _invalid(name, "its tag may have letters, digits and _.- and at most 128 of them")
    first, slash, others = path.partition("/")
    if slash and (any(c in first for c in ".:[") or first == "localhost" or first != first.lower()):
        domain, repository = first, others
    else:
        domain, repository = "docker.io", path
    if domain == "index.docker.io":
        domain = "docker.io"
    if domain == "docker.io" and "/" not in repository:
        repository = f"library/{repository}"
    if not _DOMAIN.fullmatch(domain):
        raise _invalid(name, f"{domain!r} is no host name")
    if not _REPOSITORY.fullmatch(repository):
        raise _invalid(name, "it may have lower-case letters, digits and single separators ._- between them")
    longest = _LONGEST_OWN if domain == _OWN else _LONGEST
    if len(domain) + len(repository) > longest:
        raise _invalid(name, f"it is longer than {longest} characters")
    return Reference(domain, repository, tag if tag or at else "latest", digest if at else None)


def _invalid(name: str, why: str) -> InvalidConfig:
    shown = name if len(name) <= 80 else name[:77] + "..."
    hint = "write it like python:3.11 or localhost:5000/team/tool:1.0"
    return InvalidConfig(f"invalid image name {shown!r}: {why}", hint=hint)


def free_name(name: str) -> None:
    """InvalidConfig for a name that an image cannot be given."""
    if name == HOST:
        raise InvalidConfig("the image `host` is built in", hint="take another name, like my/image:1.0")
    parse(name)


def new_name(name: str) -> Reference:
    """What an image that is about to be made may be called. InvalidConfig."""
    free_name(name)
    reference = parse(name)
    if reference.digest is not None:
        raise InvalidConfig(f"{name} is named by a digest, which a new image cannot choose", hint="give it a tag")
    if reference.familiar.startswith(BUILD_STEPS):  # builds would take it over as what they made
        raise InvalidConfig(f"names that begin with {BUILD_STEPS} are those of build steps")
    return reference
