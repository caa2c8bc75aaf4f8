"""Restores page sharing: releases pages that pid 1 wrote to and whose content equals that of the fork.

A forked process shares its parent's pages until one of them writes, and a Python process writes into most pages that it
uses, because it counts references. Half of a pid 1's private pages are byte for byte unchanged after some work. The
zygote's memory is a private mapping of a sealed memory file (runtime/namespace/launcher/snapshot.py), and so is that of
each pid 1. When pid 1 is idle, compiled code (native/sharing.c) compares each private page with the file's page and
releases equal ones; reads then return the file's page, which all sandboxes share.

The content never changes: all signals are blocked, there is one thread, and no child shares the memory meanwhile, so no
code writes between a comparison and the release. A page that is not the file's (the C library returned memory and
allocated it again) is written back. Without the compiled code no page is released. Standard library only.
"""

from __future__ import annotations

import ctypes

from rock.guest.init import native

PAGE = 4096

Region = tuple[int, int, int]  # address, number of pages, address of the same pages in the file's mapping


class PageSharing:
    """Releases pages of `regions`. Created before the process is copied; each copy calls `run`."""

    def __init__(self, regions: list[Region]) -> None:
        self._count = len(regions)
        flat = [value for region in regions for value in region]
        self._table = (ctypes.c_ulong * len(flat))(*flat)

    def run(self, pagemap: int) -> int:
        """Release equal pages; returns their number. `pagemap`: the own /proc/self/pagemap, open for reading."""
        if native.library is None:
            return 0
        return int(native.library.share_pages(ctypes.addressof(self._table), self._count, pagemap))
