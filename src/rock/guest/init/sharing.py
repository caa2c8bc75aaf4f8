"""Sharing again what has not changed: pages that pid 1 wrote to and that are what they were when it was forked.

Whoever is forked shares its parent's pages until one of them writes, and a Python process writes into most pages that
it uses, if only to count references, up and down again. Half of what a pid 1 has of its own after some work is byte for
byte what it was. The zygote's memory is a private mapping of a sealed memory file (namespace/snapshot.py), and so is
that of each pid 1. When it has nothing to do, a few instructions compare each page of its own with the file's, and let
go of those that are equal: what is read there from then on is the file's page, which all share.

No bytes change, whatever happens: all signals are blocked, there is one thread, and no child shares the memory
meanwhile, so nobody writes between a comparison and the letting go. Where a page was not the file's after all (the C
library gave memory back and got it anew), it is written again. Only for x86_64; elsewhere nothing is given back.
"""

from __future__ import annotations

import ctypes
import struct

from rock.guest.init import native

PAGE = 4096
# Signals are blocked. Of each region, 512 pages at a time: read what the page table says (pread64). Each page that is
# there and our own (bits 61 to 63 are 4) and equal to the file's is noted and dropped (madvise). Then, from the last to
# the first, each that was noted and is not equal is copied from the file. Signals are as they were.
_CODE = bytes.fromhex(
    "53"                # push rbx
    "55"                # push rbp
    "4154"              # push r12
    "4155"              # push r13
    "4156"              # push r14
    "4157"              # push r15
    "4881ec08100000"    # sub rsp,0x1008
    "4889fb"            # mov rbx,rdi
    "b80e000000"        # mov eax,0xe
    "bf02000000"        # mov edi,0x2
    "488d7310"          # lea rsi,[rbx+0x10]
    "488d5318"          # lea rdx,[rbx+0x18]
    "41ba08000000"      # mov r10d,0x8
    "0f05"              # syscall
    "488d6b28"          # lea rbp,[rbx+0x28]
    "4c8b3b"            # mov r15,[rbx]
    "4d85ff"            # region: test r15,r15
    "0f840b010000"      # je end
    "4c8b6500"          # mov r12,[rbp+0x0]
    "4c8b6d08"          # mov r13,[rbp+0x8]
    "4c8b7510"          # mov r14,[rbp+0x10]
    "4d85ed"            # chunk: test r13,r13
    "0f84ea000000"      # je after
    "ba00020000"        # mov edx,0x200
    "4c39ea"            # cmp rdx,r13
    "490f47d5"          # cmova rdx,r13
    "c1e203"            # shl edx,0x3
    "b811000000"        # mov eax,0x11
    "488b7b08"          # mov rdi,[rbx+0x8]
    "4889e6"            # mov rsi,rsp
    "4d89e2"            # mov r10,r12
    "49c1ea09"          # shr r10,0x9
    "0f05"              # syscall
    "ba00020000"        # mov edx,0x200
    "4c39ea"            # cmp rdx,r13
    "490f47d5"          # cmova rdx,r13
    "8d0cd500000000"    # lea ecx,[rdx*8+0x0]
    "4839c8"            # cmp rax,rcx
    "0f85aa000000"      # jne after
    "4929d5"            # sub r13,rdx
    "4889942400100000"  # mov [rsp+0x1000],rdx
    "4989e0"            # mov r8,rsp
    "4189d1"            # mov r9d,edx
    "498b00"            # page: mov rax,[r8]
    "48c1e83d"          # shr rax,0x3d
    "83f804"            # cmp eax,0x4
    "49c70000000000"    # mov [r8],0x0
    "7522"              # jne skip
    "e8b9000000"        # call same
    "751b"              # jne skip
    "49ff00"            # inc [r8]
    "b81c000000"        # mov eax,0x1c
    "4c89e7"            # mov rdi,r12
    "be00100000"        # mov esi,0x1000
    "ba04000000"        # mov edx,0x4
    "0f05"              # syscall
    "48ff4320"          # inc [rbx+0x20]
    "4983c008"          # skip: add r8,0x8
    "4981c400100000"    # add r12,0x1000
    "4981c600100000"    # add r14,0x1000
    "41ffc9"            # dec r9d
    "75b4"              # jne page
    "4983e808"          # back: sub r8,0x8
    "4981ec00100000"    # sub r12,0x1000
    "4981ee00100000"    # sub r14,0x1000
    "49833800"          # cmp [r8],0x0
    "7419"              # je right
    "e868000000"        # call same
    "7412"              # je right
    "4c89e7"            # mov rdi,r12
    "4c89f6"            # mov rsi,r14
    "b900020000"        # mov ecx,0x200
    "f348a5"            # rep movs [rdi],[rsi]
    "48ff4b20"          # dec [rbx+0x20]
    "4939e0"            # right: cmp r8,rsp
    "75ca"              # jne back
    "488b942400100000"  # mov rdx,[rsp+0x1000]
    "48c1e20c"          # shl rdx,0xc
    "4901d4"            # add r12,rdx
    "4901d6"            # add r14,rdx
    "e90dffffff"        # jmp chunk
    "4883c518"          # after: add rbp,0x18
    "49ffcf"            # dec r15
    "e9ecfeffff"        # jmp region
    "b80e000000"        # end: mov eax,0xe
    "bf02000000"        # mov edi,0x2
    "488d7318"          # lea rsi,[rbx+0x18]
    "31d2"              # xor edx,edx
    "41ba08000000"      # mov r10d,0x8
    "0f05"              # syscall
    "31c0"              # xor eax,eax
    "4881c408100000"    # add rsp,0x1008
    "415f"              # pop r15
    "415e"              # pop r14
    "415d"              # pop r13
    "415c"              # pop r12
    "5d"                # pop rbp
    "5b"                # pop rbx
    "c3"                # ret
    "b900100000"        # same: mov ecx,0x1000
    "498b440cf8"        # again: mov rax,[r12+rcx-0x8]
    "493b440ef8"        # cmp rax,[r14+rcx-0x8]
    "7505"              # jne differ
    "83e908"            # sub ecx,0x8
    "75ef"              # jne again
    "c3"                # differ: ret
)
_ALL_SIGNALS = (1 << 64) - 1
_HEAD = 40  # bytes: number of regions, descriptor of pagemap, signals to block, room for the old ones, pages let go

Region = tuple[int, int, int]  # address, number of pages, address of the same in the file's mapping

_function = native.load(_CODE)
available = _function is not None


class PageSharing:
    """Lets go of pages of `regions`. Made before the process is copied that is to be swept, who then calls `run`."""

    def __init__(self, regions: list[Region]) -> None:
        flat = [value for region in regions for value in region]
        head = struct.pack("QqQQQ", len(regions), -1, _ALL_SIGNALS, 0, 0)
        self._table = ctypes.create_string_buffer(head + struct.pack(f"{len(flat)}Q", *flat), _HEAD + 8 * len(flat))

    def run(self, pagemap: int) -> int:
        """Let go of what is equal; answers how many pages. `pagemap`: our own /proc/self/pagemap, open for reading."""
        if _function is None:
            return 0
        struct.pack_into("q", self._table, 8, pagemap)
        struct.pack_into("Q", self._table, 32, 0)
        _function(ctypes.addressof(self._table))
        return int(struct.unpack_from("Q", self._table, 32)[0])
