"""Image names in Docker's syntax, and their normalized form.

    python:3.11                 ->  docker.io/library/python:3.11
    me/tool                     ->  docker.io/me/tool:latest
    localhost:5000/a/b@sha256:… ->  the same, by digest
    host                        ->  this machine's own system; a special name without a tag
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from rock.errors import InvalidConfig

HOST = "host"
HUB = "docker.io"
BUILD_STEPS = "localhost/rock-build:"  # prefix of the names of build steps

_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]{{1,5}})?", re.ASCII)
_REPOSITORY = re.compile(rf"{_PART}(?:/{_PART})*", re.ASCII)
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[a-f0-9]{64}", re.ASCII)
_LONGEST = 255
_OWN = "rock.local"  # generated names; never on a registry, so a registry's limit does not apply
_LONGEST_OWN = 8192


@dataclass(frozen=True)
class Reference:
    """A normalized name. `tag` is None only for a digest without a tag. public_only: connections are limited to public
    addresses, and to registries that the owner of the server listed: reach.py."""

    domain: str
    repository: str
    tag: str | None = None
    digest: str | None = None
    public_only: bool = field(default=False, compare=False)

    @property
    def full(self) -> str:
        """The full name, which is the store's key; a digest takes precedence over a tag."""
        return self._with(f"{self.domain}/{self.repository}")

    @property
    def familiar(self) -> str:
        """The short name, without implied parts."""
        name = f"{self.domain}/{self.repository}"
        name = name.removeprefix("docker.io/library/") if name.count("/") == 2 else name
        return self._with(name.removeprefix("docker.io/"))

    def _with(self, name: str) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return name + tag + (f"@{self.digest}" if self.digest else "")


def parse(name: str) -> Reference:
    """Parse a name. InvalidConfig states what is wrong with it."""
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
    """Raise InvalidConfig for a reserved name."""
    if name == HOST:
        raise InvalidConfig("the image `host` is built in", hint="take another name, like my/image:1.0")
    parse(name)


def new_name(name: str) -> Reference:
    """Check the name of a new image. InvalidConfig."""
    free_name(name)
    reference = parse(name)
    if reference.digest is not None:
        raise InvalidConfig(f"{name} is named by a digest, which a new image cannot choose", hint="give it a tag")
    if reference.familiar.startswith(BUILD_STEPS):  # builds would reuse it as their own step
        raise InvalidConfig(f"names that begin with {BUILD_STEPS} are reserved for build steps",
                            hint="choose another name, such as my/image:1.0")
    return reference
