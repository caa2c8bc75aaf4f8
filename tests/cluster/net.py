"""Machines with addresses of their own: network namespaces on this one, joined by switch.py."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000


def why_not() -> str | None:
    """What keeps this machine from having such networks."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "needs /dev/net/tun"
    try:
        done = subprocess.run(["ip", "netns", "list"], capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"needs iproute2: {error}"
    return None if done.returncode == 0 else f"needs network namespaces: {done.stderr.decode().strip()}"


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


class Net:
    """`address(0)` is the tests' own; those of machines begin with 1. All rules are replaced at once."""

    def __init__(self, subnet: str, names: list[str], switch: subprocess.Popen[str]) -> None:
        self._subnet = subnet
        self._names = names
        self._switch = switch

    def address(self, machine: int) -> str:
        return f"{self._subnet}.{machine + 1}"

    def inside(self, machine: int) -> tuple[str, ...]:
        """What begins the command line of a program on a machine."""
        return ("ip", "netns", "exec", self._names[machine - 1])

    def rules(self, *, delay: float = 0.0, loss: float = 0.0, cut: tuple[tuple[int, int], ...] = ()) -> None:
        """delay: seconds one way. loss: share of packets. cut: (from, to): what goes that way is dropped."""
        pairs = [[self.address(one), self.address(other)] for one, other in cut]
        assert self._switch.stdin is not None and self._switch.stdout is not None
        self._switch.stdin.write(json.dumps({"delay": delay, "loss": loss, "cut": pairs}) + "\n")
        self._switch.stdin.flush()
        assert self._switch.stdout.readline() == "done\n"

    def apart(self, one: int, other: int) -> None:
        """Nothing goes between the two."""
        self.rules(cut=((one, other), (other, one)))


def _device(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22s", name.encode(), _IFF_TUN | _IFF_NO_PI, b""))
    return descriptor


@contextmanager
def network(machines: int) -> Iterator[Net]:
    """So many machines. All of it goes with the context: devices with their descriptors, namespaces by name."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    mark = os.urandom(2).hex()
    subnet = f"10.{200 + os.urandom(1)[0] % 50}.{os.urandom(1)[0]}"
    with ExitStack() as stack:
        devices: dict[str, int] = {}
        names: list[str] = []
        for number in range(machines + 1):
            device, address = f"rk{mark}{number}", f"{subnet}.{number + 1}"
            devices[address] = _device(device)
            stack.callback(os.close, devices[address])
            where: tuple[str, ...] = ()
            if number:
                name = f"rocktest-{mark}-{number}"
                _ip("netns", "add", name)
                stack.callback(_ip, "netns", "del", name)
                names.append(name)
                _ip("link", "set", device, "netns", name)
                where = ("-n", name)
                _ip(*where, "link", "set", "lo", "up")
            _ip(*where, "addr", "add", f"{address}/24", "dev", device)
            _ip(*where, "link", "set", device, "up")
        words = [f"{descriptor}={address}" for address, descriptor in devices.items()]
        switch = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "switch.py"), *words], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, pass_fds=list(devices.values()),
        )  # fmt: skip
        stack.callback(switch.communicate)  # it ends with its stdin
        yield Net(subnet, names, switch)
