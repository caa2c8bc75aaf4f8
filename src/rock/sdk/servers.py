"""Base URLs of a cluster: "WRITERS;READERS", each one address or several with commas between them.

One address is both, as ever. What changes sandboxes goes to the writers, everything else to the readers; of several the
next is asked when one takes no connection, so that nothing was sent yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from rock.errors import InvalidConfig
from rock.sdk.http import Address


@dataclass(frozen=True)
class Servers:
    """Addresses by role; the same where there is one kind."""

    write: tuple[Address, ...]
    read: tuple[Address, ...]

    @classmethod
    def parse(cls, base_url: str) -> Servers:
        """InvalidConfig for what is no URL, or no list of them."""
        writers, separator, readers = base_url.partition(";")
        write = _addresses(writers, base_url)
        return cls(write, _addresses(readers, base_url) if separator else write)


def _addresses(text: str, base_url: str) -> tuple[Address, ...]:
    if "," not in text:
        return (Address.parse(text),)
    found = tuple(Address.parse(part) for part in text.split(",") if part.strip())
    if not found:
        raise InvalidConfig(f"base_url {base_url!r} names no server", hint="use a URL like http://host:8080")
    return found
