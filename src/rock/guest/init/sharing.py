"""Sharing again what has not changed: pages that pid 1 wrote to and that are what they were when it was forked.

Whoever is forked shares its parent's pages until one of them writes, and a Python process writes into most pages that
it uses, if only to count references, up and down again. Half of what a pid 1 has of its own after some work is byte for
byte what it was. The zygote's memory is a private mapping of a sealed memory file (namespace/snapshot.py), and so is
that of each pid 1. When it has nothing to do, compiled code (native/sharing.c) compares each page of its own with the
file's, and lets go of those that are equal: what is read there from then on is the file's page, which all share.

No bytes change, whatever happens: all signals are blocked, there is one thread, and no child shares the memory
meanwhile, so nobody writes between a comparison and the letting go. Where a page was not the file's after all (the C
library gave memory back and got it anew), it is written again. Without the compiled code nothing is given
back.
"""

from __future__ import annotations

import ctypes

from rock.guest.init import native

PAGE = 4096

Region = tuple[int, int, int]  # address, number of pages, address of the same in the file's mapping


class PageSharing:
    """Lets go of pages of `regions`. Made before the process is copied that is to be swept, who then calls `run`."""

    def __init__(self, regions: list[Region]) -> None:
        self._count = len(regions)
        flat = [value for region in regions for value in region]
        self._table = (ctypes.c_ulong * len(flat))(*flat)

    def run(self, pagemap: int) -> int:
        """Let go of what is equal; answers how many pages. `pagemap`: our own /proc/self/pagemap, open for reading."""
        if native.library is None:
            return 0
        return int(native.library.share_pages(ctypes.addressof(self._table), self._count, pagemap))
