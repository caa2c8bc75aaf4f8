"""A link between two network namespaces whose packets arrive after a delay, without netem.

A process reads the packets of one TUN device, holds each for the delay, and writes it to the device in the other
namespace. It adds 20 to 50 us of CPU time for each packet, which a bare echo over the same link has too.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import select
import struct
import subprocess
import time
from collections import deque
from collections.abc import Iterator

_TUNSETIFF, _TUN, _NO_HEADER = 0x400454CA, 0x0001, 0x1000
_PR_SET_TIMERSLACK, _PR_SET_PDEATHSIG, _SIGKILL = 29, 1, 9
_LARGEST = 65536  # bytes of a packet
_MOST = 4096  # packets that wait in one direction; further ones stay in the device, which drops beyond its queue


def _device(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TUN | _NO_HEADER))
    return fd


def _relay(fds: tuple[int, int], seconds: float) -> None:
    """Forward packets until the parent ends. Sleeps are precise to a microsecond plus a wake-up."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)
    prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    other = {fds[0]: fds[1], fds[1]: fds[0]}
    waiting: deque[tuple[float, int, bytes]] = deque()
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, fd, packet = waiting.popleft()
            with contextlib.suppress(OSError):  # a device that is down drops the packet
                os.write(fd, packet)
        if waiting:
            pause = waiting[0][0] - time.monotonic()
            # poll has milliseconds, select microseconds
            readable, _, _ = select.select(fds, (), (), max(pause, 0.0))
        else:
            readable, _, _ = select.select(fds, (), ())
        for fd in readable:
            with contextlib.suppress(BlockingIOError):
                while len(waiting) < _MOST:
                    waiting.append((time.monotonic() + seconds, other[fd], os.read(fd, _LARGEST)))


@contextlib.contextmanager
def delayed_link(
    namespaces: tuple[str, str], addresses: tuple[str, str], route: str, milliseconds: float
) -> Iterator[None]:
    """A point-to-point link between the two addresses, with a delay of each direction. Needs root.

    route: another address of the second namespace, to which the first one sends over this link.
    """
    devices = tuple(f"rockd{os.getpid()}{side}"[:15] for side in "ab")
    fds = (_device(devices[0]), _device(devices[1]))
    relay = multiprocessing.get_context("fork").Process(target=_relay, args=(fds, milliseconds / 1e3), daemon=True)
    try:
        for device, namespace, own, peer in zip(devices, namespaces, addresses, reversed(addresses), strict=True):
            inside = ("ip", "-n", namespace)
            for command in (("ip", "link", "set", device, "mtu", "60000", "netns", namespace),
                            (*inside, "address", "add", own, "peer", peer, "dev", device),
                            (*inside, "link", "set", device, "up")):  # fmt: skip
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(("ip", "-n", namespaces[0], "route", "add", route, "dev", devices[0]), check=True)
        relay.start()
        yield
    finally:
        if relay.pid is not None:
            relay.kill()
            relay.join()
        for fd in fds:
            os.close(fd)  # removes the device
